"""A sweep's cells on this machine, several at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from dgbench.errors import DgbenchError, ResultError
from dgbench.progress import Progress
from dgbench.sweep.attempt import Training
from dgbench.sweep.cells import Cell

_POLL = 0.2


def carry_out(
    cells: Sequence[Cell],
    at_once: int,
    program: Sequence[str],
    words: Sequence[str],
    progress: Progress,
    *,
    gpus: int = 1,
    cpu: bool = False,
) -> None:
    """Train cells, `at_once` at a time; one that fails does not stop the others.

    Args:
        gpus: of each cell; GPUs of this machine are given to cells in turn.    cpu: none is used.

    Raises: DgbenchError if the machine has fewer GPUs than a cell takes; KeyboardInterrupt, Terminated after all have stopped.
    """
    places = [{}] * at_once if cpu else _places(at_once, gpus)
    left, running = list(cells), dict[int, tuple[Cell, Training]]()
    progress.start("sweep", len(cells), "cells")
    try:
        while left or running:
            for place in range(at_once):
                if left and place not in running:
                    cell = left.pop(0)
                    try:
                        running[place] = cell, Training(cell.run, program, words, env=places[place])
                    except ResultError as error:  # begun by another sweep since this one looked
                        progress.note(error.message)
                        progress.advance()
                    else:
                        progress.note(f"{cell.name} begins")
            for place, (cell, training) in list(running.items()):
                if training.ended():
                    del running[place]
                    reason = training.outcome()
                    progress.note(f"{cell.name} failed: {reason}" if reason else f"{cell.name} has ended")
                    progress.advance()
            time.sleep(_POLL)
    finally:
        for _, training in running.values():
            training.stop()
        while any(not training.ended() for _, training in running.values()):
            time.sleep(_POLL)
        for _, training in running.values():
            training.outcome()
        progress.stop()


def _places(at_once: int, gpus: int) -> list[dict[str, str]]:
    """Return the GPUs of each place, as CUDA's variable; none if the machine has none."""
    import torch

    count = torch.cuda.device_count()
    if not count:
        return [{}] * at_once
    if gpus > count:
        raise DgbenchError(f"--gpus {gpus}, but this machine has {count}", f"--gpus {count}, or fewer")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else [str(index) for index in range(count)]
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(names[(place * gpus + i) % count] for i in range(gpus))} for place in range(at_once)
    ]
