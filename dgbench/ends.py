"""How processes end: the program by a signal, its workers with it, whatever it was that ended it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dgbench.errors import Terminated

_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
_QUIET = 5.0  # seconds after a signal in which more of them mean the same


@contextmanager
def terminable() -> Iterator[list[int]]:
    """Within, SIGTERM and SIGHUP raise `Terminated` in the main thread; the list that is yielded then holds their numbers.

    More of them are ignored for some seconds: `timeout` and batch systems send several at once, and what is being written on
    the way out takes a moment. One that the caller of the program has ignored, as `nohup` does, stays ignored.
    """
    received: list[int] = []
    quiet_until = 0.0

    def end(signum: int, _: FrameType | None) -> None:
        nonlocal quiet_until
        if time.monotonic() < quiet_until:
            return
        quiet_until = time.monotonic() + _QUIET
        received.append(signum)
        raise Terminated(signum)

    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield received
        return
    before = {number: signal.getsignal(number) for number in _ENDING}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, end)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
