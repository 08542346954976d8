"""What has become of jobs of Slurm: `squeue` knows those of now and of the last minutes, `sacct` older ones, if it is set up."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from dgbench.errors import DgbenchError

_WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
_RUNNING = {"RUNNING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING", "STAGE_OUT"}
_SECONDS = 60.0  # a controller that is busy or restarts lets its callers wait
_AT_ONCE = 500  # jobs named in one call


@dataclass(frozen=True, slots=True)
class Job:
    """The state of a job, and why it waits or how it ended, in words.

    `ending`: it was cancelled or is over, but its processes may not be; `gone`: Slurm knows nothing of it.
    """

    state: Literal["waiting", "running", "ending", "ended", "gone"]
    reason: str = ""


def jobs(ids: Collection[str]) -> dict[str, Job]:
    """Return the states of jobs by their numbers.

    Raises: DgbenchError if Slurm is not here, or does not answer.
    """
    if shutil.which("squeue") is None:
        raise DgbenchError("there is no squeue here, which knows the jobs", "call it where Slurm's programs are")
    there: dict[str, Job] = {}
    wanted = sorted(set(ids))
    for first in range(0, len(wanted), _AT_ONCE):
        there |= _asked(wanted[first : first + _AT_ONCE])
    return there


def own() -> tuple[str, int]:
    """Return the job in which this process runs, empty if in none, and how often it was queued again."""
    restarts = os.environ.get("SLURM_RESTART_COUNT") or "0"
    return os.environ.get("SLURM_JOB_ID") or "", int(restarts) if restarts.isdecimal() else 0


def _asked(ids: list[str]) -> dict[str, Job]:
    named = ",".join(ids)
    done = _run(["squeue", "--noheader", "--states=all", f"--jobs={named}", "--format=%A|%T|%r"])
    if done.returncode and "invalid job id" not in done.stderr.lower():  # so it says if it knows none of them
        words = done.stderr.strip().splitlines() or [f"squeue ended with {done.returncode}"]
        raise DgbenchError(f"Slurm does not answer: {words[-1]}", "call again when `squeue` does")
    there = _read(done.stdout, ids)
    if (old := [job for job in ids if job not in there]) and shutil.which("sacct") is not None:
        named = ",".join(old)
        # without accounting it says so, and knows nothing
        there |= _read(_run(["sacct", "--noheader", "--allocations", "-P", "-o", "JobID,State", "-j", named]).stdout, old)
    return {job: there.get(job, Job("gone")) for job in ids}


def _read(text: str, ids: list[str]) -> dict[str, Job]:
    found = {}
    for line in text.splitlines():
        job, _, rest = line.partition("|")
        state, _, why = (part.strip() for part in rest.partition("|"))
        if job.strip() not in ids or not state:
            continue
        kind = state.split()[0].rstrip("+")
        if kind in _WAITING:
            found[job.strip()] = Job("waiting", "" if why in ("", "None") else f"in the queue: {why}")
        elif kind in _RUNNING:
            found[job.strip()] = Job("running")
        elif kind == "COMPLETING":
            found[job.strip()] = Job("ending")
        else:
            how = "" if kind == "COMPLETED" else f"job {job.strip()}: {state.lower().replace('_', ' ')}"
            found[job.strip()] = Job("ended", how)
    return found


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DgbenchError(f"Slurm does not answer: {command[0]}: {error}", "call again when `squeue` does") from None
