"""Signals that end a training: the current step is finished first, so that its checkpoint can be written."""

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
    """Context in which SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt or Terminated, but not while `busy`.

    A signal that arrives then is raised by `check`; a second one at once. A signal that the caller of the program has
    ignored, as `nohup` does, stays ignored.
    """

    def __init__(self) -> None:
        self.busy = False
        self.asked: int | None = None  # the signal
        self.hurried = False  # a second signal has arrived
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere no handler can be set, and none is called
            for number in _ENDING:
                # None: set by non-Python code, which could not be restored
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
            # a signal to the process group also ends the loader's workers, for which PyTorch would raise within the step
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
        """Raise the exception of a signal that arrived while `busy`."""
        if self.asked is not None:
            raise self.error()

    def error(self) -> BaseException:
        """Return the exception that the signal raises."""
        return KeyboardInterrupt() if self.asked in (signal.SIGINT, None) else Terminated(self.asked)
