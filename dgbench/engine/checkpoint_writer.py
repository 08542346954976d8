"""Checkpoints written in the background: a GPU goes on with the next steps while a thread writes a snapshot of the training.

At full size the snapshot takes a fraction of a second; files of gigabytes, their hashes and their way to the disk take some.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfuser import checkpoints
from mfuser.segmentor import Segmentor

BACKGROUND = ("cuda",)  # kinds of devices whose trainings leave CPU cores to a thread; a training on a CPU writes between steps


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a checkpoint holds of a training.

    moments: the optimizer's state.    training: what a method needs for training alone, by name, on the CPU.
    """

    model: checkpoints.Snapshot
    moments: dict[str, Any]
    training: dict[str, Tensor]


def snapshot(model: Segmentor, optimizer: torch.optim.Optimizer, *, copy: bool = False) -> Snapshot:
    """Return what a checkpoint holds; `copy`: on the CPU, and later steps do not change it."""
    moments = optimizer.state_dict()
    state = model.training_state().items()
    training = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state}
    return Snapshot(checkpoints.snapshot(model, copy=copy), _copied(moments) if copy else moments, training)


def _copied(value: Any) -> Any:
    """Return a copy of nested dicts and lists, with their tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    return type(value)(map(_copied, value)) if isinstance(value, list | tuple) else value


class Writer:
    """Calls that write checkpoints, one after the other: in a thread, or at once.

    Args:
        background: in a thread.
    """

    def __init__(self, *, background: bool) -> None:
        self.background = background
        self._pool = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._last: Future[object] | None = None

    def put(self, write: Callable[[], object]) -> None:
        """Have a call made, behind the last one. Raises: as `wait`; without a thread, what the call raises."""
        self.wait()
        if self._pool is None:
            write()
        else:
            self._last = self._pool.submit(write)

    def check(self) -> None:
        """Raise what a call has raised, if it has ended; wait for nothing."""
        if self._last is not None and self._last.done():
            self.wait()

    def wait(self) -> None:
        """Wait until all is written. Raises: what the call raised, once."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def close(self) -> None:
        """Wait until what has begun is written, whatever becomes of it, and end the thread."""
        if self._pool is not None:
            self._pool.shutdown()
