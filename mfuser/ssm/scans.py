"""Scans of h[t] = a[t] h[t-1] + b[t], whose coefficients change from step to step: in order, as a tree, and in chunks.

A step is a pair (a, b). Two steps in a row are a step again,

    (a1, b1) then (a2, b2)  =  (a2 a1, a2 b1 + b2)

and this combination is associative, so that steps can be combined in any grouping. Time is the first dimension of all tensors.
A `Tally` counts how many pairs a function combines (work) and how many combinations wait for each other (depth).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


@dataclass
class Tally:
    """What a scan took: combinations of pairs, how many of these in a row, and each of them by step numbers, if asked for."""

    work: int = 0
    depth: int = 0
    traced: bool = False
    rounds: list[list[tuple[str, int, int]]] = field(default_factory=list)  # of a round: phase, from, into

    def round(self, phase: str, pairs: list[tuple[int, int]]) -> None:
        """Count combinations that run side by side."""
        self.work += len(pairs)
        self.depth += 1
        if self.traced:
            self.rounds.append([(phase, source, target) for source, target in pairs])


def combined(first: Pair, second: Pair) -> Pair:
    """Return two steps in a row as one."""
    return second[0] * first[0], torch.addcmul(second[1], second[0], first[1])


def sequential(a: Tensor, b: Tensor, tally: Tally | None = None) -> Tensor:
    """Return h (L, ...) in order: work L - 1, and the same depth."""
    found = [b[0]]
    for t in range(1, len(b)):
        found.append(torch.addcmul(b[t], a[t], found[-1]))
        if tally is not None:
            tally.round("step", [(t - 1, t)])
    return torch.stack(found)


def blelloch(a: Tensor, b: Tensor, tally: Tally | None = None) -> Tensor:
    """Return h (L, ...) as a tree (Blelloch 1990): a sweep up that combines, and a sweep down that hands out what came before.

    Work about 3 L and depth 2 log2 L + 1, with the last round, which adds each step to what came before it. A length that is no
    power of two is filled up with steps that change nothing.
    """
    length = len(b)
    size = 1 << (length - 1).bit_length() if length > 1 else 1
    if size > length:
        a = torch.cat([a, a.new_ones(size - length, *a.shape[1:])])
        b = torch.cat([b, b.new_zeros(size - length, *b.shape[1:])])
    levels: list[Pair] = [(a, b)]  # (L, ...), (L/2, ...), ... (1, ...)
    width = 1
    while len(levels[-1][1]) > 1:
        left, right = _halves(levels[-1])
        levels.append(combined(left, right))
        if tally is not None:
            tally.round("up", [(t - width, t) for t in range(2 * width - 1, size, 2 * width)])
        width *= 2
    # what comes before each node, downwards; only b is needed, since the first state is zero
    before = torch.zeros_like(levels[-1][1])
    for level in reversed(levels[:-1]):
        width //= 2
        (left_a, left_b), _ = _halves(level)
        before = torch.stack([before, torch.addcmul(left_b, left_a, before)], 1).flatten(0, 1)
        if tally is not None:
            tally.round("down", [(t - width, t) for t in range(2 * width - 1, size, 2 * width)])
    if tally is not None:
        tally.round("last", [(t, t) for t in range(length)])
    return torch.addcmul(b, a, before)[:length]


def chunked(a: Tensor, b: Tensor, chunk: int, tally: Tally | None = None) -> Tensor:
    """Return h (L, ...) in chunks that run side by side, then over their last states in order, which are added to all steps.

    Work about 2 L and depth chunk + L / chunk: what kernels do, with a chunk for each block of threads.
    """
    length, rest = len(b), b.shape[1:]
    chunk = min(chunk, length)
    count = -(-length // chunk)
    if pad := count * chunk - length:
        a = torch.cat([a, a.new_ones(pad, *rest)])
        b = torch.cat([b, b.new_zeros(pad, *rest)])
    a, b = a.reshape(count, chunk, *rest), b.reshape(count, chunk, *rest)
    within: list[Pair] = [(a[:, 0], b[:, 0])]
    for t in range(1, chunk):
        within.append(combined(within[-1], (a[:, t], b[:, t])))
        if tally is not None:
            tally.round("within", [(c * chunk + t - 1, c * chunk + t) for c in range(count) if c * chunk + t < length])
    reach, states = (torch.stack(parts, 1) for parts in zip(*within, strict=True))
    carried = [torch.zeros_like(states[0, -1])]
    for c in range(count - 1):
        carried.append(torch.addcmul(states[c, -1], reach[c, -1], carried[-1]))
        if tally is not None and c:
            tally.round("between", [(c * chunk - 1, (c + 1) * chunk - 1)])
    if tally is not None and count > 1:
        tally.round("add", [(t // chunk * chunk - 1, t) for t in range(chunk, length)])
    return torch.addcmul(states, reach, torch.stack(carried)[:, None]).flatten(0, 1)[:length]


def _halves(pairs: Pair) -> tuple[Pair, Pair]:
    """Return the even and the odd steps."""
    a, b = pairs
    return (a[0::2], b[0::2]), (a[1::2], b[1::2])
