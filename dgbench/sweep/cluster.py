"""A sweep's cells as jobs of Slurm, one a cell, through submitit: a job that is preempted or out of time goes on in the queue."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dgbench import slurm
from dgbench.errors import DgbenchError
from dgbench.slurm import Job
from dgbench.sweep.attempt import Training
from dgbench.sweep.cells import Cell, attempted, note

FOLDER = "jobs"  # in a sweep's folder: submitit's files, a folder for each job
_CLUSTERS = ("slurm", "local", "debug")
_POLL = 0.2
_UNKNOWN = 60.0  # seconds in which a job that Slurm does not know counts as waiting: some sites let squeue answer from a cache
_TIMES = 100  # how often a job may run out of time and go on
_SHORTEST = 3  # minutes: submitit lets a job make room a minute and a half before its end
# what a sweep or submitit says itself: one task for each cell, which is queued again, and whose logs are found
_TAKEN = {
    *("array", "chdir", "error", "job_name", "nodes", "no_requeue", "ntasks", "ntasks_per_node", "open_mode", "output"),
    *("parsable", "requeue", "signal", "tasks_per_node", "test_only", "wait", "wrap"),
}
_GPUS = {"gpus", "gpus_per_node", "gpus_per_task", "gpus_per_socket"}
# options of sbatch that submitit has under a name of its own
_OWN = {
    "mem",
    "partition",
    "qos",
    "account",
    "constraint",
    "exclude",
    "nodelist",
    "gres",
    "comment",
    "cpus_per_task",
    "exclusive",
}


class Work:
    """What a job does: train and score a cell. To make room, it lets the training write a checkpoint, and is queued again."""

    def __init__(self, run: Path, program: Sequence[str], words: Sequence[str]) -> None:
        self.run, self.program, self.words = run, list(program), list(words)
        self._training: Training | None = None

    def __call__(self) -> str:
        """Carry out.

        Raises: RuntimeError saying why it failed.
        """
        self._training = Training(self.run, self.program, self.words)
        try:
            while not self._training.ended():
                time.sleep(_POLL)
        except BaseException:  # the job is cancelled
            self._training.stop()
            raise
        if reason := self._training.outcome():
            raise RuntimeError(reason)
        if self._training.stopped:
            self._make_room()
        return str(self.run)

    def _make_room(self) -> None:
        """Be queued again if the training was told to stop by Slurm, which lets the job go on: it is to make room.

        A preemption with a time of grace sends SIGTERM to all processes of a job, and submitit leaves that to them. Of a job
        that was cancelled, or queued again by somebody else, Slurm no longer says that it runs.

        Raises: RuntimeError if Slurm does not answer.
        """
        job, _ = slurm.own()
        if not job:
            return
        try:
            runs = slurm.jobs([job])[job].state == "running"
        except DgbenchError as error:
            raise RuntimeError(f"told to stop; {error.message}") from None
        if runs:
            signal.raise_signal(getattr(signal, f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"))  # to submitit

    def checkpoint(self) -> Any:
        """Return what is queued in place of this job, which submitit asks when it has to make room."""
        from submitit.helpers import DelayedSubmission

        if self._training is not None and not self._training.ended():
            self._training.stop_and_wait()
        return DelayedSubmission(Work(self.run, self.program, self.words))


def settings_of(texts: Sequence[str]) -> dict[str, str]:
    """Return sbatch's options from texts such as `partition=gpu,time=4:00:00`.

    Raises: DgbenchError.
    """
    found: dict[str, str] = {}
    for text in (part for given in texts for part in re.split(r",(?=[A-Za-z_-]+=)", given)):
        key, equals, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key or not value.strip():
            raise DgbenchError(f"--slurm {text} is no option of sbatch with a value", "as in --slurm partition=gpu,time=4:00:00")
        if key in _TAKEN | _GPUS:
            raise DgbenchError(
                f"--slurm {key.replace('_', '-')}={value.strip()} is said by the sweep itself, which has one task in each job",
                "dgbench sweep --gpus N takes N GPUs for each" if key in _GPUS else "leave it out",
            )
        if key == "time" and _minutes(value.strip()) < _SHORTEST:
            raise DgbenchError(
                f"--slurm time={value.strip()} is too short: a job makes room a minute and a half before its end",
                f"at least {_SHORTEST} minutes; the steps between must be worth a start",
            )
        if key == "cluster" and value.strip() not in _CLUSTERS:
            raise DgbenchError(f"--slurm cluster={value.strip()} is unknown", "slurm, local or debug")
        found[key] = value.strip()
    return found


def submit(
    cells: Sequence[Cell], folder: Path, program: Sequence[str], words: Sequence[str], options: dict[str, str], gpus: int
) -> None:
    """Submit a job for each cell, and note its id with the cell.

    Args:
        options: of sbatch; `cluster` (`local` or `debug`) takes submitit's executor of that name instead of Slurm.
        gpus: of each job, on one machine; 0 for none.

    Raises: DgbenchError if submitit is missing, or Slurm refuses.
    """
    kind = options.get("cluster", "slurm")
    executor = _executor(folder, dict(options), gpus)
    for cell in cells:
        executor.update_parameters(name=f"dgbench-{cell.name.replace('/', '-')}"[:80])
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # submitit repeats there what sbatch said
                job = executor.submit(Work(cell.run.absolute(), program, words))
        except Exception as error:  # submitit's, and those of sbatch
            raise DgbenchError(
                f"{cell.name} was not submitted: {_words(error)}",
                "--slurm takes the long options of `man sbatch` without the dashes; correct it, and call the same sweep again",
            ) from error
        note(cell.run, job=job.job_id if kind == "slurm" else f"{kind}-{job.job_id}")  # theirs are no numbers of Slurm


def jobs_of(cells: Sequence[Cell]) -> dict[Path, Job]:
    """Return what Slurm says of the last job of each cell that has one, by its run folder.

    Raises: DgbenchError if Slurm is not here, or does not answer.
    """
    last = {cell.run: attempt for cell in cells if (attempt := attempted(cell.run)) is not None and attempt.job.isdecimal()}
    found = slurm.jobs({attempt.job for attempt in last.values()}) if last else {}
    now = time.time()
    return {
        run: Job("waiting") if found[attempt.job].state == "gone" and now - attempt.began < _UNKNOWN else found[attempt.job]
        for run, attempt in last.items()
    }


def _executor(folder: Path, options: dict[str, str], gpus: int) -> Any:
    try:
        import submitit
    except ImportError:
        raise DgbenchError("submitit is not installed", "pip install -e '.[slurm]'") from None
    cluster = options.pop("cluster", "slurm")
    minutes = _minutes(options.pop("time")) if "time" in options else None
    try:
        executor = submitit.AutoExecutor(folder / FOLDER, cluster=cluster, slurm_max_num_timeout=_TIMES)
    except Exception as error:
        raise DgbenchError(
            f"Slurm cannot be used here: {_words(error)}", "call it where sbatch and srun are, or use --local N"
        ) from error
    own = {f"slurm_{key}": value for key, value in options.items() if key in _OWN}
    rest = {key.replace("_", "-"): value for key, value in options.items() if key not in _OWN}
    executor.update_parameters(
        nodes=1,
        tasks_per_node=1,
        timeout_min=minutes if minutes is not None else 24 * 60,
        **({"gpus_per_node": gpus} if gpus else {}),
        **(own if cluster == "slurm" else {}),
        **({"slurm_additional_parameters": {"requeue": True, **rest}} if cluster == "slurm" else {}),
    )
    return executor


def _minutes(text: str) -> int:
    """Return the minutes of a time as sbatch writes it: `90`, `4:00:00`, `1-12`, `1-12:30`.

    Raises: DgbenchError.
    """
    form = re.fullmatch(r"(?:(\d{1,3})-)?(\d{1,5})(?::(\d{1,2}))?(?::(\d{1,2}))?", text)
    if form is None:
        raise DgbenchError(f"--slurm time={text} is no time", "minutes, hours:minutes:seconds or days-hours:minutes:seconds")
    days, first, second, third = (int(part) if part else None for part in form.groups())
    if days is not None:
        total = 60 * (24 * days + (first or 0)) + (second or 0) + (1 if third else 0)
    elif third is not None:
        total = 60 * (first or 0) + (second or 0) + (1 if third else 0)
    else:
        total = (first or 0) + (1 if second else 0)
    if not total:
        raise DgbenchError(f"--slurm time={text} is no time", f"at least {_SHORTEST} minutes")
    return total


def _words(error: Exception) -> str:
    """Return what sbatch said was wrong, in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    own = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in lines if line.startswith("sbatch: ")]
    return "; ".join(own) or lines[-1]
