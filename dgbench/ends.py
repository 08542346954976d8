"""Termination of processes: of the program by a signal, and of its workers whenever the program ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from dgbench.errors import Terminated

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
# exit codes of a loader's worker that could not pass on a batch: PyTorch's error does not give any other reason
NO_SHARED_MEMORY, NO_FILES = 81, 82
_QUIET = 5.0  # seconds after a signal in which further signals are ignored


@contextmanager
def terminable() -> Iterator[list[int]]:
    """Make SIGTERM and SIGHUP raise `Terminated` in the main thread, and append their numbers to the list that is yielded.

    Further signals are ignored for some seconds: `timeout` and batch systems send several at once, and writing a checkpoint
    takes a moment. A signal that the program's caller ignores, as `nohup` does, stays ignored.
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


def follow(*lines: Connection) -> None:
    """End this process, started by `multiprocessing`, when its parent ends or the other end of a pipe is closed.

    Signals of a terminal or batch system to the whole process group are left to the parent, which ends its workers in order.
    """
    from multiprocessing import parent_process

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a fork has the parent's handler
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    parent = parent_process()
    waited = [*lines, *([] if parent is None else [parent.sentinel])]
    threading.Thread(target=_end_after, args=(waited,), daemon=True).start()


def _end_after(waited: list[Connection | int]) -> None:
    from multiprocessing.connection import wait

    wait(waited)
    os._exit(1)


@contextmanager
def unheard_interrupts() -> Iterator[None]:
    """Start processes within that ignore Ctrl-C; this process handles it at the end."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
