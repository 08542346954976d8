"""What Slurm's programs say of jobs: those of now, old ones that only the accounting knows, and none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dgbench import slurm
from dgbench.errors import DgbenchError
from dgbench.slurm import Job


def programs(folder: Path, monkeypatch: pytest.MonkeyPatch, **texts: str) -> None:
    for name, text in texts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_old_jobs_are_looked_up_in_the_accounting_by_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(
        tmp_path,
        monkeypatch,
        squeue="echo '3|RUNNING|None'; echo '4|REQUEUE_HOLD|JobHoldMaxRequeue'",
        sacct=f"echo \"$*\" >> {tmp_path}/asked; echo '1|CANCELLED by 0'; echo '2|COMPLETED'; echo '1.0|RUNNING'",
    )
    assert slurm.jobs(["1", "2", "3", "4", "5"]) == {
        "1": Job("ended", "job 1: cancelled by 0"),
        "2": Job("ended"),
        "3": Job("running"),
        "4": Job("waiting", "in the queue: JobHoldMaxRequeue"),
        "5": Job("gone"),
    }
    (asked,) = (tmp_path / "asked").read_text().splitlines()
    assert asked.endswith("-j 1,2,5")


def test_without_slurm_jobs_cannot_be_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DgbenchError, match="there is no squeue here"):
        slurm.jobs(["1"])


def test_a_squeue_that_does_not_end_counts_as_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(tmp_path, monkeypatch, squeue="exec sleep 30")
    monkeypatch.setattr(slurm, "_SECONDS", 0.2)
    with pytest.raises(DgbenchError, match="Slurm does not answer: squeue"):
        slurm.jobs(["1"])
