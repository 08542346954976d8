"""A training killed at any change of the disk, and gone on with, ends as the one that was never stopped."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import kills
import pytest
import torch

from dgbench import results
from dgbench.engine import checkpoints
from dgbench.engine.train import train
from dgbench.progress import Silent
from dgbench.recipe import load_recipe

SETTINGS = [
    "data.size=[64, 128]",
    "data.crop=[64, 64]",
    "data.train_images=4",
    "data.val_images=2",
    "train.batch_size=2",
    "train.log_every=1",
    "train.steps=2",
    "train.checkpoint_every=1",
    "train.workers=0",
]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a fork")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    os.environ["DGBENCH_CACHE"] = str(cache)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a fork: the same bits need as many
    run = tmp_path_factory.mktemp("runs") / "whole"
    train(load_recipe("streets/source-only", SETTINGS), run, progress=Silent(), device="cpu")
    yield run
    torch.set_num_threads(threads)
    del os.environ["DGBENCH_CACHE"]


def check(whole: Path, run: Path, every: int) -> None:
    recipe = load_recipe("streets/source-only", SETTINGS)

    def fit() -> None:
        # as the command does: a folder without a recipe is no run yet
        train(recipe, run, progress=Silent(), device="cpu", resume=(run / "recipe.yaml").is_file())

    found = kills.stops(fit, run)
    assert len(found) > 40
    for stop in found[::every]:
        shutil.rmtree(run, ignore_errors=True)
        assert kills.kill(fit, run, stop), stop
        fit()
        assert checkpoints.sha256(checkpoints.folder_of(run)) == checkpoints.sha256(checkpoints.folder_of(whole)), stop
        assert (run / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes(), stop
        (record,) = checkpoints.trainings(run)
        assert results.read(record.path).checkpoint == checkpoints.sha256(checkpoints.folder_of(run)), stop
        left = [path.name for path in run.rglob("*") if path.name.startswith(".")]
        assert not left, (stop, left)
        assert [path.name for path in (run / "checkpoint").iterdir()] == ["step-000002"], stop


def test_a_training_killed_at_some_changes_of_the_disk_ends_as_if_it_had_not_been(whole, tmp_path):
    check(whole, tmp_path / "run", 9)


@pytest.mark.full
def test_a_training_killed_at_every_change_of_the_disk_ends_as_if_it_had_not_been(whole, tmp_path):
    check(whole, tmp_path / "run", 1)
