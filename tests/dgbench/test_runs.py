"""Run folders are made, claimed and found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from records import record
from typer.testing import CliRunner

from dgbench import cli, results, runs
from dgbench.errors import ResultError
from dgbench.runs import claim_run, find_run, find_runs, new_run, seed_run


def started_run(root: Path, name: str, *, checkpoint: bool = False) -> Path:
    run = root / name
    (run / "checkpoint").mkdir(parents=True) if checkpoint else run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("name: x\n")
    return run


def test_new_runs_never_share_a_folder(tmp_path: Path) -> None:
    first, second = new_run(tmp_path, "streets/mfuser"), new_run(tmp_path, "streets/mfuser")
    assert first != second
    assert first.name.endswith("-streets-mfuser")


def test_latest_is_the_newest_run_that_will_do(tmp_path: Path) -> None:
    older = started_run(tmp_path, "20260101T000000Z-a", checkpoint=True)
    newer = started_run(tmp_path, "20260301T000000Z-b")
    (tmp_path / "20260401T000000Z-empty").mkdir()
    assert find_run("latest", tmp_path) == newer
    assert find_run("latest", tmp_path, needs="checkpoint") == older
    named = started_run(tmp_path, "mine")
    assert find_run("latest", tmp_path) == named, "a name without a time counts from the folder's date"


def test_a_run_is_found_by_folder_name_and_record(tmp_path: Path) -> None:
    run = started_run(tmp_path, "20260101T000000Z-a")
    path = results.write(record(), run).path
    for text in (str(run), run.name, str(path)):
        assert find_run(text, tmp_path) == run


def test_a_missing_run_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="no run with recipe.yaml") as caught:
        find_run("latest", tmp_path)
    assert "dgbench train" in (caught.value.hint or "")
    started_run(tmp_path, "20260101T000000Z-streets-mfuser")
    with pytest.raises(ResultError, match="no run `20260101T000000Z-streets-mfusr`") as caught:
        find_run("20260101T000000Z-streets-mfusr", tmp_path)
    assert caught.value.hint == "did you mean `20260101T000000Z-streets-mfuser`?"
    with pytest.raises(ResultError, match="is not a run: it has no recipe.yaml"):
        find_run(str(tmp_path), tmp_path)


def test_a_folder_that_a_kill_left_before_the_first_file_can_be_trained_in(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".recipe.yaml.{dead.pid}.tmp").write_text("name: half a rec")
    assert claim_run(tmp_path) == tmp_path
    assert not list(tmp_path.iterdir())
    (tmp_path / f".recipe.yaml.{os.getpid()}.tmp").touch()  # of a process that is writing
    with pytest.raises(ResultError, match="exists and is not empty"):
        claim_run(tmp_path)


def test_a_chosen_run_folder_must_be_new(tmp_path: Path) -> None:
    assert claim_run(tmp_path / "new").is_dir()
    run = started_run(tmp_path, "old")
    with pytest.raises(ResultError, match="holds a run already") as caught:
        claim_run(run)
    assert caught.value.hint == f"go on with it: dgbench train --resume {run}"
    with pytest.raises(ResultError, match="not empty"):
        claim_run(tmp_path)


def test_runs_of_several_seeds_are_found_by_their_folder_in_the_order_of_seeds(tmp_path: Path) -> None:
    folder = tmp_path / "20260101T000000Z-a"
    made = [started_run(folder, seed_run(folder, seed).name, checkpoint=seed != 2) for seed in (10, 2, 0)]
    assert find_runs(str(folder), tmp_path) == made[::-1]
    assert find_runs(folder.name, tmp_path, needs="checkpoint") == [made[2], made[0]]
    assert find_runs(str(made[1]), tmp_path, needs="checkpoint") == [made[1]], "a run that is named itself is meant"
    alone = started_run(tmp_path, "20250101T000000Z-b")
    assert find_runs(str(tmp_path), tmp_path) == [alone, *made[::-1]]


def test_latest_counts_the_time_of_a_folder_of_seeds_for_its_runs(tmp_path: Path) -> None:
    folder = tmp_path / "20260201T000000Z-a"
    older = started_run(tmp_path, "20260101T000000Z-b")
    made = [started_run(folder, seed_run(folder, seed).name) for seed in (0, 10, 2)]
    assert find_run("latest", tmp_path) == made[1]
    assert find_runs("latest", tmp_path) == [made[0], made[2], made[1]]
    newer = started_run(tmp_path, "20260301T000000Z-c")
    assert find_runs("latest", tmp_path) == [newer]
    assert older != newer


def test_a_result_does_not_replace_a_file_of_a_run(tmp_path: Path) -> None:
    run = started_run(tmp_path, "a", checkpoint=True)
    own = [run / "recipe.yaml", run / "record-1-eval.json", run / "confusion-1.npz", run / "checkpoint/step-000001/model.json"]
    others = [run / "board.json", tmp_path / "recipe.yaml", tmp_path / "notes/record-of-mine.json"]
    for path in (*own[1:], *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    assert [runs.belongs_to_run(path) for path in (*own, *others)] == [True] * 4 + [False] * 3
    for path in own:
        before = path.read_bytes()
        done = CliRunner().invoke(cli.app, ["methods", "--out", str(path), "--format", "json"], prog_name="dgbench")
        assert done.exit_code == 2
        assert f"{path} is a file of a run, which the result would replace" in done.stderr
        assert path.read_bytes() == before
    assert CliRunner().invoke(cli.app, ["methods", "--out", str(others[0])], prog_name="dgbench").exit_code == 0
