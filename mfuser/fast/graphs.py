"""CUDA graphs of a function of images, one for each size; and how many windows a GPU's memory holds."""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfuser.by_size import handed_out
from mfuser.cuda_graphs import captured, first_cause, rehearsed
from mfuser.ops import dispatch

_MOST_GRAPHS = 8  # each holds the memory of its pass
_MOST_WINDOWS = 32  # a GPU is full long before
_SHARE = 0.6  # of the free memory; the rest is for scores of whole images and for what is between a graph and its results

Result = Any  # tensors, in tuples


@dataclass
class _Captured:
    graph: Any  # torch.cuda.CUDAGraph
    images: Tensor
    result: Result
    ran: Counter[tuple[str, str]]  # operators that a replay runs
    tables: list[Tensor]  # kept by size, which a replay reads: here they outlive other sizes


class Graphs:
    """Functions of images, captured where a size comes a second time: the first pass compiles and warms up.

    Results are copies: the next replay does not change them. What cannot be captured goes on without a graph, with a warning.

    Attributes:
        refused: why a function of so many images has no graph, by both as a text.
    """

    def __init__(self) -> None:
        self.refused: dict[str, str] = {}
        self._captured: OrderedDict[tuple[Any, ...], _Captured] = OrderedDict()
        self._seen: set[tuple[Any, ...]] = set()
        self._plain: set[tuple[Any, ...]] = set()  # that cannot be captured
        self._pool: Any = None
        self._side: Any = None  # torch.cuda.Stream

    def __len__(self) -> int:
        return len(self._captured)

    def run(self, name: str, function: Callable[[Tensor], Result], images: Tensor) -> Result:
        """Return function(images); `name` says which function it is."""
        key = (name, tuple(images.shape), images.dtype, images.device)
        if key not in self._captured:
            if key in self._plain:
                return function(images)
            if key not in self._seen:
                self._seen.add(key)
                return function(images)
            if not self._capture(key, function, images):
                return function(images)
        found = self._captured[key]
        self._captured.move_to_end(key)
        found.images.copy_(images)
        found.graph.replay()
        dispatch.count(found.ran)
        return _copied(found.result)

    def _capture(self, key: tuple[Any, ...], function: Callable[[Tensor], Result], images: Tensor) -> bool:
        """Return whether it could be captured."""
        while len(self._captured) >= _MOST_GRAPHS:
            self._captured.popitem(last=False)
        with torch.cuda.device(images.device):
            if self._pool is None:
                # one pool: results are copied before another graph runs. It shares memory within a stream alone
                self._pool, self._side = torch.cuda.graph_pool_handle(), self._side or torch.cuda.Stream()
            try:
                given = images.clone(memory_format=torch.contiguous_format)
                rehearsed(lambda: function(given), self._side)
                before = dispatch.tally()
                with handed_out() as tables:
                    result, graph = captured(lambda: function(given), self._side, self._pool)
            except RuntimeError as error:
                self._refuse(key, error)
                return False
            self._captured[key] = _Captured(graph, given, result, dispatch.tally() - before, tables)
            return True

    def _refuse(self, key: tuple[Any, ...], error: RuntimeError) -> None:
        self._plain.add(key)
        what, why = f"{key[0]} of {'x'.join(map(str, key[1]))}", first_cause(error)
        self.refused[what] = why
        if not self._captured:
            self._pool = None  # nothing uses it any more, and the allocator lets nobody share such a one
        warnings.warn(f"fast inference goes on without a CUDA graph for {what}: {why}", RuntimeWarning, stacklevel=2)


def _copied(result: Result) -> Result:
    return result.clone() if isinstance(result, Tensor) else tuple(map(_copied, result))


def windows_that_fit(function: Callable[[Tensor], Result], size: tuple[int, int], device: torch.device) -> int:
    """Return how many windows a GPU's free memory holds, by the peaks of a pass of one and of two.

    Args:
        function: of windows (B, 3, *size), not compiled, which takes more memory than compiled.
    """
    peaks = []
    with torch.cuda.device(device):
        for count in (1, 2):
            images = torch.zeros(count, 3, *size, device=device)
            function(images)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            function(images)
            torch.cuda.synchronize()
            peaks.append(torch.cuda.max_memory_allocated() - held)
        each = max(peaks[1] - peaks[0], peaks[1] // 4, 1)
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return max(1, min(_MOST_WINDOWS, int((_SHARE * free - (peaks[0] - each)) // each)))
