"""Detection of a training or scoring that hangs: no step for some minutes, and which process the others wait for."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any, Literal, Self

from dgbench.engine.team import FAILED, Team, hang_seconds
from dgbench.launch import LOST

Phase = Literal["loading its batch", "computing", "waiting for the others", "writing"]
_ORDER: tuple[Phase, ...] = ("loading its batch", "computing", "waiting for the others", "writing")
_EXCHANGES = ("torch/distributed/distributed_c10d.py", "torch/autograd/graph.py", "torch/autograd/__init__.py")
_BEAT = 2.0  # seconds between two signs of life
_NOTICE = 15.0  # seconds in which a process notices by itself that another one has ended
_SILENT = 15.0  # seconds without a sign of life after which a process counts as stopped


class Watch:
    """A thread that ends this process if no step is finished within the limit of `hang_seconds`; alone, it does nothing.

    Every process tells the others where it is. The first that finds out says which process is behind, and all end.
    """

    def __init__(self, team: Team, what: str) -> None:
        self._team, self._what = team, what
        self._at: tuple[int, Phase] = (0, "computing")
        self._since = time.monotonic()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._asking: float | None = None  # since when the store, which holds all words, is being asked

    def __enter__(self) -> Self:
        if self._team.world > 1:
            self._since = time.monotonic()
            threading.Thread(target=self._guard, args=(hang_seconds(),), daemon=True).start()
            self._thread = threading.Thread(target=self._run, args=(self._team.own_store(), hang_seconds()), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(_BEAT)

    def at(self, step: int, phase: Phase) -> None:
        """Note where this process is."""
        if step != self._at[0]:
            self._since = time.monotonic()
        self._at = (step, phase)

    def pause(self) -> None:
        """Begin to count anew: other work than steps has been done, or begins."""
        self._since = time.monotonic()

    def _run(self, store: Any, limit: float) -> None:
        beat, seen = 0, dict.fromkeys(range(self._team.world), ("", time.monotonic()))
        while not self._ended.wait(min(_BEAT, limit / 4)):
            beat += 1
            self._asking = time.monotonic()
            step, phase = self._at
            if phase == "computing" and _exchanges():
                phase = "waiting for the others"
            try:
                if store.check([FAILED]):
                    break
                store.set(f"at/{self._team.rank}", f"{step}/{_ORDER.index(phase)}/{beat}")
                for rank in range(self._team.world):
                    key = f"at/{rank}"
                    said = store.get(key).decode() if store.check([key]) else ""
                    if said != seen[rank][0]:
                        seen[rank] = (said, time.monotonic())
            except Exception:  # the process that holds the store has ended
                break
            if time.monotonic() - self._since > limit and not self._ended.is_set():
                self._end(_behind(seen, min(_SILENT, limit)), limit)
            self._asking = None
        self._asking = None
        # another process has ended, which this one may not notice: it may wait for it, or for something else
        if not self._ended.wait(_NOTICE):
            os._exit(LOST)

    def _guard(self, limit: float) -> None:
        """End this process if the store does not answer: whoever holds it is stopped, or its machine is gone without a word."""
        silent = min(_SILENT, limit)
        while not self._ended.wait(min(_BEAT, limit / 4)):
            asking, now = self._asking, time.monotonic()
            if asking is None or now - asking <= silent or now - self._since <= limit:
                continue
            if self._team.speaks_without_store():  # by whom it is said cannot be settled through the store
                self._say(f"{self._team.holder()} gave no sign of life for {now - asking:.0f} s", limit)
                os._exit(1)
            os._exit(LOST)

    def _end(self, who: str, limit: float) -> None:
        if self._team.claim():
            self._say(who, limit)
            os._exit(1)
        os._exit(LOST)

    def _say(self, who: str, limit: float) -> None:
        self._team.tell(
            f"{self._what}: no step for {limit / 60:g} minutes: {who}",
            "go on with the same eval, or with train --resume; DGBENCH_HANG_MINUTES sets the minutes",
        )
        sys.stderr.flush()


def _exchanges() -> bool:
    """Return whether the main thread is within an exchange with the others, or in a backward pass, which has them."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if frame.f_code.co_filename.endswith(_EXCHANGES):
            return True
        frame = frame.f_back
    return False


def _behind(seen: dict[int, tuple[str, float]], silent: float) -> str:
    """Say which process the others wait for."""
    now = time.monotonic()
    if stopped := [rank for rank, (_, at) in seen.items() if now - at > silent]:
        return f"{_ranks(stopped)} gave no sign of life for {now - min(seen[rank][1] for rank in stopped):.0f} s"
    places = {rank: tuple(map(int, said.split("/")[:2])) for rank, (said, _) in seen.items() if said}
    if len(places) < len(seen):
        return f"{_ranks([rank for rank in seen if rank not in places])} never began"
    step, phase = min(places.values())
    last = [rank for rank, place in places.items() if place == (step, phase)]
    return f"{_ranks(last)} {'is' if len(last) == 1 else 'are'} at step {step + 1}, {_ORDER[phase]}"


def _ranks(ranks: list[int]) -> str:
    return f"process {ranks[0]}" if len(ranks) == 1 else f"processes {', '.join(map(str, ranks))}"
