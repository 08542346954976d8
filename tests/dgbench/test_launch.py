"""What launchers set, what is left over from them, and who speaks for several processes."""

from __future__ import annotations

import pytest

from dgbench import launch
from dgbench.errors import DgbenchError, RecipeError, StoppedError, Terminated
from dgbench.launch import Launched

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCHRUN, launch.ASKED, "ACCELERATE_USE_CPU", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NNODES"):
        monkeypatch.delenv(name, raising=False)


def given(monkeypatch: pytest.MonkeyPatch, **values: str | None) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)


def test_without_a_launcher_there_is_one_process() -> None:
    assert launch.launched() == Launched(0, 1, 0, 1)
    assert launch.first()
    assert not launch.several()


def test_a_process_of_torchrun_knows_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, **TORCHRUN)
    assert launch.launched() == Launched(3, 4, 1, 2)
    assert not launch.first()


def test_tasks_of_srun_take_their_index_from_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, **TORCHRUN | {"LOCAL_RANK": None, "LOCAL_WORLD_SIZE": None, "SLURM_LOCALID": "1", "SLURM_NNODES": "2"})
    assert launch.launched() == Launched(3, 4, 1, 2)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK and MASTER_ADDR and MASTER_PORT are not set"),
        ({"RANK": "1"}, "RANK is 1, but WORLD_SIZE is not set"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is `one`, expected a number"),
        (TORCHRUN | {"RANK": "4"}, "RANK 4 of WORLD_SIZE 4 does not fit"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "srun started 8 tasks, but each of them is a process by itself"),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}, "asked for several processes on the CPU, but started one"),
    ],
)
def test_what_is_left_over_or_was_not_started_is_refused(values, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, **values)
    with pytest.raises(DgbenchError, match=words):
        launch.launched()


def test_a_launcher_that_started_another_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, **TORCHRUN)
    assert launch.check(4).world == launch.check(None).world == 4
    with pytest.raises(DgbenchError, match="--gpus 2, but the launcher started 4 processes"):
        launch.check(2)


@pytest.mark.parametrize(
    ("error", "status"),
    [(StoppedError("stopped", code=143), 143), (Terminated(15), 143), (KeyboardInterrupt(), 130), (RecipeError("wrong"), 1)],
)
def test_before_they_have_met_the_first_process_speaks_for_all(error, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.silent(error) is None
    given(monkeypatch, **TORCHRUN)
    assert launch.silent(error) == status
    given(monkeypatch, RANK="0")
    assert launch.silent(error) is None
