"""Stop an action before each of its changes of the disk, and in the middle of what it writes, as a kill would.

A crash test has two lines to write: what to do, and what must hold when it is done again after a kill anywhere.

    for stop in kills.stops(action, folder):        # every moment at which the disk holds something else
        kills.kill(action_in_a_fresh_folder, folder, stop)
        action()                                    # goes on, or begins anew
        assert ...

The action runs in a fork of the test's process, so that nothing is imported twice; there it ends by `os._exit` at the k-th
change: no `finally`, no `atexit`, no buffer is flushed. Changes are the openings for writing, renames, removals and new or
removed folders below `folder`, as Python's audit events tell them, whoever asks for them (`pathlib`, `shutil`, `zipfile`,
NumPy ...). `kill_at` stops at the first change of what has a given name. A stop is

    before  the change has not happened. After a change is before the next one, or the end: nothing is in between.
    empty   a file has been opened for writing, and holds nothing yet.
    half    a file has been opened for writing, and holds half of what it holds at the next change.

What compiled code opens by itself (safetensors) is seen by the changes around it. Changes made by other processes are not
counted, so let the action work in one (no workers); `kill_after` stops any action, at a moment in time.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

KILLED = 9  # exit status of an action that was stopped
_FAILED = 70  # of one that raised
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}


@dataclass(frozen=True, slots=True)
class Stop:
    """A moment: at change number `k`, `before` it or with the file it opens `empty` or `half` written."""

    k: int
    when: Literal["before", "empty", "half"]
    what: str  # the change, for the messages of tests

    def __str__(self) -> str:
        return f"{self.when} {self.what} (change {self.k})"


@dataclass(frozen=True, slots=True)
class _Change:
    event: str
    path: str
    flags: int = 0

    def __str__(self) -> str:
        return f"{self.event} {Path(self.path).name}"


class _Watch:
    """The audit hook of a fork: it lives as long as the process, as audit hooks do."""

    def __init__(self, folder: Path, stop: Stop | None) -> None:
        self.folder, self.stop = os.path.realpath(folder), stop
        self.seen: list[_Change] = []
        self.busy = False

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.busy or event not in _EVENTS:
            return
        self.busy = True
        try:
            if change := self._change(event, arguments):
                self.at(change)
        finally:
            self.busy = False

    def _change(self, event: str, arguments: tuple[object, ...]) -> _Change | None:
        path = arguments[0]
        if not isinstance(path, str | bytes | os.PathLike):
            return None  # a descriptor
        flags = arguments[2] if event == "open" else 0
        if event == "open" and not (isinstance(flags, int) and flags & _WRITES):
            return None
        text = os.fsdecode(path)
        folder = next((a for a in reversed(arguments) if isinstance(a, int) and a >= 0), None) if event != "open" else None
        if not os.path.isabs(text) and folder is not None and event in ("os.remove", "os.rmdir"):
            text = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), text)  # as `shutil.rmtree` goes about it
        text = os.path.join(os.path.realpath(os.path.dirname(text)), os.path.basename(text))
        within = text == self.folder or text.startswith(self.folder + os.sep)
        return _Change(event, text, flags if isinstance(flags, int) else 0) if within else None

    def at(self, change: _Change | None) -> None:
        """Note a change that is about to happen, None for the end; end the process if this is the moment."""
        stop, number = self.stop, len(self.seen)
        if stop is not None and stop.when == "before" and stop.k == number:
            os._exit(KILLED)
        if stop is not None and stop.when == "half" and stop.k == number - 1:
            path = self.seen[stop.k].path
            if os.path.isfile(path):
                os.truncate(path, os.path.getsize(path) // 2)
            os._exit(KILLED)
        if stop is not None and stop.when == "empty" and stop.k == number and change is not None:
            os.close(os.open(change.path, change.flags, 0o666))
            os._exit(KILLED)
        if change is not None:
            self.seen.append(change)


class _Named(_Watch):
    """An audit hook that ends the fork before the first change of what has this name."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(folder, None)
        self.name = name

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        # of every thread: to look changes nothing, so nothing is to be kept out meanwhile
        if event in _EVENTS and (change := self._change(event, arguments)) and Path(change.path).name == self.name:
            os._exit(KILLED)


def stops(action: Callable[[], object], folder: Path) -> list[Stop]:
    """Run `action` to its end in a fork, and return every moment at which it can be stopped, in their order.

    Raises: AssertionError if it fails.
    """
    read, write = os.pipe()

    def watched() -> int:
        os.close(read)
        watch = _Watch(folder, None)
        sys.addaudithook(watch)
        action()
        watch.busy = True
        with os.fdopen(write, "wb") as pipe:
            pickle.dump(watch.seen, pipe)
        return 0

    child = _fork(watched)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    status = _ended(child)
    assert status == 0, f"the action ended with {status}"
    found = []
    for k, change in enumerate(pickle.loads(data)):  # our own fork wrote it
        found.append(Stop(k, "before", str(change)))
        if change.event == "open":
            found += [Stop(k, "empty", str(change)), Stop(k, "half", str(change))]
    return found


def kill(action: Callable[[], object], folder: Path, stop: Stop) -> bool:
    """Run `action` in a fork that ends at `stop`; return whether it got there and did not end before.

    Raises: AssertionError if it fails.
    """

    def watched() -> int:
        watch = _Watch(folder, stop)
        sys.addaudithook(watch)
        action()
        watch.busy = True
        watch.at(None)
        return 0

    status = _ended(_fork(watched))
    assert status in (0, KILLED), f"the action ended with {status}, to be stopped {stop}"
    return status == KILLED


def kill_at(action: Callable[[], object], folder: Path, name: str) -> None:
    """Run `action` in a fork that ends at its first change of a file or folder of this name, in whatever thread.

    Raises: AssertionError if it ends before, or fails.
    """

    def watched() -> int:
        sys.addaudithook(_Named(folder, name))
        action()
        return 0

    status = _ended(_fork(watched))
    assert status == KILLED, f"the action ended with {status}, to be stopped at a change of {name}"


def kill_after(action: Callable[[], object], seconds: float, how: signal.Signals = signal.SIGKILL) -> int:
    """Run `action` in a fork, send it a signal after so many seconds, and return its exit status, negative for a signal."""

    def run() -> int:
        action()
        return 0

    child = _fork(run)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, how)
    return _ended(child)


def kill_when(action: Callable[[], object], ready: Callable[[], bool], seconds: float = 120) -> int:
    """Run `action` in a fork, end it by SIGKILL as soon as `ready` says so, and return its exit status, negative for a signal.

    Raises: AssertionError if that has not come after so many seconds.
    """

    def run() -> int:
        action()
        return 0

    child = _fork(run)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if ready():
            os.kill(child, signal.SIGKILL)
            return _ended(child)
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    _ended(child)
    raise AssertionError(f"the moment of the kill had not come after {seconds} s")


def duration(action: Callable[[], object]) -> float:
    """Run `action` to its end in a fork, and return how many seconds that takes on this machine.

    Raises: AssertionError if it fails.
    """
    begun = time.monotonic()
    status = kill_after(action, 120)
    assert status == 0, f"the action ended with {status}"
    return time.monotonic() - begun


def _fork(run: Callable[[], int]) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: the fork takes none of them along
        child = os.fork()
    if child:
        return child
    status = _FAILED
    try:
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)  # a pool of threads does not survive a fork
        status = run()
    except BaseException:
        traceback.print_exc()
    finally:
        # never back into the test
        sys.stderr.flush()
        os._exit(status)
    raise AssertionError


def _ended(child: int, seconds: float = 120) -> int:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"the action was still running after {seconds} s")
