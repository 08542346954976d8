"""Training: the schedule, exact resumption after a kill, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dgbench import results
from dgbench.engine import checkpoints
from dgbench.engine.evaluate import evaluate
from dgbench.engine.train import schedule, train
from dgbench.errors import CheckpointError, RecipeError
from dgbench.progress import Silent
from dgbench.recipe import OptimSpec, load_recipe
from mfuser.ops import BackendError

SMALL = [
    "data.size=[64, 128]",
    "data.crop=[64, 64]",
    "data.train_images=6",
    "data.val_images=2",
    "train.log_every=1",
    "train.batch_size=2",
]


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    path = tmp_path_factory.mktemp("cache")
    os.environ["DGBENCH_CACHE"] = str(path)
    yield path
    del os.environ["DGBENCH_CACHE"]


def recipe(*overrides: str, name: str = "streets/mfuser"):
    return load_recipe(name, [*SMALL, "train.steps=6", "train.checkpoint_every=3", *overrides])


def losses(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load_model(run).state_dict()


def test_the_schedule_is_torchs_linear_warm_up_then_poly():
    optim = OptimSpec(lr=1e-2, warmup_steps=5, warmup_ratio=0.1, power=0.9, min_lr=0.0)
    parameter = torch.nn.Parameter(torch.zeros(1))
    oracle_optimizer = torch.optim.SGD([parameter], lr=1.0)
    oracle = torch.optim.lr_scheduler.SequentialLR(
        oracle_optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(oracle_optimizer, 0.1, 1.0, 5),
            torch.optim.lr_scheduler.PolynomialLR(oracle_optimizer, 15, 0.9),
        ],
        [5],
    )
    for step in range(20):
        assert schedule(step, 20, optim) == pytest.approx(oracle_optimizer.param_groups[0]["lr"], rel=1e-6), step
        oracle_optimizer.step()
        oracle.step()


def test_the_schedule_ends_at_min_lr():
    assert schedule(100, 100, OptimSpec(lr=1e-2, min_lr=1e-4)) == pytest.approx(1e-2)


@pytest.mark.parametrize("name", ["streets/mfuser", "streets/source-only"])
def test_a_killed_and_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(name, tmp_path):
    whole = tmp_path / "whole"
    train(recipe(name=name), whole, progress=Silent(), device="cpu")

    killed = tmp_path / "killed"
    arguments = [sys.executable, "-m", "dgbench", "train", name, "--out", str(killed), "--no-eval", "--device", "cpu"]
    settings = [*SMALL, "train.steps=6", "train.checkpoint_every=3"]
    process = subprocess.Popen([*arguments, *(part for s in settings for part in ("--set", s))], cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not (killed / "log.jsonl").exists() or len(losses(killed)) < 4:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()

    train(recipe(name=name), killed, progress=Silent(), device="cpu", resume=True)
    assert losses(killed) == losses(whole)
    expected = weights(whole)
    assert all(torch.equal(expected[k], v) for k, v in weights(killed).items())


def test_a_training_leaves_one_record_of_what_it_took(tmp_path):
    record = train(recipe("train.steps=3"), tmp_path, progress=Silent(), device="cpu")
    assert record.kind == "train"
    assert results.read(record.path) == record
    assert record.checkpoint == checkpoints.sha256(tmp_path / "checkpoint" / "step-000003")
    assert record.extra["loss"] == losses(tmp_path)[-1]["loss"]
    assert record.extra["images_per_second"] > 0
    assert 0.05 < record.extra["peak_gib"] < 64
    train(recipe("train.steps=3"), tmp_path, progress=Silent(), device="cpu", resume=True)
    assert list(tmp_path.glob("record-*.json")) == [record.path]


def test_a_record_names_the_backends_that_ran(tmp_path, monkeypatch):
    monkeypatch.setenv("MFUSER_BACKEND", "selective_scan=reference")
    record = train(recipe("train.steps=1"), tmp_path / "run", progress=Silent(), device="cpu")
    assert record.backends["selective_scan"] == "reference"
    assert record.backends["ms_deform_attn"] == "torch"
    monkeypatch.delenv("MFUSER_BACKEND")
    (scored,) = evaluate(tmp_path / "run", ["streets-city"], progress=Silent(), device="cpu")
    assert scored.backends["selective_scan"] == "torch"


def test_a_named_backend_that_cannot_run_stops_before_anything_is_rendered(tmp_path):
    with pytest.raises(BackendError, match="selective_scan has no backend `nonsense`"):
        train(recipe("method.backend=nonsense"), tmp_path / "run", progress=Silent(), device="cpu")
    assert not (tmp_path / "run").exists()


def test_leftovers_of_a_killed_checkpoint_write_are_never_read(tmp_path):
    train(recipe("train.steps=3"), tmp_path, progress=Silent(), device="cpu")
    partial = tmp_path / "checkpoint" / ".partial-000009"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    assert checkpoints.newest(tmp_path) == (tmp_path / "checkpoint" / "step-000003", 3)
    checkpoints.clean(tmp_path)
    assert not partial.exists()


def test_resuming_with_another_recipe_is_refused(tmp_path):
    train(recipe("train.steps=3"), tmp_path, progress=Silent(), device="cpu")
    with pytest.raises(CheckpointError, match="the recipe differs"):
        train(recipe("train.steps=3", "optim.lr=0.5"), tmp_path, progress=Silent(), device="cpu", resume=True)


def test_a_damaged_checkpoint_is_named(tmp_path):
    train(recipe("train.steps=3"), tmp_path, progress=Silent(), device="cpu")
    file = tmp_path / "checkpoint" / "step-000003" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="step-000003 cannot be loaded"):
        checkpoints.load_model(tmp_path)


def test_a_run_without_a_checkpoint_says_how_to_go_on(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    with pytest.raises(CheckpointError, match="no checkpoint yet") as error:
        checkpoints.load_model(tmp_path)
    assert "--resume" in str(error.value.hint)


def test_a_diverging_run_stops_with_advice(tmp_path):
    with pytest.raises(RecipeError, match="the loss became"):
        train(recipe("optim.lr=1.0e+30", "optim.warmup_steps=0"), tmp_path, progress=Silent(), device="cpu")


def test_the_loss_falls_on_one_image(tmp_path):
    settings = ("data.train_images=1", "train.steps=40", "data.scale=[1, 1]", "data.photometric=false", "data.flip=0")
    train(recipe(*settings, "optim.warmup_steps=5"), tmp_path, progress=Silent(), device="cpu")
    log = losses(tmp_path)
    assert sum(line["loss"] for line in log[-5:]) < 0.75 * sum(line["loss"] for line in log[:5])
