"""A new method is one file and one recipe: written here into a temporary folder, every command works with it.

The method is unlike those that ship: a network of plain convolutions sees two views of an image, as it is and with the colours
of a style image; a teacher, which follows it by a moving average, and a bank of styles are parts of its training alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import kills
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

import mfuser
from dgbench import cli
from dgbench.cost.model_times import training_step
from mfuser import methods

METHOD = '''
"""Two views of an image, one with the colours of a style image; a teacher says what both should be."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.labels import IGNORE, train_ids
from mfuser.segmentor import Batch, Extra, Segmentor, TrainingData

TITLE = "Two views"
PAPER = ""
BACKBONES = ({"backbone": "plain"},)


@dataclass(frozen=True)
class Options:
    backbone: str = "plain"
    width: int = 8
    image_size: tuple[int, int] = (64, 64)


class TwoViews(Segmentor):
    extras = (Extra("style"), Extra("generated", size=(32, 48), labels=True))
    any_size = True
    size_step = 4
    eval_parts = ("body.1", "training_only.teacher")

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.image_size = options.image_size
        w = options.width
        self.body = nn.Sequential(
            nn.Conv2d(3, w, 3, 2, 1), nn.BatchNorm2d(w), nn.ReLU(),
            nn.Conv2d(w, w, 3, 2, 1), nn.BatchNorm2d(w), nn.Dropout(0.1), nn.ReLU(),
        )
        self.head = nn.Conv2d(w, len(self.classes), 1)

    def enter_training(self) -> None:
        teacher = copy.deepcopy(nn.Sequential(self.body, self.head)).requires_grad_(False)
        bank = nn.Module()
        bank.register_buffer("styles", torch.zeros(0, 3))
        self.training_only = nn.ModuleDict({"teacher": teacher, "bank": bank})

    def before_step(self, step: int, steps: int, data: TrainingData) -> None:
        if step == 0:  # mine the colours of the source
            means = [batch.images.mean((2, 3)) for batch in data.batches(7)]
            self.training_only["bank"].styles = torch.cat(means)
            return
        with torch.no_grad():
            for old, new in zip(self.training_only["teacher"].parameters(), (*self.body.parameters(), *self.head.parameters())):
                old.lerp_(new, 0.1)

    def forward(self, images: Tensor) -> Tensor:
        self.check_size(images)
        return F.interpolate(self.head(self.body(images)), images.shape[-2:], mode="bilinear", align_corners=False)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        assert self.body[4].training and not self.body[1].training and not self.training_only["teacher"][0][4].training
        styles = self.training_only["bank"].styles
        chosen = styles[torch.randint(len(styles), (len(batch.images),))]
        mean = batch.images.mean((2, 3), keepdim=True)
        colour = batch.extra["style"].mean((2, 3), keepdim=True) + chosen[:, :, None, None]
        styled = (batch.images - mean + colour / 2).clamp(0, 1)
        with torch.no_grad():
            taught = self.training_only["teacher"](batch.images).softmax(1)
        made, labels = self(batch.extra["generated"]), train_ids(batch.extra["generated_labels"], len(self.classes))
        far = 1 - batch.step / batch.steps
        return {
            "loss_seg": F.cross_entropy(self(batch.images), train_ids(batch.labels, 19), ignore_index=IGNORE),
            "loss_styled": F.cross_entropy(self(styled), train_ids(batch.labels, 19), ignore_index=IGNORE),
            "loss_generated": F.cross_entropy(made, labels, ignore_index=IGNORE),
            "loss_teacher": far * F.cross_entropy(self.head(self.body(styled)), taught),
        }


MODEL = TwoViews
'''

RECIPE = """
method: {{name: two-views}}
data:
  source: streets-game
  targets: [streets-city]
  size: [64, 128]
  crop: [64, 64]
  train_images: 4
  val_images: 1
  extra: {{style: {folder}/styles, generated: {folder}/generated}}
train: {{steps: 12, batch_size: 2, log_every: 1, checkpoint_every: 2}}
optim:
  lr: 0.02
  optimizer: sgd
  momentum: 0.9
  groups: {{head: {{lr_factor: 10}}, body: {{weight_decay: 0.0}}, body.0: {{min_lr: 0.001}}}}
eval: {{batch_size: 1}}
"""


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], prog_name="dgbench")


def works(*arguments: str | Path) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def fails(*arguments: str | Path) -> str:
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.split())


@dataclass(frozen=True)
class House:
    """Where the method, its recipe and its runs are."""

    folder: Path
    recipe: Path
    runs: Path
    whole: Path  # a training that nothing stopped


def written(folder: Path) -> Path:
    """Write the method, its images and its recipe; return the recipe's file."""
    (folder / "methods").mkdir()
    (folder / "methods" / "two_views.py").write_text(METHOD)
    rng = np.random.default_rng(0)
    (folder / "styles" / "deeper").mkdir(parents=True)
    for name in ("a.png", "b.jpg", "deeper/c.webp"):
        Image.fromarray(rng.integers(0, 255, (70, 90, 3), np.uint8)).save(folder / "styles" / name)
    for part in ("images", "labels"):
        (folder / "generated" / part).mkdir(parents=True)
    for name in ("a", "b"):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(folder / "generated" / "images" / f"{name}.jpg")
        Image.fromarray(rng.integers(0, 19, (40, 40), np.uint8)).save(folder / "generated" / "labels" / f"{name}.png")
    recipe = folder / "two-views.yaml"
    recipe.write_text(RECIPE.format(folder=folder))
    return recipe


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("new")
    recipe = written(folder)
    methods.__path__.append(str(folder / "methods"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the fork that is killed has
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DGBENCH_CACHE", str(folder / "cache"))
        try:
            works("train", recipe, "--out", folder / "runs" / "whole", "--device", "cpu", "--no-eval")
            yield House(folder, recipe, folder / "runs", folder / "runs" / "whole")
        finally:
            torch.set_num_threads(threads)
            methods.__path__.remove(str(folder / "methods"))


def last(run: Path) -> Path:
    return run / "checkpoint" / "step-000012"


def test_a_killed_training_goes_on_bit_for_bit_with_its_teacher_and_momentum(house: House) -> None:
    killed = house.runs / "killed"
    status = kills.kill_when(
        lambda: run("train", house.recipe, "--out", killed, "--device", "cpu", "--no-eval"),
        (killed / "checkpoint" / "step-000004").is_dir,
    )
    assert status == -9
    assert not last(killed).exists()
    works("train", "--resume", killed, "--device", "cpu", "--no-eval")
    for name in ("model.safetensors", "training.safetensors"):
        assert (last(killed) / name).read_bytes() == (last(house.whole) / name).read_bytes(), name
    assert (killed / "log.jsonl").read_bytes() == (house.whole / "log.jsonl").read_bytes()
    states = [torch.load(last(path) / "optimizer.pt", weights_only=True)["state"] for path in (killed, house.whole)]
    assert states[0].keys() == states[1].keys() != set()
    assert all(torch.equal(row["momentum_buffer"], states[1][key]["momentum_buffer"]) for key, row in states[0].items())


def test_parts_of_training_alone_lie_beside_the_optimizer_and_not_in_the_model_file(house: House) -> None:
    model, training = (load_file(last(house.whole) / f"{name}.safetensors") for name in ("model", "training"))
    assert not [name for name in model if "training_only" in name]
    assert training["training_only.bank.styles"].shape == (4, 3)
    teacher = {name.removeprefix("training_only.teacher."): value for name, value in training.items() if ".teacher." in name}
    assert len(teacher) == len(model)
    assert not torch.equal(teacher["1.weight"], model["head.weight"])
    assert "training.safetensors" in json.loads((last(house.whole) / "manifest.json").read_text())["files"]


def test_parts_in_evaluation_mode_keep_their_statistics_and_the_others_do_not(house: House) -> None:
    model = load_file(last(house.whole) / "model.safetensors")
    assert not model["body.1.running_mean"].any()
    assert model["body.4.running_mean"].any()


def test_each_group_has_its_own_rate_and_floor(house: House) -> None:
    rows = torch.load(last(house.whole) / "optimizer.pt", weights_only=True)["param_groups"]
    left = (1 - 11 / 12) ** 0.9  # mmengine's PolyLR at the last of 12 steps
    assert {(round(row["lr"], 9), row["weight_decay"]) for row in rows} == {
        (round(0.2 * left, 9), 0.05),
        (round(0.02 * left, 9), 0.0),
        (round(0.019 * left + 0.001, 9), 0.05),
    }


def test_it_is_scored_and_stands_on_the_leaderboard(house: House) -> None:
    scored = json.loads(works("eval", house.whole, "--targets", "streets-city", "--device", "cpu", "--json").stdout)
    assert [(row["method"], row["variant"], row["target"]) for row in scored] == [("two-views", "plain", "streets-city")]
    assert "two-views" in works("leaderboard", "--runs", house.runs, "--no-published", "--targets", "streets-city").stdout


def test_whole_images_of_any_size_are_scored_where_a_protocol_shows_them(house: House) -> None:
    model = mfuser.load(house.whole)
    with torch.no_grad():
        assert model(torch.rand(1, 3, 36, 100)).shape == (1, 19, 36, 100)
        with pytest.raises(ValueError, match="sides are multiples of 4, got"):
            model(torch.rand(1, 3, 36, 101))


@pytest.mark.parametrize("by", ["two-views", "recipe"])
def test_a_profile_counts_what_is_scored_and_not_the_teacher(house: House, by: str) -> None:
    name = house.recipe if by == "recipe" else by
    (row,) = json.loads(works("profile", name, "--size", "64", "--count-only", "--json").stdout)["rows"]
    assert row["parameters"] == (27 * 8 + 8) + 16 + (72 * 8 + 8) + 16 + (8 * 19 + 19)


def test_a_profile_times_a_training_step_with_the_teacher_and_the_streams(house: House) -> None:
    model = mfuser.build("two-views")
    training_step(model, (64, 64), torch.device("cpu"), torch.float32)()
    assert set(model.training_only) == {"teacher", "bank"}


def test_photographs_are_segmented(house: House, tmp_path: Path) -> None:
    works(
        "predict", house.folder / "styles" / "b.jpg", "--checkpoint", house.whole, "--out", tmp_path / "o.png", "--device", "cpu"
    )
    with Image.open(tmp_path / "o.png") as overlay:
        assert overlay.width == 90


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"generated": None}, "`two-views` trains with further images, but data.extra does not say where `generated` are"),
        ({"style": "{here}/absent"}, "data.extra.style of `two-views`: {here}/absent is not there"),
        ({"style": "{here}/empty"}, "data.extra.style of `two-views`: no image in {here}/empty"),
        ({"generated": "{here}/empty"}, "data.extra.generated of `two-views`: {here}/empty has no folder images/"),
        ({"styl": "{here}/empty"}, "`two-views` has no stream `styl` ({here}/empty): it has `style`, `generated`"),
        ({"style": "streets-city"}, "`style` is `streets-city`, one of the targets; targets must be unseen"),
    ],
    ids=["not given", "missing", "empty", "without pairs", "not declared", "a target"],
)
def test_a_stream_that_cannot_be_read_is_named(house: House, tmp_path: Path, change: dict[str, str | None], said: str) -> None:
    (tmp_path / "empty").mkdir()
    lines = house.recipe.read_text()
    places = {"style": f"{house.folder}/styles", "generated": f"{house.folder}/generated"} | change
    given = ", ".join(f"{name}: {place.format(here=tmp_path)}" for name, place in places.items() if place)
    start = lines.index("  extra:")
    recipe = tmp_path / "changed.yaml"
    recipe.write_text(f"{lines[:start]}  extra: {{{given}}}\n{lines[lines.index('train:') :]}")
    assert said.format(here=tmp_path) in fails("train", recipe, "--out", tmp_path / "run", "--device", "cpu")
    assert not (tmp_path / "run").exists()


def test_a_method_without_streams_refuses_one(tmp_path: Path) -> None:
    said = fails(
        "train", "streets/source-only", "--set", f"data.extra.style={tmp_path}", "--out", tmp_path / "run", "--device", "cpu"
    )
    assert f"`source-only` has no stream `style` ({tmp_path}): it needs no further images" in said


def test_resuming_with_other_images_in_a_stream_is_refused(house: House, tmp_path: Path) -> None:
    copy = tmp_path / "house"
    copy.mkdir()
    recipe = written(copy)
    works("train", recipe, "--set", "train.steps=2", "--out", tmp_path / "run", "--device", "cpu", "--no-eval")
    (copy / "styles" / "a.png").unlink()
    said = fails("train", "--resume", tmp_path / "run", "--device", "cpu", "--no-eval")
    assert "was started with other images in data.extra.style" in said


def test_a_damaged_or_missing_file_of_training_parts_is_named(house: House, tmp_path: Path) -> None:
    works("train", house.recipe, "--set", "train.steps=2", "--out", tmp_path / "run", "--device", "cpu", "--no-eval")
    file = tmp_path / "run" / "checkpoint" / "step-000002" / "training.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert "training.safetensors is damaged" in fails("train", "--resume", tmp_path / "run", "--device", "cpu", "--no-eval")
    file.unlink()
    assert "training.safetensors is missing" in fails("train", "--resume", tmp_path / "run", "--device", "cpu", "--no-eval")
