"""Signs of life of processes that have met, by which those that wait without an exchange notice that another one is gone."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Any

_BEAT = 2.0  # seconds between two signs
_GONE = 20.0  # seconds without one after which a process counts as gone


class Pulse:
    """A thread that gives signs of life, and sees those of the others."""

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self._store, self._rank = store, rank
        self._seen = {other: (0, time.monotonic()) for other in range(world) if other != rank}
        self._ended = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def gone(self) -> list[int]:
        """Return the processes that gave no sign for a while."""
        now = time.monotonic()
        return [rank for rank, (_, at) in self._seen.items() if now - at > _GONE]

    def end(self) -> None:
        """Give no more signs."""
        self._ended.set()

    def _run(self) -> None:
        with suppress(Exception):  # the process that holds the store has ended: what waits for it fails by itself
            while not self._ended.wait(_BEAT):
                self._store.add(f"alive/{self._rank}", 1)
                for rank, (count, _) in list(self._seen.items()):
                    if (now := self._store.add(f"alive/{rank}", 0)) != count:
                        self._seen[rank] = (now, time.monotonic())
