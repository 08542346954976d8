"""Training: the schedule, exact resumption after a kill, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import kills
import pytest
import torch
from PIL import Image

import mfuser
from dgbench import results
from dgbench.engine import checkpoints
from dgbench.engine.evaluate import evaluate
from dgbench.engine.optim import Rate
from dgbench.engine.train import train
from dgbench.errors import CheckpointError, RecipeError
from dgbench.progress import Silent
from dgbench.recipe import OptimSpec, load_recipe
from mfuser import manifest, methods
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a training of three steps; a test that writes takes `a_copy`."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(recipe("train.steps=3"), folder, progress=Silent(), device="cpu")
    return folder


@pytest.fixture
def a_copy(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


def losses(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


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
        assert Rate(1.0, 0.0).at(step, 20, optim) == pytest.approx(oracle_optimizer.param_groups[0]["lr"], rel=1e-6), step
        oracle_optimizer.step()
        oracle.step()


def test_the_schedule_ends_at_min_lr():
    assert Rate(1e-2, 1e-4).at(100, 100, OptimSpec(lr=1e-2)) == pytest.approx(1e-4)


@pytest.fixture
def _one_thread():
    """Sums over threads would differ with their number, and the killed run has one core only."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class _Killed(Silent):
    """A progress display that kills the process when its fifth step of six is counted."""

    def start(self, what: str, total: int, unit: str) -> None:
        self.left = 5 if what.startswith("training") else total + 1

    def advance(self, n: int = 1, **fields: float | str) -> None:
        self.left -= n
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a fork")
@pytest.mark.parametrize("sampling", ["0.1", "null"], ids=["rare classes", "uniform"])
def test_a_run_killed_within_an_epoch_and_resumed_elsewhere_repeats_the_uninterrupted_one_bit_for_bit(sampling, tmp_path):
    """Seven images, two a step, the checkpoint after six; the killed run has another number of loader workers."""
    settings = [
        *SMALL,
        "train.steps=6",
        "train.checkpoint_every=3",
        "data.train_images=7",
        "train.workers=2",
        f"data.rare_class_sampling={sampling}",
    ]
    name = "streets/source-only"  # what a method has of its own is resumed below, for each
    run = load_recipe(name, settings)
    whole = tmp_path / "whole"
    train(run, whole, progress=Silent(), device="cpu")

    killed = tmp_path / "killed"

    def fit() -> None:
        if hasattr(os, "sched_setaffinity"):  # one core, so one worker; two where this test runs
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        train(run, killed, progress=_Killed(), device="cpu")

    assert kills.kill_after(fit, 120) == -signal.SIGKILL
    assert len(losses(killed)) >= 4
    assert checkpoints.newest(killed) is not None
    assert checkpoints.newest(killed)[1] == 3

    train(run, killed, progress=Silent(), device="cpu", resume=True)
    assert losses(killed) == losses(whole)
    assert checkpoints.sha256(checkpoints.folder_of(killed)) == checkpoints.sha256(checkpoints.folder_of(whole))
    moments = [torch.load(checkpoints.folder_of(path) / "optimizer.pt", weights_only=True) for path in (whole, killed)]
    first, second = (dict(_leaves(state)) for state in moments)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


class _Stopped(Silent):
    """A progress display during whose second step the process is stopped."""

    def start(self, what: str, total: int, unit: str) -> None:
        self.left = 2 if what.startswith("training") else total + 1

    def advance(self, n: int = 1, **fields: float | str) -> None:
        self.left -= n
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("name", mfuser.method_names())
def test_every_method_goes_on_exactly_from_its_checkpoint(name, tmp_path):
    """The smallest of each, with the images and files that it declares; the checkpoint is that of one step."""
    row = methods.module(name).BACKBONES[-1]
    extra = {}
    model = mfuser.build(name, **row, image_size=(64, 64), weights="random")
    model.enter_training()
    for needed in (file for file in model.files if not file.optional):
        extra[needed.name] = str(tmp_path / f"{needed.name}.pth")
        torch.save(model.training_only[needed.name].state_dict(), extra[needed.name])
    for stream in model.extras:
        for part in ("images", "labels") if stream.labels else ("images",):
            (tmp_path / stream.name / part).mkdir(parents=True)
            Image.new("L", (96, 96), 7).save(tmp_path / stream.name / part / "a.png")
        extra[stream.name] = str(tmp_path / stream.name)
    file = tmp_path / "it.yaml"
    file.write_text(json.dumps({"extends": "_streets.yaml", "method": {"name": name, **row}, "data": {"extra": extra}}))
    settings = [*SMALL, "train.steps=3", "data.rare_class_sampling=null"]
    whole = load_recipe(file, [*settings, "train.checkpoint_every=3"])  # writing one changes nothing, either
    train(whole, tmp_path / "whole", progress=Silent(), device="cpu")
    its = load_recipe(file, [*settings, "train.checkpoint_every=1"])
    with pytest.raises(KeyboardInterrupt):
        train(its, tmp_path / "part", progress=_Stopped(), device="cpu")
    assert checkpoints.newest(tmp_path / "part")[1] == 1
    train(its, tmp_path / "part", progress=Silent(), device="cpu", resume=True)
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    whole, part = (checkpoints.folder_of(tmp_path / run) for run in ("whole", "part"))
    assert checkpoints.sha256(whole) == checkpoints.sha256(part)
    beside = [path / "training.safetensors" for path in (whole, part) if (path / "training.safetensors").exists()]
    assert len({path.read_bytes() for path in beside}) < 2


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _leaves(item, f"{path}/{key}")
    if isinstance(value, torch.Tensor):
        yield path, value


def test_a_training_leaves_one_record_of_what_it_took(a_copy):
    (path,) = a_copy.glob("record-*.json")
    record = results.read(path)
    assert record.kind == "train"
    assert record.checkpoint == checkpoints.sha256(a_copy / "checkpoint" / "step-000003")
    assert record.extra["loss"] == losses(a_copy)[-1]["loss"]
    assert record.extra["images_per_second"] > 0
    assert 0.05 < record.extra["peak_gib"] < 64
    assert record.extra["values_m"] == sum(value.numel() for value in mfuser.load(a_copy).state_dict().values()) / 1e6
    again = train(recipe("train.steps=3"), a_copy, progress=Silent(), device="cpu", resume=True)
    assert again == record
    assert list(a_copy.glob("record-*.json")) == [path]


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


def test_leftovers_of_a_killed_checkpoint_write_are_never_read(a_copy):
    partial = a_copy / "checkpoint" / ".partial-000009"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    assert checkpoints.newest(a_copy) == (a_copy / "checkpoint" / "step-000003", 3)
    checkpoints.clean(a_copy)
    assert not partial.exists()


def test_resuming_with_another_recipe_is_refused(a_copy):
    with pytest.raises(CheckpointError, match="the recipe differs"):
        train(recipe("train.steps=3", "optim.lr=0.5"), a_copy, progress=Silent(), device="cpu", resume=True)


def test_a_damaged_checkpoint_is_named(a_copy):
    file = a_copy / "checkpoint" / "step-000003" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="step-000003 cannot be loaded"):
        checkpoints.load_model(a_copy)


def test_a_run_without_a_checkpoint_says_how_to_go_on(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    with pytest.raises(CheckpointError, match="no checkpoint yet") as error:
        checkpoints.load_model(tmp_path)
    assert "--resume" in str(error.value.hint)


def test_resuming_on_other_images_is_refused(a_copy):
    note = a_copy / "checkpoint/step-000003/source.json"
    assert json.loads(note.read_text()) == {"images": 6, "available": 6, "rendered": False}
    note.write_text('{"images": 9, "available": 24966, "rendered": true}')
    manifest.seal(note.parent, [note.name])
    with pytest.raises(CheckpointError, match="was started on 9 rendered images of 24966 of .*, now there are 6 images of 6"):
        train(recipe("train.steps=3"), a_copy, progress=Silent(), device="cpu", resume=True)


def test_a_diverging_run_stops_with_advice(tmp_path):
    with pytest.raises(RecipeError, match="the loss became"):
        train(recipe("optim.lr=1.0e+30", "optim.warmup_steps=0"), tmp_path, progress=Silent(), device="cpu")


def test_the_loss_falls_on_one_image(tmp_path):
    settings = ("data.train_images=1", "train.steps=40", "data.scale=[1, 1]", "data.photometric=false", "data.flip=0")
    # that a step lowers each method's loss is in tests/mfuser/test_methods.py
    train(recipe(*settings, "optim.warmup_steps=5", name="streets/source-only"), tmp_path, progress=Silent(), device="cpu")
    log = losses(tmp_path)
    assert sum(line["loss"] for line in log[-5:]) < 0.75 * sum(line["loss"] for line in log[:5])
