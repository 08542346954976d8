"""One attempt at a cell: `train --resume` in a process of its own, whose last words are kept if it fails."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from dgbench import locks
from dgbench.errors import ResultError
from dgbench.sweep.cells import ATTEMPT_LOCK, LOG, note

# exit statuses of a training that was told to stop, and can go on; negative: before it had begun to heed signals
_STOPPED = (130, 143, 129, -2, -15, -1)


class Training:
    """A training that goes on in a run folder, or begins there."""

    def __init__(
        self, run: Path, program: Sequence[str], words: Sequence[str], *, job: str = "", env: Mapping[str, str] | None = None
    ) -> None:
        """Start it.

        Args:
            program: the words that start dgbench.    words: further words of `train`.    env: further variables.

        Raises: ResultError if another process trains or scores it.
        """
        # a training holds its folder until it scores, this attempt until both have ended
        self._lock = ExitStack()
        if not self._lock.enter_context(locks.held(run / ATTEMPT_LOCK)):
            raise ResultError(f"{run} is being trained or scored by another sweep", "wait until it ends, or stop that one")
        note(run, job=job)
        self.run = run
        command = [*program, "train", "--resume", str(run), "--quiet", *words]
        # a cluster's warning signal goes to all processes of a job: this one passes on what its training is to know
        before = signal.signal(signal.SIGUSR2, signal.SIG_IGN) if _in_main_thread() else None
        try:
            with (run / LOG).open("ab") as log:
                self._child = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **(env or {})}, process_group=0
                )
        finally:
            if before is not None:
                signal.signal(signal.SIGUSR2, before)

    def ended(self) -> bool:
        """Return whether it has ended."""
        return self._child.poll() is not None

    @property
    def stopped(self) -> bool:
        """Whether it was told to stop, by whomever, and has ended."""
        return self._child.poll() in _STOPPED

    def stop(self) -> None:
        """Tell it to write a checkpoint and end."""
        if not self.ended():
            self._child.send_signal(signal.SIGTERM)

    def stop_and_wait(self) -> None:
        """Stop it from within a signal's handler, which may have come while `ended` was asked."""
        os.kill(self._child.pid, signal.SIGTERM)
        while os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            time.sleep(0.1)

    def kill(self) -> None:
        """End it at once."""
        self._child.kill()

    def outcome(self) -> str:
        """Return why it failed, which is noted; nothing if it did not, or was told to stop."""
        code = self._child.wait()
        self._lock.close()
        if code == 0 or code in _STOPPED:
            return ""
        name = signal.Signals(-code).name if code < 0 else ""
        reason = f"killed by {name}" if name else _last_words(self.run / LOG) or f"exit status {code}"
        note(self.run, reason=reason)
        return reason


def _in_main_thread() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()


def _last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-200:]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or [line for line in lines if line.strip()] or [""])[-1][:300]
