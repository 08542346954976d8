"""How fast a training is, and what it waits for: `speed.jsonl`, beside `log.jsonl`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from dgbench.engine.team import Team


class Pace:
    """Seconds since the last line, and those of them in which this process waited for its batch or for the others.

    Args:
        peak: tells this process's highest memory in GiB.
    """

    def __init__(self, run: Path, team: Team, peak: Callable[[], float]) -> None:
        self.path, self._team, self._peak = run / "speed.jsonl", team, peak
        self._since = self._mark = time.perf_counter()
        self._images, self._loading, self._meeting = 0, 0.0, 0.0

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

    def write(self, step: int) -> None:
        """Write the means over the processes and the highest memory. All processes call it. Raises: PeerLost."""
        now = time.perf_counter()
        seconds = now - self._since
        loading, meeting = self._team.mean([self._loading / seconds, self._meeting / seconds])
        memory = self._team.most(int(self._peak() * 2**20)) / 2**20
        if self._team.main:
            line = {
                "step": step,
                "images_per_second": round(self._images / seconds, 3),
                "peak_gib": round(memory, 3),
                "waiting_for_data": round(loading, 4),
                "waiting_for_others": round(meeting, 4),
                "processes": self._team.world,
            }
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        self._since, self._images, self._loading, self._meeting = now, 0, 0.0, 0.0
