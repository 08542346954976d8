"""Evaluation and prediction with real models on small scenes."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import mfuser
from dgbench import metrics, results, streets
from dgbench.data import catalog
from dgbench.data.dataset import SegDataset
from dgbench.data.labels import CLASSES
from dgbench.engine import checkpoints
from dgbench.engine.evaluate import evaluate, extra_scores
from dgbench.engine.predict import predict
from dgbench.engine.train import train
from dgbench.errors import CheckpointError, DataError, DgbenchError, RecipeError
from dgbench.progress import Silent
from dgbench.protocol import CLASS_SETS, PROTOCOLS, lookup
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


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two scenes of 128x64 in Cityscapes' folders, every pixel labelled."""
    root = tmp_path_factory.mktemp("data")
    ids = np.array([c.label_id for c in CLASSES], np.uint8)
    for number in range(2):
        image, label = streets.render("streets-city", "val", number, (64, 128))
        label = np.where(label == 255, 0, label)
        stem = f"cityscapes/{{}}/val/lindau/lindau_{number:06d}_000019_{{}}.png"
        for array, names in ((image, ("leftImg8bit", "leftImg8bit")), (ids[label], ("gtFine", "gtFine_labelIds"))):
            path = root / stem.format(*names)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
    return root


@pytest.fixture(scope="module")
def free(tmp_path_factory, run):
    """A model that sees many classes anywhere, by a recipe that leaves the size of images to files and protocol."""
    path = tmp_path_factory.mktemp("free") / "run"
    model = checkpoints.load_model(run)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    mfuser.save(model, path / "checkpoint" / "step-000008")
    dump(load_recipe(str(run / "recipe.yaml"), ["data.size=null"]), path / "recipe.yaml")
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
    dataset = SegDataset(catalog.lookup("streets-world"), "val", size=(64, 128), limit=5)
    for matrix, sample in zip(counts, (dataset[i] for i in range(5)), strict=True):
        assert np.array_equal(matrix.sum(1), np.bincount(sample.label.ravel(), minlength=256)[:19])
    assert metrics.miou(counts.sum(0)) == record.miou


def test_scoring_twice_gives_the_same_matrices(run):
    first, second = (evaluate(run, ["streets-fog@0.6"], progress=Silent(), device="cpu")[0] for _ in range(2))
    assert first.target == "streets-fog@0.6"
    assert np.array_equal(results.read_confusion(first), results.read_confusion(second))
    assert first.id != second.id


def test_matrices_of_a_set_of_several_sizes_are_in_the_order_of_its_images(free, tmp_path):
    """Three sizes in turn, four images a batch; the oracle is one image a batch, and the pixels of the label files."""
    sizes = [(48, 96), (32, 64), (40, 80), (48, 96), (32, 64), (40, 80), (48, 96)]
    for number, size in enumerate(sizes):
        image, _ = streets.render("streets-city", "val", number, (64, 128))
        stem = f"idd/{{}}/val/0/{number:06d}_{{}}"
        path = tmp_path / stem.format("leftImg8bit", "leftImg8bit.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).resize(size[::-1]).save(path)
        # one rectangle a set, wider from image to image
        box = [[0, 0], [number + 4, 0], [number + 4, 9], [0, 9]]
        polygons = {"imgHeight": size[0], "imgWidth": size[1], "objects": [{"label": "road", "polygon": box}]}
        path = tmp_path / stem.format("gtFine", "gtFine_polygons.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(polygons))
    found = []
    for batch in (1, 4):
        run = tmp_path / f"run{batch}"
        shutil.copytree(free / "checkpoint", run / "checkpoint")
        dump(load_recipe(str(free / "recipe.yaml"), [f"eval.batch_size={batch}", "data.val_images=null"]), run / "recipe.yaml")
        (record,) = evaluate(run, ["idd"], progress=Silent(), device="cpu", root=tmp_path)
        found.append((record, results.read_matrices(record)))
    (one_by_one, alone), (in_batches, together) = found
    assert alone.ids == together.ids == tuple(f"leftImg8bit/val/0/{n:06d}_leftImg8bit.png" for n in range(7))
    labelled = together.counts.sum((1, 2))
    assert (np.diff(labelled) > 0).all(), "each image has more labelled pixels than the one before"
    assert np.array_equal(together.counts, alone.counts)
    assert in_batches.interval == one_by_one.interval
    assert all(np.array_equal(*pair) for pair in zip(results.paired(one_by_one, in_batches), [alone.counts] * 2, strict=True))


def test_a_score_says_what_its_weights_were_trained_on(run, tmp_path):
    shutil.copytree(run / "checkpoint", tmp_path / "checkpoint")
    shutil.copy(run / "recipe.yaml", tmp_path)
    note = tmp_path / "checkpoint/step-000008/source.json"
    (drawn,) = evaluate(tmp_path, ["streets-city"], progress=Silent(), device="cpu")
    assert (drawn.source_images, drawn.source_available, drawn.source_complete) == (4, 4, True), "as many as were asked for"
    (note.parent / "manifest.json").unlink()  # which would tell of the changes below
    note.write_text('{"images": 6, "available": 24966, "rendered": false}')
    (partial,) = evaluate(tmp_path, ["streets-city"], progress=Silent(), device="cpu")
    assert (partial.source_images, partial.source_available, partial.source_complete) == (6, 24966, False)
    note.unlink()
    (old,) = evaluate(tmp_path, ["streets-city"], progress=Silent(), device="cpu")
    assert (old.source_images, old.source_available, old.source_complete) == (0, 0, None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"images": true, "available": 1, "rendered": false}',
        '{"images": 1}',
        '{"images": -1, "available": 1, "rendered": false}',
    ],
)
def test_a_damaged_note_of_what_was_trained_on_is_named(run, tmp_path, text):
    shutil.copytree(run / "checkpoint", tmp_path / "checkpoint")
    shutil.copy(run / "recipe.yaml", tmp_path)
    (tmp_path / "checkpoint/step-000008/source.json").write_text(text)
    (tmp_path / "checkpoint/step-000008/manifest.json").unlink()  # as in older folders
    with pytest.raises(CheckpointError, match="source.json"):
        evaluate(tmp_path, ["streets-city"], progress=Silent(), device="cpu")


def test_a_folder_with_foreign_images_gives_a_partial_score(free, tmp_path):
    """51 images in the folders of a set of 50."""
    image, label = np.zeros((64, 128, 3), np.uint8), np.zeros((64, 128), np.uint8)
    for number in range(51):
        for array, name in ((image, "rgb_anon/val/night/a/{}_rgb_anon.png"), (label, "gt/val/night/a/{}_gt_labelTrainIds.png")):
            path = tmp_path / "dark_zurich" / name.format(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
    run = tmp_path / "run"
    shutil.copytree(free / "checkpoint", run / "checkpoint")
    dump(load_recipe(str(free / "recipe.yaml"), ["data.val_images=50"]), run / "recipe.yaml")
    (record,) = evaluate(run, ["dark-zurich"], progress=Silent(), device="cpu", root=tmp_path)
    assert (record.n_images, record.n_available, record.n_extra, record.complete) == (50, 50, 1, False)


def test_a_protocol_is_named_on_the_record_and_enters_its_hash(run):
    (usual,) = evaluate(run, ["streets-city"], progress=Silent(), device="cpu")
    (half,) = evaluate(run, ["streets-city"], progress=Silent(), device="cpu", protocol_name="paper-half")
    assert (usual.protocol, usual.protocol_digest) == ("unified", lookup("unified").digest)
    assert (half.protocol, half.protocol_digest) == ("paper-half", lookup("paper-half").digest)
    assert usual.protocol_hash != half.protocol_hash
    with pytest.raises(RecipeError, match="unknown protocol `paper-hlf`"):
        evaluate(run, ["streets-city"], progress=Silent(), protocol_name="paper-hlf")


def test_classes_of_few_images_are_named_in_a_warning(run, caplog):
    (record,) = evaluate(run, ["streets-city"], progress=Silent(), device="cpu")
    few = metrics.rare(results.read_confusion(record))
    assert few
    (said,) = [r.getMessage() for r in caplog.records if r.name == "dgbench.engine.evaluate"]
    assert said.startswith("streets-city val: in fewer than 5 of the scored images: ")
    rarest = min(few, key=lambda k: (few[k], k))
    assert f": {CLASSES[rarest].name} ({few[rarest]})" in said


def under(run, monkeypatch, target="streets-city", root=None, **changed):
    """The record under `unified` with other values, and its matrices."""
    monkeypatch.setitem(PROTOCOLS, "changed", dataclasses.replace(lookup("unified"), name="changed", **changed))
    (record,) = evaluate(run, [target], progress=Silent(), device="cpu", protocol_name="changed", root=root)
    return record, results.read_confusion(record)


@pytest.mark.parametrize("classes", [16, 13])
def test_the_mean_runs_over_the_protocols_classes(run, monkeypatch, classes):
    record, counts = under(run, monkeypatch, classes=classes)
    assert record.miou == metrics.miou(counts.sum(0), classes=CLASS_SETS[classes])
    assert record.interval == metrics.interval(counts, classes=CLASS_SETS[classes])
    assert len(record.iou) == 19
    assert counts.shape[1:] == (19, 19)


def test_absent_classes_count_as_the_protocol_says(free, monkeypatch, files):
    found = {rule: under(free, monkeypatch, "cityscapes", files, absent_classes=rule) for rule in ("skip", "unlabelled", "zero")}
    assert len({counts.tobytes() for _, counts in found.values()}) == 1
    for rule, (record, counts) in found.items():
        assert record.miou == metrics.miou(counts.sum(0), absent=rule)
        assert record.interval == metrics.interval(counts, absent=rule)
    assert found["zero"][0].miou < found["skip"][0].miou


@pytest.mark.parametrize(
    "changed",
    [
        {"stride": 0.25},
        {"flip": True},
        {"scales": (1.0, 2.0)},
        {"fit": {"cityscapes": (96, 192)}},
        {"short_edge": 96},
        {"fit": {"cityscapes": (40, 80)}, "resize": "pillow-bilinear"},
    ],
)
def test_what_changes_the_view_changes_the_prediction_and_not_the_label(free, monkeypatch, files, changed):
    _, usual = under(free, monkeypatch, "cityscapes", files)
    _, other = under(free, monkeypatch, "cityscapes", files, **changed)
    assert np.array_equal(usual.sum(2), other.sum(2))
    assert not np.array_equal(usual, other)


def test_the_resampling_shows_in_the_prediction(free, monkeypatch, files):
    pair = [
        under(free, monkeypatch, "cityscapes", files, fit={"cityscapes": (32, 64)}, resize=by)[1]
        for by in ("opencv-bilinear", "pillow-bilinear")
    ]
    assert not np.array_equal(*pair)


@pytest.mark.parametrize(
    ("changed", "pixels"),
    [
        ({}, 64 * 128),
        ({"halved": ("cityscapes",)}, 32 * 64),
        ({"square": {"cityscapes": 48}}, 48 * 48),
        ({"short_edge": 96, "label_grid": "resized"}, 96 * 192),
        ({"fit": {"cityscapes": (32, 64)}, "label_grid": "resized"}, 32 * 64),
        ({"fit": {"cityscapes": (32, 64)}}, 64 * 128),
    ],
)
def test_labels_lie_on_the_protocols_grid(free, monkeypatch, files, changed, pixels):
    _, counts = under(free, monkeypatch, "cityscapes", files, **changed)
    assert counts.sum((1, 2)).tolist() == [pixels] * 2


def test_mapillarys_labels_are_read_by_the_protocols_map(free, monkeypatch, tmp_path):
    """Manhole (41) is road in one map and ignored in the other, Crosswalk - Plain (8) the other way round."""
    ids = np.full((64, 128), 41, np.uint8)
    ids[:, :32] = 8
    for folder, kind, array in (("images", "jpg", np.zeros((64, 128, 3), np.uint8)), ("labels", "png", ids)):
        (tmp_path / "mapillary/validation" / folder).mkdir(parents=True)
        Image.fromarray(array).save(tmp_path / f"mapillary/validation/{folder}/a.{kind}")
    for name, pixels in (("robustnet", 64 * 96), ("openseg", 64 * 32)):
        record, counts = under(free, monkeypatch, "mapillary", tmp_path, mapillary_map=name, fit={})
        assert counts.sum((0, 2)).tolist() == [pixels] + [0] * 18
        assert record.protocol == "changed"


def test_whole_images_need_a_model_of_their_size(run, monkeypatch):
    with pytest.raises(DataError, match=r"shows whole images, here 64x128 \(H x W\), but `source-only` was built for 64x64"):
        under(run, monkeypatch, window="whole")


def test_a_recipes_size_is_the_test_size_of_files_and_enters_the_hash(run, free, monkeypatch, tmp_path, files):
    shutil.copytree(free / "checkpoint", tmp_path / "checkpoint")
    shutil.copy(run / "recipe.yaml", tmp_path)  # it says 128x64
    own, counts = under(tmp_path, monkeypatch, "cityscapes", files, fit={"cityscapes": (512, 1024)})
    by_protocol, same = under(free, monkeypatch, "cityscapes", files, fit={"cityscapes": (64, 128)})
    assert np.array_equal(counts, same)
    assert own.protocol_hash != by_protocol.protocol_hash


def test_synthias_smaller_means_are_kept_beside_the_whole():
    matrix = np.random.default_rng(0).integers(1, 100, (19, 19))
    extra = extra_scores("synthia", matrix, lookup("unified"))
    assert extra == {
        "miou16": metrics.miou(matrix, classes=CLASS_SETS[16]),
        "miou13": metrics.miou(matrix, classes=CLASS_SETS[13]),
    }
    assert extra_scores("gta5", matrix, lookup("unified")) == {}


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
