"""Lock of a run folder, so that one process at a time trains in it, and a note that names this process.

`.training.lock` is locked through the system, which releases it when the holder ends, however it ends. `.training.json` beside it
has process, host and time for the error message. A note that a killed process left is replaced, with one exception:
on a network disk, whose locks other hosts may not see, the note of another host is respected until a user removes it, or
Slurm says that the holder's job is over. A copied run folder is free: the note contains the lock file's inode number,
which differs in a copy.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dgbench import atomic, slurm
from dgbench.errors import DgbenchError, ResultError

LOCK, NOTE = ".training.lock", ".training.json"
OURS = frozenset({LOCK, NOTE})  # what a folder may hold and still be empty


@contextmanager
def training(run: Path) -> Iterator[bool]:
    """Lock the existing folder `run` against training by other dgbench processes.

    In a distributed training, the first process holds the lock for all; it gets True, the others False.

    Raises: ResultError naming the holder if there is one.
    """
    if int(os.environ.get("RANK") or 0) > 0:
        yield False
        return
    with held(run / LOCK) as free:
        if not free:
            raise ResultError(*_in_use(run, _holder(run)))
        holder = _holder(run)
        if holder is not None and _elsewhere(holder) and not _job_ended(holder):
            raise ResultError(*_in_use(run, holder))
        now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        note = {"pid": os.getpid(), "host": platform.node(), "since": now, "boot": _boot(), "lock": _number(run)}
        job, restarts = slurm.own()
        note |= {"job": job, "restarts": restarts} if job else {}
        atomic.write(run / NOTE, json.dumps(note) + "\n")
        try:
            yield True
        finally:
            with contextlib.suppress(OSError):
                (run / NOTE).unlink()
                if [path.name for path in run.iterdir()] == [LOCK]:  # a run that failed before its first file
                    (run / LOCK).unlink()


def check_free(run: Path) -> None:
    """Raise a ResultError that names the holder if a training holds the folder."""
    if (run / LOCK).exists():
        with training(run):
            pass


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """Hold the lock file `path` (True), unless another process does (False), without waiting."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _in_use(run: Path, holder: dict[str, Any] | None) -> tuple[str, str]:
    if holder is None:
        return f"{run} is being trained in by another process", "wait until it ends, or stop it; or train in another folder"
    pid, host, since = (str(holder[key])[:100] for key in ("pid", "host", "since"))
    message = f"{run} is being trained in by process {pid} on {host} since {since}"
    if _elsewhere(holder):
        return message, f"wait until it ends, or stop it there; if it no longer runs: rm {run / NOTE}"
    return message, f"wait until it ends, or stop it: kill {pid}; or train in another folder"


def _holder(run: Path) -> dict[str, Any] | None:
    """Return the note of the run's holder; None if there is none, or the note came with a copy of the folder."""
    from dgbench import untrusted

    try:
        note = untrusted.read_object(untrusted.read_bytes(run / NOTE, 10_000))
    except (OSError, ValueError):
        return None
    if note is None or not {"pid", "host", "since"} <= note.keys() or note.get("lock") != _number(run):
        return None
    return note


def _elsewhere(holder: dict[str, Any]) -> bool:
    # containers of one machine have different host names, but share its kernel and with it the lock
    return holder["host"] != platform.node() and (not holder.get("boot") or holder["boot"] != _boot())


def _job_ended(holder: dict[str, Any]) -> bool:
    """Return whether the holder ran in a job of Slurm that is over: a killed one on another host leaves its note."""
    job, restarts = holder.get("job"), holder.get("restarts")
    if not isinstance(job, str) or not job.isdecimal() or not isinstance(restarts, int):
        return False
    here, again = slurm.own()
    if job == here:
        return restarts < again  # this job, before it was queued again
    try:
        return slurm.jobs([job])[job].state in ("ended", "gone")
    except DgbenchError:
        return False


def _number(run: Path) -> int:
    return (run / LOCK).stat().st_ino


def _boot() -> str:
    """Return the id of this boot of the machine; empty if the system does not state one."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
