"""One batch over several processes: divisors of losses and random draws, as one process would have them.

Each process has an equal, contiguous part of a batch's images, and `DistributedDataParallel` (or `average`) averages gradients
over the processes. A sum over images divided by `divisor` therefore has the gradient of one process's mean. All processes'
generators are seeded alike; what is drawn for each image is drawn for the whole batch, of which `Rows.of` returns this process's
part.
Both are for `Segmentor.loss`, which all processes call together. In one process nothing is exchanged and nothing changes.

One process may also work on the parts of a batch one after the other and average their gradients (`part_of`). A divisor of the
whole batch is then needed before the other parts have been seen: it follows from the batch's labels, or there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows that are this process's, of a tensor with rows for the whole batch: `count` from `first` on, of `total`."""

    first: int
    count: int
    total: int

    def of(self, draw: Callable[[int], Tensor]) -> Tensor:
        """Return this process's rows of what `draw` makes for a number of rows."""
        whole = draw(self.total)
        return whole if self.count == self.total else whole[self.first : self.first + self.count]


class PartError(ValueError):
    """A loss needs more of its batch than the part that it is given."""


@dataclass(frozen=True, slots=True)
class _Part:
    """What one process works on now: `own` labels (b, H, W), the part `index` of the batch's labels, (B, H, W)."""

    index: int
    own: Tensor
    every: tuple[Tensor, ...]


_part: _Part | None = None
_by_hosts: dist.ProcessGroup | None = None


@contextmanager
def part_of(every: tuple[Tensor, ...], index: int) -> Iterator[None]:
    """Let losses and draws within the block be those of one of several equal parts of a batch.

    Args:
        every: labels (b, H, W) of each part; the loss is given those of part `index`, the same tensor.

    A loss that divides by what does not follow from these labels raises PartError.
    """
    global _part
    before, _part = _part, _Part(index, every[index], every)
    try:
        yield
    finally:
        _part = before


def exchange_by_hosts(group: dist.ProcessGroup | None) -> None:
    """Let `rows` exchange its numbers through a group of all processes on CPUs (gloo), so that no GPU is waited for.

    None, as at first: through the default group, on the device of the rows.
    """
    global _by_hosts
    _by_hosts = group


def number_of_processes() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def even_rows(own: int) -> Rows:
    """Return the rows of a process where every process has `own` of them, as it has of images."""
    if _part is not None:
        return Rows(own * _part.index, own, own * len(_part.every))
    processes = number_of_processes()
    return Rows(own * dist.get_rank() if processes > 1 else 0, own, own * processes)


def rows(own: int, device: torch.device, *, labels: Tensor | None = None, of: Callable[[Tensor], Tensor] | None = None) -> Rows:
    """Return the rows of a process that has `own` of them, where others may have more or fewer. All processes call it.

    Args:
        labels, of: as `divisor` takes them.

    Raises: PartError as `divisor`.
    """
    if _part is not None:
        numbers = [int(number) for number in torch.stack([_of(each, labels, of) for each in _part.every]).tolist()]
        return Rows(sum(numbers[: _part.index]), own, sum(numbers))
    if (processes := number_of_processes()) == 1:
        return Rows(0, own, own)
    # a GPU would give its answer behind all that it was asked before: the pass whose loss this is
    numbers_of = torch.zeros(processes, dtype=torch.long, device=device if _by_hosts is None else "cpu")
    numbers_of[dist.get_rank()] = own
    dist.all_reduce(numbers_of, group=_by_hosts)
    every = numbers_of.tolist()
    return Rows(sum(every[: dist.get_rank()]), own, sum(every))


def divisor(
    own: Tensor, least: float = 1, *, labels: Tensor | None = None, of: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Return what a process divides its sum by, whose mean over the processes is then that of the whole batch.

    Args:
        own: how much (pixels, masks, weight) this process's part of the batch has. All processes call it.
        least: of the whole batch's.
        labels: the batch's, as the loss was given them, from which `own` follows.    of: how, for other labels.

    Raises: PartError in a part of a batch if it does not follow from the labels.
    """
    if _part is not None:
        total = torch.stack([_of(each, labels, of) for each in _part.every]).sum(0)
        return total.clamp(min=least) / len(_part.every)
    if (processes := number_of_processes()) == 1:
        return own.clamp(min=least)
    total = own.detach().to(torch.float32, copy=True)
    dist.all_reduce(total)
    return total.clamp(min=least) / processes


def average(tensor: Tensor) -> None:
    """Replace a tensor by its mean over the processes, in place. All processes call it, with one shape and type.

    As `DistributedDataParallel` does with gradients: each is divided by the number of processes, then they are added.
    """
    if (processes := number_of_processes()) > 1:
        dist.all_reduce(tensor.mul_(1 / processes))


def _of(each: Tensor, labels: Tensor | None, of: Callable[[Tensor], Tensor] | None) -> Tensor:
    if of is None or _part is None or labels is not _part.own:
        raise PartError("its loss divides by more than the labels of its batch say, and so needs the whole batch at once")
    return of(each)
