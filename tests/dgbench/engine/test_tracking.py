"""Trackers: what they are told, what they may not change, and which are refused."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import accelerate.tracking
import pytest
from accelerate.tracking import GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dgbench.engine import checkpoints
from dgbench.engine.evaluate import evaluate
from dgbench.engine.tracking import Trackers
from dgbench.engine.train import train
from dgbench.errors import DgbenchError
from dgbench.progress import Silent
from dgbench.recipe import load_recipe

SETTINGS = ("data.train_images=2", "data.val_images=1", "train.steps=4", "train.log_every=2", "train.workers=0")


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    os.environ["DGBENCH_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["DGBENCH_CACHE"]


def small(*settings: str):
    sizes = ("data.size=[64, 128]", "data.crop=[64, 64]", "train.batch_size=1", "data.targets=[streets-city]")
    return load_recipe("streets/source-only", [*sizes, *SETTINGS, *settings])


def told(run: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard's own reader finds: numbers by name and step."""
    events = EventAccumulator(str(run / "tracking" / "dgbench"))
    events.Reload()
    assert events.Tags()["images"] == []
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}


def losses(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_tensorboard_is_told_losses_rate_speed_and_scores_and_changes_no_bit(tmp_path):
    train(small(), tmp_path / "plain", progress=Silent(), device="cpu")
    run = tmp_path / "tracked"
    with Trackers(["tensorboard"]) as trackers:
        train(small(), run, progress=Silent(), device="cpu", trackers=trackers)
        (record,) = evaluate(run, progress=Silent(), device="cpu")
        trackers.scores([record], 4)
    assert losses(run) == losses(tmp_path / "plain")
    sha, plain = (checkpoints.sha256(checkpoints.folder_of(path)) for path in (run, tmp_path / "plain"))
    assert sha == plain
    found = told(run)
    for name in losses(run)[0].keys() - {"step"}:
        assert found[name] == pytest.approx({line["step"]: line[name] for line in losses(run)})
    assert found["miou/streets-city"] == pytest.approx({4: record.miou})
    assert all(speed > 0 for speed in found["images_per_second"].values())


def test_settings_that_are_numbers_are_told_and_paths_are_not(tmp_path):
    with Trackers(["tensorboard"]) as trackers:
        train(small("train.steps=1"), tmp_path, progress=Silent(), device="cpu", trackers=trackers)
    (file,) = (tmp_path / "tracking").rglob("hparams.yml")
    text = file.read_text()
    assert "train.seed: 0\n" in text
    assert "recipe: streets/source-only\n" in text
    assert str(tmp_path) not in text
    assert "train.init" not in text


class _Killed(Silent):
    """A progress display that ends the training at the third step, without a word to it."""

    def start(self, what: str, total: int, unit: str) -> None:
        self.left = 3 if what.startswith("training") else total + 1

    def advance(self, n: int = 1, **_: Any) -> None:
        self.left -= n
        if not self.left:
            raise MemoryError


def test_of_a_training_that_goes_on_no_step_is_told_twice(tmp_path):
    recipe = small("train.checkpoint_every=2", "train.log_every=1")
    with pytest.raises(DgbenchError, match="memory"), Trackers(["tensorboard"]) as trackers:
        train(recipe, tmp_path, progress=_Killed(), device="cpu", trackers=trackers)
    assert list(told(tmp_path)["loss"]) == [1, 2, 3]
    with Trackers(["tensorboard"]) as trackers:
        train(recipe, tmp_path, progress=Silent(), device="cpu", resume=True, trackers=trackers)
    events = EventAccumulator(str(tmp_path / "tracking" / "dgbench"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        (
            "tensorbord",
            "unknown tracker `tensorbord`",
            "did you mean `tensorboard`\\? installed: .*tensorboard.*; accelerate knows",
        ),
        ("nothing", "unknown tracker `nothing`", "choose from aim, all, .*wandb; installed: "),
        ("dvclive", "tracker `dvclive` is not installed", "pip install dvclive; installed: .*; accelerate knows aim, "),
    ],
)
def test_a_tracker_that_is_unknown_or_not_installed_is_refused_with_those_there_are(name, message, hint):
    with pytest.raises(DgbenchError, match=message) as caught:
        Trackers(["tensorboard", name])
    assert re.match(hint, caught.value.hint)


class Failing(GeneralTracker):
    """A tracker whose service goes away after the first step."""

    name = "failing"
    requires_logging_directory = False
    tracker = None

    def __init__(self, project: str) -> None:
        super().__init__()
        self.asked = 0

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        self.asked += 1
        if self.asked > 1:
            raise ConnectionError("the service is gone")


class Refusing(Failing):
    """A tracker that cannot be started."""

    name = "refusing"

    def start(self) -> None:
        raise PermissionError("log in first")


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr("accelerate.tracking.LOGGER_TYPE_TO_CLASS", dict(accelerate.tracking.LOGGER_TYPE_TO_CLASS))
    monkeypatch.setattr("accelerate.accelerator.LOGGER_TYPE_TO_CLASS", accelerate.tracking.LOGGER_TYPE_TO_CLASS)
    for tracker in (Failing, Refusing):
        accelerate.tracking.register_tracker_class(tracker)


@pytest.mark.usefixtures("registered")
def test_a_tracker_that_fails_is_named_once_and_the_training_goes_on(tmp_path, caplog):
    with Trackers(["failing", "tensorboard"]) as trackers:
        train(small("train.log_every=1"), tmp_path, progress=Silent(), device="cpu", trackers=trackers)
    assert caplog.text.count("tracker failing failed: the service is gone") == 1
    assert list(told(tmp_path)["loss"]) == [line["step"] for line in losses(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.usefixtures("registered")
def test_a_tracker_that_cannot_be_started_stops_before_the_first_step(tmp_path):
    with pytest.raises(DgbenchError, match="a tracker of refusing cannot be started: log in first"), Trackers(["refusing"]) as it:
        train(small(), tmp_path / "run", progress=Silent(), device="cpu", trackers=it)
    assert not (tmp_path / "run").exists()
