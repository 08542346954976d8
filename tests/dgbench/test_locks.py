"""Two at once: a run folder is trained in by one process, and whoever comes second is told by whom."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dgbench import locks
from dgbench.cli import app
from dgbench.errors import ResultError, StoppedError, Terminated
from dgbench.recipe import dump, load_recipe

ROOT = Path(__file__).parents[2]
HOLD = """import pathlib, sys, time
from dgbench import locks
with locks.training(pathlib.Path(sys.argv[1])):
    print(1, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that was begun."""
    dump(load_recipe("streets/source-only", ["train.steps=2"]), tmp_path / "run" / "recipe.yaml")
    return tmp_path / "run"


@pytest.fixture
def holder(run: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that trains in it, as far as the lock goes."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "1\n"
    yield child
    child.kill()
    child.wait()


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("arguments", [["--resume"], ["streets/source-only", "--out"]])
def test_a_second_training_in_a_folder_is_told_of_the_first_and_changes_nothing(
    arguments: list[str], run: Path, holder: subprocess.Popen[str]
) -> None:
    before = files(run)
    done = CliRunner().invoke(app, ["train", *arguments, str(run)])
    assert done.exit_code == 1
    said = " ".join(done.stderr.split())
    assert re.search(rf"being trained in by process {holder.pid} on \S+ since 20\S+Z", said)
    assert f"kill {holder.pid}" in said
    assert files(run) == before


def test_the_lock_of_a_holder_that_was_killed_is_taken_over(run: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (run / locks.NOTE).is_file()
    locks.check_free(run)
    with locks.training(run) as first:
        assert first
        assert json.loads((run / locks.NOTE).read_text())["pid"] == os.getpid()
    assert not (run / locks.NOTE).exists()


def test_a_lock_is_let_go_of_whatever_ends_the_training(run: Path) -> None:
    for end in (KeyboardInterrupt(), Terminated(15), MemoryError()):
        with pytest.raises(type(end)), locks.training(run):
            raise end
        locks.check_free(run)


def from_another_host(run: Path) -> None:
    with locks.training(run):
        note = json.loads((run / locks.NOTE).read_text())
    (run / locks.NOTE).write_text(json.dumps(note | {"host": "elsewhere", "boot": "another", "pid": 1}))


def test_the_note_of_another_host_is_respected_until_it_is_removed(run: Path) -> None:
    from_another_host(run)
    with pytest.raises(ResultError, match="by process 1 on elsewhere since") as caught, locks.training(run):
        pass
    assert caught.value.hint is not None
    assert caught.value.hint.endswith(f"rm {run / locks.NOTE}")
    assert (run / locks.NOTE).is_file()
    (run / locks.NOTE).unlink()
    with locks.training(run):
        pass


@pytest.mark.parametrize(
    ("state", "own", "free"),
    [
        ("7|NODE_FAIL|None", {}, True),
        ("7|RUNNING|None", {}, False),
        ("7|PENDING|Resources", {}, False),
        ("", {}, True),
        ("7|RUNNING|None", {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, True),
        ("7|RUNNING|None", {"SLURM_JOB_ID": "7"}, False),
    ],
)
def test_the_note_of_another_host_counts_no_longer_when_its_job_is_over(
    state: str, own: dict[str, str], free: bool, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    from_another_host(run)
    monkeypatch.delenv("SLURM_JOB_ID")
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\necho '{state}'\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with contextlib.nullcontext() if free else pytest.raises(ResultError, match="on elsewhere"), locks.training(run):
        pass


def test_a_copy_of_a_run_that_was_being_trained_is_free(run: Path, tmp_path: Path) -> None:
    from_another_host(run)
    shutil.copytree(run, tmp_path / "copy")
    with locks.training(tmp_path / "copy"):
        pass


@pytest.mark.parametrize("text", ["", "[]", "{", '{"pid": 1}', "\x00"])
def test_a_damaged_note_does_not_lock_anything(text: str, run: Path) -> None:
    (run / locks.NOTE).write_text(text)
    with locks.training(run):
        pass


def test_a_folder_that_nothing_was_written_into_is_left_empty(tmp_path: Path) -> None:
    with locks.training(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_the_further_processes_of_a_distributed_training_share_the_lock(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locks.training(run):
        monkeypatch.setenv("RANK", "1")
        with locks.training(run) as first:
            assert not first


def test_a_stopped_command_exits_as_shells_expect() -> None:
    from dgbench.cli.trainings import stopped

    assert [stopped(stop, "go on").code for stop in (KeyboardInterrupt(), Terminated(15), Terminated(1))] == [130, 143, 129]
    assert stopped(Terminated(15), "go on with: x").message == "stopped by SIGTERM; go on with: x"
    assert isinstance(stopped(Terminated(15), ""), StoppedError)
