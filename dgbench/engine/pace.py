"""How fast a training is, and what it waits for: `speed.jsonl`, beside `log.jsonl`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from dgbench.engine.team import Team


class Moment:
    """When a device has done all that it was asked before: on a GPU in its own time, which nobody waits for; on a CPU, now."""

    def __init__(self, device: torch.device) -> None:
        self._at, self._event = time.perf_counter(), None
        if device.type == "cuda":
            self._event = torch.cuda.current_stream(device).record_event(torch.cuda.Event(enable_timing=True))

    def wait(self) -> None:
        """Wait until then."""
        if self._event is not None:
            self._event.synchronize()

    def over(self) -> bool:
        """Return whether it is over, without waiting."""
        return self._event is None or bool(self._event.query())

    def since(self, before: Moment) -> float:
        """Return the seconds from an earlier moment of the same device; both are over."""
        if self._event is None or before._event is None:
            return self._at - before._at
        return float(before._event.elapsed_time(self._event)) / 1e3


class Stretch(NamedTuple):
    """The steps from one line to the next.

    images: of all processes.    loading, meeting: seconds of waiting, and peak: highest GiB, of this process.
    """

    begin: Moment
    end: Moment
    images: int
    loading: float
    meeting: float
    peak: float


class Pace:
    """Seconds since the last line, and those of them in which this process waited for its batch or for the others.

    A line's seconds end with its step, on a GPU as the GPU sees it, whenever the line is written.

    Args:
        peak: tells this process's highest memory in GiB.
    """

    def __init__(self, run: Path, team: Team, peak: Callable[[], float], device: torch.device) -> None:
        self.path, self._team, self._peak, self._device = run / "speed.jsonl", team, peak, device
        self._since, self._mark = Moment(device), time.perf_counter()
        self._images, self._loading, self._meeting = 0, 0.0, 0.0
        self._all_images, self._all_seconds = 0, 0.0

    @property
    def overall(self) -> float:
        """Images of all processes a second, from the first step to the last line."""
        return self._all_images / self._all_seconds

    def waited(self, *, loading: bool) -> None:
        """Count the time since the last mark as waiting, for a batch or for the others."""
        spent = time.perf_counter() - self._mark
        if loading:
            self._loading += spent
        else:
            self._meeting += spent

    def mark(self) -> None:
        """Begin to wait."""
        self._mark = time.perf_counter()

    def step(self, images: int) -> None:
        """Count a step's images, of all processes."""
        self._images += images

    def take(self) -> Stretch:
        """Return what was counted since the last call, behind what the device has been asked so far, and count anew."""
        end = Moment(self._device)
        taken = Stretch(self._since, end, self._images, self._loading, self._meeting, self._peak())
        self._since, self._images, self._loading, self._meeting = end, 0, 0.0, 0.0
        return taken

    def write(self, step: int, stretch: Stretch) -> None:
        """Write the means over the processes and the highest memory, once its end is over. All processes call it.

        Raises: PeerLost.
        """
        seconds = stretch.end.since(stretch.begin)
        loading, meeting = self._team.mean([stretch.loading / seconds, stretch.meeting / seconds])
        memory = self._team.most(int(stretch.peak * 2**20)) / 2**20
        self._all_images, self._all_seconds = self._all_images + stretch.images, self._all_seconds + seconds
        if self._team.main:
            line = {
                "step": step,
                "images_per_second": round(stretch.images / seconds, 3),
                "peak_gib": round(memory, 3),
                "waiting_for_data": round(loading, 4),
                "waiting_for_others": round(meeting, 4),
                "processes": self._team.world,
            }
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
