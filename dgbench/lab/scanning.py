"""What `lab scan` shows: the three scans step by step for a few elements, their work and depth counted, and their times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dgbench.cost.timing import interleaved
from dgbench.engine.device import device_name
from mfuser.ssm.scans import Tally, blelloch, chunked, sequential

_CHANNELS = 64


@dataclass(frozen=True, slots=True)
class Round:
    """Combinations that run side by side, and the steps that each element stands for afterwards, such as `0..1`."""

    scan: str
    phase: str
    combined: str
    holds: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Timed:
    """A scan at one length."""

    scan: str
    length: int
    work: int  # combinations of two steps
    depth: int  # of these in a row
    milliseconds: float


@dataclass(frozen=True, slots=True)
class Scans:
    """Work, depth and times of scans; rounds are those for few elements."""

    device: str
    channels: int
    chunk: int
    rounds: tuple[Round, ...]
    timed: tuple[Timed, ...]


def scans_view(lengths: Sequence[int], *, elements: int = 4, chunk: int = 64, device: torch.device) -> Scans:
    """Show the scans of so many elements step by step, and time them at these lengths."""
    rounds = [*_in_order(elements), *_as_a_tree(elements), *_in_chunks(elements, 2)]
    timed = []
    for length in lengths:
        generator = torch.Generator(device).manual_seed(0)
        a = torch.rand(length, _CHANNELS, generator=generator, device=device)
        b = torch.randn(length, _CHANNELS, generator=generator, device=device)
        calls: dict[str, Callable[[Tensor, Tensor, Tally | None], Tensor]] = {
            "sequential": sequential,
            "blelloch": blelloch,
            "chunked": lambda a, b, tally: chunked(a, b, chunk, tally),
        }
        times = interleaved({name: partial(call, a, b, None) for name, call in calls.items()}, device, at_most=0.2, least=3)
        for name, call in calls.items():
            tally = Tally()
            call(a[:, :1].cpu(), b[:, :1].cpu(), tally)
            timed.append(Timed(name, length, tally.work, tally.depth, times[name].median))
    return Scans(device_name(device), _CHANNELS, chunk, tuple(rounds), tuple(timed))


def _in_order(count: int) -> list[Round]:
    spans = [(t, t) for t in range(count)]
    found = []
    for t in range(1, count):
        spans[t] = (spans[t - 1][0], t)
        found.append(_round("sequential", "step", [(t - 1, t)], spans))
    return found


def _as_a_tree(count: int) -> list[Round]:
    """Return the rounds of Blelloch's scan; elements are filled up to a power of two."""
    tally = Tally(traced=True)
    blelloch(torch.ones(count), torch.ones(count), tally)
    size = 1 << (count - 1).bit_length()
    spans: list[tuple[int, int] | None] = [(t, t) for t in range(size)]
    found, began = [], False
    for pairs in tally.rounds:
        phase = pairs[0][0]
        if phase == "down" and not began:
            spans[-1], began = None, True  # nothing comes before the whole
        for _, left, right in pairs:
            if phase == "up":
                spans[right] = _joined(spans[left], spans[right])
            elif phase == "down":
                spans[left], spans[right] = spans[right], _joined(spans[right], spans[left])
            else:
                spans[right] = _joined(spans[right], (right, right))
        found.append(_round("blelloch", phase, [pair[1:] for pair in pairs], spans[:count]))
    return found


def _in_chunks(count: int, chunk: int) -> list[Round]:
    tally = Tally(traced=True)
    chunked(torch.ones(count), torch.ones(count), chunk, tally)
    spans: list[tuple[int, int] | None] = [(t, t) for t in range(count)]
    found, carried = [], set()  # the last elements of chunks to which `between` has given what came before
    for pairs in tally.rounds:
        for phase, left, right in pairs:
            if right not in carried:
                spans[right] = _joined(spans[left], spans[right])
            if phase == "between":
                carried.add(right)
        found.append(_round("chunked", pairs[0][0], [pair[1:] for pair in pairs], spans))
    return found


def _joined(first: tuple[int, int] | None, second: tuple[int, int] | None) -> tuple[int, int] | None:
    if first is None or second is None:
        return first or second
    assert first[1] + 1 == second[0], "scans join neighbours alone"
    return first[0], second[1]


def _round(scan: str, phase: str, pairs: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int] | None]) -> Round:
    joined = ", ".join(f"{left} with {right}" if left != right else str(left) for left, right in pairs)
    held = ("nothing" if span is None else str(span[0]) if span[0] == span[1] else f"{span[0]}..{span[1]}" for span in spans)
    return Round(scan, phase, joined, tuple(held))
