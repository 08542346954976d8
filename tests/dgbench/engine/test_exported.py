"""Exported scenes take the place of the published sets: training, scoring and the official Cityscapes script run on them."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import mfuser
from dgbench import cli, protocol, results
from dgbench.data.export import export
from dgbench.engine import checkpoints
from dgbench.recipe import load_recipe

SIZE = (64, 128)
TARGETS = ("cityscapes", "bdd", "mapillary")
SMALL = (
    "data.size=null",
    "data.crop=[64, 64]",
    "data.train_images=4",
    "train.steps=2",
    "train.batch_size=2",
    "train.workers=0",
    "eval.batch_size=1",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A data root with one source and three targets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DGBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = tmp_path_factory.mktemp("data")
        export("streets-game", "gta5", folder, n=4, size=SIZE)
        export("streets-city", "cityscapes", folder, n=3, size=SIZE, splits=["val"])
        export("streets-world", "bdd100k", folder, n=3, size=SIZE, splits=["val"])
        # every protocol enlarges Mapillary to 2048 pixels of width: a low image keeps that short
        export("streets-adverse", "mapillary", folder, n=1, size=(32, 1024), splits=["val"])
        yield folder


def run(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], prog_name="dgbench")
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def trained(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    run(
        "train",
        "mfuser",
        "--vlm",
        "tiny",
        "--source",
        "gta5",
        "--targets",
        *TARGETS,
        "--set",
        *SMALL,
        "--root",
        root,
        "--out",
        runs / "a",
        "--runs",
        runs,
        "--device",
        "cpu",
        "--no-eval",
    )
    return runs / "a"


def test_training_and_scoring_run_as_on_the_published_sets(root: Path, trained: Path) -> None:
    recipe = load_recipe(trained / "recipe.yaml")
    assert (recipe.data.source, recipe.data.targets) == ("gta5", ("cityscapes", "bdd100k", "mapillary"))
    scored = run("eval", trained, "--targets", *TARGETS, "--root", root, "--device", "cpu", "--json")
    assert [(row["target"], row["n_images"], row["n_available"]) for row in json.loads(scored.stdout)] == [
        ("cityscapes", 3, 500),
        ("bdd100k", 3, 1000),
        ("mapillary", 1, 2000),
    ]
    board = run("leaderboard", "--runs", trained.parent, "--no-published", "--targets", *TARGETS, "--json")
    (group,) = [group for group in json.loads(board.stdout)["groups"] if group["source"] == "gta5"]
    assert group["targets"] == ["cityscapes", "bdd100k", "mapillary"]
    ((row),) = group["rows"]
    assert len([score for score in row["scores"].values() if score]) == 3
    shown = run("leaderboard", "--runs", trained.parent, "--no-published", "--targets", *TARGETS).stdout
    assert all(name in shown for name in ("cityscapes", "bdd100k", "mapillary"))


def test_scores_on_exports_say_so_and_never_share_a_hash_with_the_real_set(trained: Path, tmp_path: Path) -> None:
    export("streets-night", "dark-zurich", tmp_path / "a", n=2, size=(32, 64))
    shutil.copytree(tmp_path / "a", tmp_path / "b", ignore=shutil.ignore_patterns(".dgbench-rendered"))
    scored = [
        json.loads(
            run("eval", trained, "--targets", "dark-zurich", "--root", tmp_path / root, "--device", "cpu", "--json").stdout
        )[0]
        for root in "ab"
    ]
    assert [(row["n_images"], row["n_available"], row["rendered"]) for row in scored] == [(2, 50, True), (2, 50, False)]
    assert scored[0]["miou"] == scored[1]["miou"]
    assert scored[0]["protocol_hash"] != scored[1]["protocol_hash"]
    shown = run("eval", trained, "--targets", "dark-zurich", "--root", tmp_path / "a", "--device", "cpu").stdout
    assert "dark-zurich (rendered)" in shown
    assert "trained on gta5 (rendered)" in shown
    assert "Trained on 4 of 24966 source images" in shown


def test_scores_say_how_much_of_the_source_was_seen(root: Path, trained: Path) -> None:
    (training,) = [record for record in results.query(trained) if record.kind == "train"]
    (row,) = json.loads(run("eval", trained, "--targets", "bdd", "--root", root, "--device", "cpu", "--json").stdout)
    for told in (training, results.Record(**{**row, "path": None})):
        assert (told.source_images, told.source_available, told.source_rendered) == (4, 24966, True)
        assert told.source_complete is False


def test_the_official_script_gives_the_score_that_we_record(
    root: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    labels = pytest.importorskip("cityscapesscripts.helpers.labels")
    run("eval", trained, "--targets", "cityscapes", "--root", root, "--device", "cpu")
    record = max((r for r in results.query(trained.parent) if r.target == "cityscapes"), key=lambda r: r.created)
    to_id = np.array([labels.trainId2label[k].id for k in range(19)], np.uint8)
    model, recipe = checkpoints.load_model(trained), load_recipe(trained / "recipe.yaml")
    stride = protocol.lookup(recipe.eval.protocol).stride_of(recipe.data.crop)
    truths, predictions = sorted((root / "cityscapes/gtFine/val").glob("*/*_gtFine_labelIds.png")), []
    for truth in truths:
        # the script finds predictions by city, sequence and frame
        sequence = truth.name.removesuffix("_gtFine_labelIds.png")
        with Image.open(root / "cityscapes/leftImg8bit/val" / truth.parent.name / f"{sequence}_leftImg8bit.png") as file:
            image = torch.from_numpy(np.array(file)).permute(2, 0, 1)[None].float() / 255
        with torch.inference_mode():
            (scores,) = mfuser.slide(model, image, crop=recipe.data.crop, stride=stride)
        Image.fromarray(to_id[scores.argmax(0).numpy()]).save(tmp_path / f"{sequence}_pred.png")
    official = Namespace(
        evalInstLevelScore=False,
        evalPixelAccuracy=False,
        evalLabels=[],
        bold="",
        nocol="",
        colorized=False,
        quiet=True,
        JSONOutput=False,
        avgClassSize={},
        printRow=5,
        normalized=True,
        predictionPath=str(tmp_path),
        predictionWalk=None,
    )
    predictions = [evaluation.getPrediction(official, str(truth)) for truth in truths]
    scores = evaluation.evaluateImgLists(predictions, [str(truth) for truth in truths], official)
    capsys.readouterr()
    ours = [np.nan if value is None else value for value in record.iou]
    theirs = [scores["classScores"][labels.trainId2label[k].name] for k in range(19)]
    assert len(truths) == 3
    assert np.nansum(ours) > 0
    assert np.array_equal(ours, theirs, equal_nan=True)
    assert record.miou == scores["averageScoreClasses"]
