"""Signals that end a training: the step in which one arrives is finished first, so that what it was can be kept."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

from dgbench.errors import Terminated

_ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_BURST = 0.5  # seconds in which `timeout`, batch systems and terminals send one signal several times


class Stops:
    """Within, SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt or Terminated in the main thread, but not while `busy`.

    One that arrives then is raised by `check`; a second one does not wait. A signal that the caller of the program has
    ignored, as `nohup` does, stays ignored.
    """

    def __init__(self) -> None:
        self.busy = False
        self.asked: int | None = None  # the signal
        self.hurried = False  # it came a second time
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere no handler can be set, and none is called
            for number in _ENDING:
                # None: set by something that is not Python, which could not be put back
                if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None):
                    self._before[number] = handler
                    signal.signal(number, self._arrived)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _arrived(self, number: int, _: FrameType | None) -> None:
        if self.asked is None:
            self.asked, self._since = number, time.monotonic()
            # sent to a group, it ends the loader's workers as well, whose loss PyTorch would raise amid the step
            if hasattr(signal, "SIGCHLD"):
                self._before.setdefault(signal.SIGCHLD, signal.signal(signal.SIGCHLD, lambda *_: None) or signal.SIG_DFL)
            if self.busy:
                return
        elif time.monotonic() - self._since < _BURST:
            return
        else:
            self.hurried = True
        raise self.error()

    def check(self) -> None:
        """Raise what a signal asked for while `busy`."""
        if self.asked is not None:
            raise self.error()

    def error(self) -> BaseException:
        """Return the exception that the signal raises."""
        return KeyboardInterrupt() if self.asked in (signal.SIGINT, None) else Terminated(self.asked)
