"""One batch over several processes: divisors of losses and random draws, as one process would have them.

Each process has an equal, contiguous part of a batch's images, and `DistributedDataParallel` averages gradients over the
processes. A sum over images divided by `divisor` therefore has the gradient of one process's mean. All processes' generators are
seeded alike; what is drawn for each image is drawn for the whole batch, of which `Rows.of` returns this process's part.
Both are for `Segmentor.loss`, which all processes call together. In one process nothing is exchanged and nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable
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


def number_of_processes() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def even_rows(own: int) -> Rows:
    """Return the rows of a process where every process has `own` of them, as it has of images."""
    processes = number_of_processes()
    return Rows(own * dist.get_rank() if processes > 1 else 0, own, own * processes)


def rows(own: int, device: torch.device) -> Rows:
    """Return the rows of a process that has `own` of them, where others may have more or fewer. All processes call it."""
    if (processes := number_of_processes()) == 1:
        return Rows(0, own, own)
    numbers = torch.zeros(processes, dtype=torch.long, device=device)
    numbers[dist.get_rank()] = own
    dist.all_reduce(numbers)
    every = numbers.tolist()
    return Rows(sum(every[: dist.get_rank()]), own, sum(every))


def divisor(own: Tensor, least: float = 1) -> Tensor:
    """Return what a process divides its sum by, whose mean over the processes is then that of the whole batch.

    Args:
        own: how much (pixels, masks, weight) this process's part of the batch has. All processes call it.
        least: of the whole batch's.
    """
    if (processes := number_of_processes()) == 1:
        return own.clamp(min=least)
    total = own.detach().to(torch.float32, copy=True)
    dist.all_reduce(total)
    return total.clamp(min=least) / processes
