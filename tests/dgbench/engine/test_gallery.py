"""Pictures of a report: what is drawn of a run's examples, and of which domains nothing is."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import mfuser
from dgbench import cli
from dgbench.data.catalog import lookup
from dgbench.data.dataset import SegDataset
from dgbench.data.export import export
from dgbench.engine.evaluate import evaluate
from dgbench.engine.gallery import WRONG, drawn, errors, with_pictures
from dgbench.html_report import records_of
from dgbench.progress import Silent
from dgbench.recipe import dump, load_recipe
from dgbench.report.page import Page, gather

SIZE = (64, 128)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DGBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with `cityscapes`, whose files do not say that they are rendered: as the published ones."""
    root = tmp_path_factory.mktemp("data")
    export("streets-city", "cityscapes", root, n=2, size=SIZE, splits=["val"])
    for mark in root.rglob(".dgbench-rendered"):
        mark.unlink()
    return root


@pytest.fixture(scope="module")
def scored(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run scored on rendered images and on those of `cityscapes`."""
    run = tmp_path_factory.mktemp("runs") / "one"
    torch.manual_seed(0)
    model = mfuser.build("source-only", backbone="tiny", image_size=(64, 64), weights="random").eval()
    torch.nn.init.normal_(model.head.weight)
    mfuser.save(model, run / "checkpoint/step-000001")
    settings = ["data.size=[64, 128]", "data.crop=[64, 64]", "data.val_images=2", "eval.batch_size=1"]
    dump(load_recipe("streets/source-only", settings), run / "recipe.yaml")
    evaluate(run, ["streets-city", "cityscapes"], progress=Silent(), device="cpu", root=data)
    return run


def pictured(run: Path, data: Path, *, locked: bool = False) -> Page:
    page = gather(records_of([str(run)], Path("runs")))
    return with_pictures(page, progress=Silent(), device="cpu", root=data, locked=locked)


def pixels(picture: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(picture)) as file:
        return np.asarray(file.convert("RGB") if file.mode == "P" else file)


def test_examples_show_image_truth_prediction_and_error(scored: Path, data: Path) -> None:
    ((rendered, _),) = (run.targets for run in pictured(scored, data).runs)
    assert [example.place for example in rendered.examples] == ["worst", "median"]  # there are two images
    for example in rendered.examples:
        image, truth, prediction, error = map(pixels, example.pictures)
        assert image.shape == truth.shape == prediction.shape == error.shape == (*SIZE, 3)
        sample = SegDataset(lookup("streets-city"), "val", size=SIZE)[int(example.id)]
        colours = {tuple(colour) for colour in truth.reshape(-1, 3).tolist()}
        assert len(colours) == len(np.unique(sample.label))


def test_pictures_of_a_domain_that_may_not_be_redistributed_are_left_out(scored: Path, data: Path) -> None:
    ((rendered, locked),) = (run.targets for run in pictured(scored, data).runs)
    assert (rendered.record.target, locked.record.target) == ("streets-city", "cityscapes")
    assert all(example.pictures for example in rendered.examples)
    assert not any(example.pictures for example in locked.examples)
    assert locked.note.startswith("no pictures: cityscapes may not be redistributed (")


def test_with_images_they_are_shown(scored: Path, data: Path, tmp_path: Path) -> None:
    counted = {}
    for flags in ((), ("--with-images",), ("--no-gallery",)):
        arguments = ["report", str(scored), "--out", str(tmp_path / "r.html"), "--root", str(data), *flags, "--device", "cpu"]
        done = CliRunner().invoke(cli.app, [*arguments, "--json", "--quiet"], prog_name="dgbench")
        assert done.exit_code == 0, done.stderr
        counted[flags] = json.loads(done.stdout)["pictures"]
        assert (tmp_path / "r.html").read_text().count('src="data:image/') == counted[flags]
    assert counted == {(): 8, ("--with-images",): 16, ("--no-gallery",): 0}


def test_files_that_are_gone_cost_the_pictures_alone(scored: Path, tmp_path: Path) -> None:
    ((rendered, gone),) = (run.targets for run in pictured(scored, tmp_path, locked=True).runs)
    assert all(example.pictures for example in rendered.examples)
    assert gone.note.startswith("no pictures: ")
    assert gone.confusion is not None


def test_other_weights_than_those_that_were_scored_draw_nothing(scored: Path, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(scored, other)
    model = mfuser.build("source-only", backbone="tiny", image_size=(64, 64), weights="random").eval()
    mfuser.save(model, other / "checkpoint/step-000002")
    (run,) = pictured(other, data).runs
    assert run.notes == ("no pictures: the weights in the folder are not those that were scored",)


def test_errors_have_one_colour_and_pixels_without_a_label_none() -> None:
    truth = np.array([[0, 1, 255, 2]], np.uint8)
    found = errors(np.full((1, 4, 3), 90, np.uint8), truth, np.array([[0, 2, 3, 1]], np.uint8))
    wrong = (found == WRONG).all(axis=2)
    assert wrong.tolist() == [[False, True, False, True]]


def test_large_images_are_made_small() -> None:
    image = np.zeros((512, 1024, 3), np.uint8)
    label = np.zeros((512, 1024), np.uint8)
    assert {pixels(one).shape[:2] for one in drawn(image, label, label)} == {(210, 420)}
