"""Gradients of a backward pass in a few buckets, which processes average while the rest of the pass is computed.

A bucket's exchange begins as soon as its last gradient is there. Buckets follow the order in which a pass has its gradients, and
go through the communicator of the pass's other exchanges: one communicator does one exchange after the other, in the order in
which they were asked for, so that no two processes can wait for each other in two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor

from mfuser.cuda_graphs import CaptureError
from mfuser.processes import average, averaging, of_each

# elements between whose multiples gradients that share memory begin, so that kernels read them as they do those that do not
_ALIGNED = 64
BUCKET = 64 * 2**20  # bytes from which a bucket is full: some tenths of a millisecond of exchange are left behind the pass

Gradients = Sequence[Tensor | None]


@contextmanager
def arrivals(parameters: Sequence[Tensor]) -> Iterator[list[int]]:
    """Give a list to which each parameter's index is added when a backward pass within the block has its gradient.

    The gradient is then the sum of all that the pass adds to it: torch's engine comes to a parameter when nothing is left to add.
    """
    order: list[int] = []

    def note(index: int, _: Tensor) -> None:
        order.append(index)

    with _told(parameters, note):
        yield order


class Joined:
    """Memory of the gradients of parameters, one behind the other in their layouts, and their means over the processes.

    Args:
        order: indices of the parameters that have gradients, as `arrivals` gives them. All processes call this together.
        within: gradients are averaged while their pass is computed; else, and where processes have them in other orders, so that
            other exchanges of the pass would come between other buckets, all at once, by `finish`.

    Raises: CaptureError if processes have gradients of other parameters.
    """

    def __init__(self, parameters: Sequence[Tensor], order: Sequence[int], *, within: bool) -> None:
        self._parameters = parameters
        every = of_each([*order, *[-1] * (len(parameters) - len(order))], parameters[0].device)
        self._order = [index for index in every[0] if index >= 0]
        for own in every:
            self._check([index for index in own if index >= 0])
        self._within = within = within and all(own == every[0] for own in every)
        buckets: list[list[int]] = []
        filling: dict[torch.dtype, list[int]] = {}
        for index in self._order:
            bucket = filling.setdefault(parameters[index].dtype, [])
            bucket.append(index)
            if within and sum(parameters[i].nbytes for i in bucket) >= BUCKET:
                buckets.append(filling.pop(parameters[index].dtype))
        self._buckets = [_Bucket({i: parameters[i] for i in bucket}) for bucket in (*buckets, *filling.values())]

    def of(self, backward: Callable[[], Gradients]) -> list[Tensor | None]:
        """Return a backward pass's gradients of the parameters in this memory: their means, or what `finish` makes them of.

        Raises: CaptureError if other parameters have gradients than had at first.
        """
        with self._averaged() if self._within else nullcontext():
            found = backward()
            self._check([index for index, gradient in enumerate(found) if gradient is not None])
        views: dict[int, Tensor] = {}
        for bucket in self._buckets:
            if not self._within:
                bucket.hold(found)
            views |= bucket.views
        return [views.get(index) for index in range(len(found))]

    def finish(self) -> None:
        """Average what was not averaged within the pass. All processes call it together."""
        if not self._within:
            for bucket in self._buckets:
                average(bucket.flat)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Average the gradients of a pass within the block, which ends when all are."""
        found: list[Tensor | None] = [None] * len(self._parameters)
        left, waits = list(self._buckets), []

        def arrived(index: int, gradient: Tensor) -> None:
            found[index] = gradient
            while left and all(found[i] is not None for i in left[0].views):
                bucket = left.pop(0)
                bucket.hold(found)
                waits.append(averaging(bucket.flat))
                for i in bucket.views:
                    found[i] = None

        with _told(self._parameters, arrived):
            yield
        for wait in waits:
            wait()

    def _check(self, order: Sequence[int]) -> None:
        if sorted(order) != sorted(self._order):
            raise CaptureError("its passes have gradients of other weights each, of which processes cannot take means together")


class _Bucket:
    """Gradients of one type of numbers that are averaged at once.

    flat: all of them; zeros in between.    views: each, by its parameter's index.
    """

    def __init__(self, parameters: dict[int, Tensor]) -> None:
        first = next(iter(parameters.values()))
        begins, size = {}, 0
        for index, parameter in parameters.items():
            begins[index] = size
            size += -(-parameter.numel() // _ALIGNED) * _ALIGNED
        self.flat = torch.zeros(size, dtype=first.dtype, device=first.device)
        self.views = {
            index: self.flat.as_strided(parameter.shape, torch.empty_like(parameter, device="meta").stride(), begins[index])
            for index, parameter in parameters.items()
        }

    def hold(self, gradients: Gradients) -> None:
        """Copy gradients here, of which there is one for each parameter."""
        pairs = [(view, own) for index, view in self.views.items() if (own := gradients[index]) is not None]
        alike = [(view, own) for view, own in pairs if view.stride() == own.stride()]  # which one kernel copies hundreds of
        if alike:
            torch._foreach_copy_([view for view, _ in alike], [own for _, own in alike])
        for view, own in pairs:
            if view.stride() != own.stride():
                view.copy_(own)


@contextmanager
def _told(parameters: Sequence[Tensor], tell: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Have a backward pass within the block tell of each gradient, by its parameter's index, as soon as it is there."""
    hooks = [parameter.register_hook(partial(tell, index)) for index, parameter in enumerate(parameters)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
