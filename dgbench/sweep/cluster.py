"""A sweep's cells as jobs of Slurm, one a cell, through submitit: a job that is preempted or out of time goes on in the queue."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dgbench.errors import DgbenchError
from dgbench.sweep.attempt import Training
from dgbench.sweep.cells import Cell, attempted, note

FOLDER = "jobs"  # in a sweep's folder: submitit's files, a folder for each job
_ALIVE = ("PENDING", "RUNNING", "REQUEUED", "CONFIGURING", "COMPLETING", "SUSPENDED", "RESIZING", "STAGE_OUT")
_UNKNOWN = 600.0  # seconds in which a job that Slurm does not know yet counts as waiting
_POLL = 0.2
_TIMES = 100  # how often a job may run out of time and go on
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


class Job:
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
        return str(self.run)

    def checkpoint(self) -> Any:
        """Return what is queued in place of this job, which submitit asks when it has to make room."""
        from submitit.helpers import DelayedSubmission

        if self._training is not None and not self._training.ended():
            self._training.stop_and_wait()
        return DelayedSubmission(Job(self.run, self.program, self.words))


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
    executor = _executor(folder, dict(options), gpus)
    for cell in cells:
        executor.update_parameters(name=f"dgbench-{cell.name.replace('/', '-')}"[:80])
        try:
            job = executor.submit(Job(cell.run.absolute(), program, words))
        except Exception as error:  # submitit's, and those of sbatch
            text = str(error).strip().splitlines() or [type(error).__name__]
            raise DgbenchError(
                f"{cell.name} was not submitted: {text[-1]}", "see what sbatch says, and call the same sweep again"
            ) from error
        note(cell.run, job=job.job_id)


def alive(cell: Cell, folder: Path) -> tuple[bool | None, str]:
    """Return whether Slurm still has a cell's job, None if it has none; and the state in which it ended, if it did."""
    attempt = attempted(cell.run)
    if attempt is None or not attempt.job:
        return None, ""
    try:
        import submitit

        logging.getLogger("submitit").setLevel(logging.ERROR)  # warns each time that sacct cannot be asked
        state = str(submitit.SlurmJob(folder / FOLDER, attempt.job).state).upper()
    except Exception:  # no submitit here, or no Slurm: what the folder says counts
        return None, ""
    if state == "UNKNOWN":
        return time.time() - attempt.began < _UNKNOWN, ""
    if state.split()[0] in _ALIVE:
        return True, ""
    return False, "" if state.startswith("COMPLETED") else f"job {attempt.job}: {state.lower().replace('_', ' ')}"


def _executor(folder: Path, options: dict[str, str], gpus: int) -> Any:
    try:
        import submitit
    except ImportError:
        raise DgbenchError("submitit is not installed", "pip install -e '.[slurm]'") from None
    cluster = options.pop("cluster", "slurm")
    if cluster not in ("slurm", "local", "debug"):
        raise DgbenchError(f"--slurm cluster={cluster} is unknown", "slurm, local or debug")
    minutes = _minutes(options.pop("time")) if "time" in options else None
    try:
        executor = submitit.AutoExecutor(folder / FOLDER, cluster=cluster, slurm_max_num_timeout=_TIMES)
    except Exception as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise DgbenchError(
            f"Slurm cannot be used here: {text[-1]}", "call it where sbatch and srun are, or use --local N"
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
        raise DgbenchError(f"--slurm time={text} is no time", "at least a minute")
    return total
