"""Evaluation and prediction with real models on small scenes."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from dgbench import metrics, results
from dgbench.data.dataset import SegDataset
from dgbench.engine.evaluate import evaluate
from dgbench.engine.predict import predict
from dgbench.engine.train import train
from dgbench.errors import CheckpointError, DataError, DgbenchError
from dgbench.progress import Silent
from dgbench.recipe import dump, load_recipe


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    path = tmp_path_factory.mktemp("cache")
    os.environ["DGBENCH_CACHE"] = str(path)
    yield path
    del os.environ["DGBENCH_CACHE"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache):
    path = tmp_path_factory.mktemp("runs") / "a-run"
    small = ["data.size=[64, 128]", "data.crop=[64, 64]", "data.train_images=4", "data.val_images=5", "train.steps=8"]
    recipe = load_recipe("streets/source-only", [*small, "train.batch_size=2", "eval.batch_size=2"])
    train(recipe, path, progress=Silent(), device="cpu")
    return path


def test_a_record_says_all_that_a_score_depends_on(run):
    source, city = evaluate(run, ["streets-city"], progress=Silent(), device="cpu", include_source=True)
    assert (source.target, city.target) == ("streets-game", "streets-city")
    assert city.n_images == 5
    assert city.n_available == 100
    assert not city.complete
    assert city.backends == {}, "source-only runs none of the operators"
    assert len(city.checkpoint) == 64
    assert city.environment["torch"]
    assert 0 <= city.interval[0] <= city.miou <= city.interval[1] <= 1
    assert source.protocol_hash != city.protocol_hash
    assert results.read(city.path) == city


def test_the_stored_matrices_give_the_score_and_count_every_labelled_pixel(run):
    (record,) = evaluate(run, ["streets-world"], progress=Silent(), device="cpu")
    counts = results.read_confusion(record)
    dataset = SegDataset("streets-world", "val", size=(64, 128), limit=5)
    for matrix, sample in zip(counts, (dataset[i] for i in range(5)), strict=True):
        assert np.array_equal(matrix.sum(1), np.bincount(sample.label.ravel(), minlength=256)[:19])
    assert metrics.miou(counts.sum(0)) == record.miou


def test_scoring_twice_gives_the_same_matrices(run):
    first, second = (evaluate(run, ["streets-fog@0.6"], progress=Silent(), device="cpu")[0] for _ in range(2))
    assert first.target == "streets-fog@0.6"
    assert np.array_equal(results.read_confusion(first), results.read_confusion(second))
    assert first.id != second.id


def test_an_unknown_target_costs_no_time(run):
    with pytest.raises(DataError, match="unknown domain `streets-cty`"):
        evaluate(run, ["streets-city", "streets-cty"], progress=Silent())


@pytest.mark.parametrize("size", [(40, 30), (64, 128), (300, 500)])
def test_a_photo_of_any_size_gets_an_overlay(run, tmp_path, size):
    photo = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(256, size=(*size, 3), dtype=np.uint8)).save(photo)
    (found,) = predict([photo], run, tmp_path / "overlay.png", device="cpu")
    with Image.open(found.overlay) as picture:
        assert picture.width == size[1]
        assert picture.height > size[0]  # the legend is below
    assert sum(found.shares.values()) == pytest.approx(1)


def test_a_missing_photo_is_named(run, tmp_path):
    with pytest.raises(DataError, match="no such image: .*nothing.jpg"):
        predict([tmp_path / "nothing.jpg"], run, tmp_path / "overlay.png")


@pytest.mark.parametrize(("setting", "said"), [("method.patch=16", "patch `None`"), (None, "name `source-only`")])
def test_another_models_checkpoint_is_refused(run, tmp_path, setting, said):
    other = load_recipe("streets/source-only", [setting]) if setting else load_recipe("streets/mfuser")
    shutil.copytree(run / "checkpoint", tmp_path / "checkpoint")
    dump(other, tmp_path / "recipe.yaml")
    with pytest.raises(CheckpointError, match=f"holds a model with {said}, but the recipe says"):
        evaluate(tmp_path, ["streets-city"], progress=Silent(), device="cpu")
    assert not list(tmp_path.glob("record-*"))


def test_an_unknown_device_is_refused(run):
    with pytest.raises(DgbenchError, match="unknown device `gpu`"):
        evaluate(run, ["streets-city"], progress=Silent(), device="gpu")


def test_images_that_were_halved_before_are_not_halved_again(run, tmp_path):
    def write(folder, images, labels, size, value):
        for part, pixels in ((images, np.zeros((*size, 3), np.uint8)), (labels, np.full(size, value, np.uint8))):
            (tmp_path / folder / "mapillary" / part).parent.mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / folder / "mapillary" / part)

    write("official", "validation/images/a.jpg", "validation/labels/a.png", (160, 320), 13)  # Vistas' road
    write("rein", "half/val_img/a.jpg", "half/val_label/a.png", (80, 160), 0)
    shutil.copytree(run / "checkpoint", tmp_path / "run/checkpoint")
    recipe = load_recipe(str(run / "recipe.yaml"), ["eval.protocol=paper-half", "data.size=null"])
    dump(recipe, tmp_path / "run/recipe.yaml")
    records = [
        evaluate(tmp_path / "run", ["mapillary"], progress=Silent(), device="cpu", root=tmp_path / folder)[0]
        for folder in ("official", "rein")
    ]
    assert [int(results.read_confusion(record).sum()) for record in records] == [80 * 160, 80 * 160]
    assert records[0].protocol_hash != records[1].protocol_hash
    assert not records[0].complete, "one image of 2,000"
