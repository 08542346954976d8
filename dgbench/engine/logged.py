"""What a training says of a logged step: its losses and how fast it is, read from a GPU while that computes the next step.

Reading a number waits for the GPU, which then waits until the next step is launched. So a logged step's losses are only copied at
its end, and written behind the launches of the next step, when they are there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dgbench.engine.log import Log
from dgbench.engine.pace import Pace, Stretch
from dgbench.engine.team import Team
from dgbench.engine.tracking import Trackers
from dgbench.errors import RecipeError
from dgbench.progress import Progress

LATE = ("cuda",)  # kinds of devices that compute while Python goes on


class _Taken(NamedTuple):
    """A logged step whose numbers are on their way: the loss and then its terms, by name, in `losses`."""

    step: int
    names: tuple[str, ...]
    losses: Tensor
    rate: float
    stretch: Stretch


class Logged:
    """The lines of logged steps, in their order: in `log.jsonl`, `speed.jsonl`, trackers and the progress display.

    Args:
        device: on which the losses are.    log: the first process's; None for the others, who only exchange their numbers.
    """

    def __init__(
        self, team: Team, device: torch.device, pace: Pace, log: Log | None, trackers: Trackers, progress: Progress
    ) -> None:
        self._team, self._device, self._pace = team, device, pace
        self._log, self._trackers, self._progress = log, trackers, progress
        self._taken: _Taken | None = None

    def take(self, step: int, loss: Tensor, terms: Mapping[str, Tensor], rate: float, *, now: bool) -> None:
        """Keep what a finished step has to say: on a GPU for the next call of `write`, elsewhere it is written at once.

        Args:
            rate: the learning rate.    now: write it at once on a GPU, too, as before a checkpoint and behind the last step.

        Raises: as `write`.
        """
        losses = torch.stack([loss, *terms.values()])
        if losses.is_cuda:
            own = torch.empty_like(losses, device="cpu", pin_memory=True)
            losses = own.copy_(losses, non_blocking=True)
        self._taken = _Taken(step, tuple(terms), losses, rate, self._pace.take())  # which ends behind the copy
        if now or self._device.type not in LATE:
            self.write()

    def write(self) -> None:
        """Write what was taken, if it has not been: it waits for the end of that step. All processes call it together.

        Raises: RecipeError for a loss that is not finite, naming its step; PeerLost.
        """
        taken, self._taken = self._taken, None
        if taken is None:
            return
        taken.stretch.end.wait()
        loss, *each = self._team.mean(taken.losses.tolist())
        _check(loss, taken.step)
        self._pace.write(taken.step, taken.stretch)
        if self._log is not None:
            values = {"loss": loss, "lr": taken.rate} | dict(zip(taken.names, each, strict=True))
            self._log.write(taken.step, values)
            self._trackers.log(values | {"images_per_second": self._pace.overall}, taken.step)
            self._progress.advance(0, loss=loss, images_per_second=self._pace.overall)

    def rescue(self) -> None:
        """Write what was taken before the training ends by an error, which the others of several processes may not have met.

        Those would be waited for in vain, perhaps by the GPU, too: several processes write nothing, and a resumed training
        repeats that step anyway.

        Raises: RecipeError for a loss that is not finite, of which the error may come.
        """
        taken, alone = self._taken, self._team.world == 1
        if taken is None:
            return
        try:
            if alone:
                taken.stretch.end.wait()
            over = taken.stretch.end.over()
        except RuntimeError:  # the error is the GPU's, which answers nothing any more
            return
        if alone:
            self.write()
        elif over:
            _check(float(taken.losses[0]), taken.step)


def _check(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise RecipeError(
            f"the loss became {loss} at step {step}",
            "lower optim.lr, or set train.clip_norm=1.0; the last checkpoint is kept",
        )
