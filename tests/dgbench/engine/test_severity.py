"""mIoU over severities: curves of made-up records by hand, and a small model on two rendered scenes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mfuser
from dgbench import metrics, render, results, streets
from dgbench.data import catalog
from dgbench.data.corruptions import CORRUPTIONS, Corrupted, Corruption
from dgbench.data.labels import CLASSES
from dgbench.engine.evaluate import evaluate
from dgbench.engine.severity import CONDITIONS, MEAN, Curve, Sweep, curves, measure, sweeps
from dgbench.errors import DataError, ResultError
from dgbench.progress import Silent
from dgbench.recipe import dump, load_recipe
from dgbench.render.severity import severity_rows, severity_tables
from dgbench.render.table import plain
from dgbench.report.leaderboard import leaderboard

sys.path.insert(0, str(Path(__file__).parents[1]))
from records import record

SIZE = (64, 128)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    path = tmp_path_factory.mktemp("cache")
    os.environ["DGBENCH_CACHE"] = str(path)
    yield path
    del os.environ["DGBENCH_CACHE"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache):
    """A model that sees many classes anywhere."""
    small = ["data.size=[64, 128]", "data.crop=[64, 64]", "data.val_images=3", "eval.batch_size=2"]
    recipe = load_recipe("streets/source-only", small)
    model = mfuser.build(recipe.method.name, **recipe.method.options, image_size=recipe.data.crop)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("runs") / "a-run"
    mfuser.save(model, path / "checkpoint" / "step-000001")
    dump(recipe, path / "recipe.yaml")
    return path


def scored(run: Path, *names: str, limit: int | None = 2, **how):
    return measure(run, sweeps([catalog.lookup(n) for n in names], **how), progress=Silent(), device="cpu", limit=limit)


def stored(folder: Path, name: str, matrices, images="abcdef", **fields) -> results.Record:
    """A record of what the matrices say, written with them."""
    counts = np.asarray(matrices)
    total = counts.sum(0)
    rest = {"miou": metrics.miou(total), "interval": metrics.interval(counts), "n_images": len(counts), **fields}
    return results.write(record(name, **{"id": f"{results.new_id()}", **rest}), folder, counts, list(images[: len(counts)]))


def two_class(*right: int) -> list[list[list[int]]]:
    """Matrices of 19 classes, two of which occur: of 100 pixels each so many are right in each image."""
    found = np.zeros((len(right), 19, 19), int)
    found[:, 0, 0], found[:, 0, 1] = right, 100 - np.array(right)
    found[:, 1, 1], found[:, 1, 0] = right, 100 - np.array(right)
    return found


def sweep_of(*records: results.Record, domain: str = "streets-fog") -> tuple[Sweep, dict[str, results.Record]]:
    places = tuple(np.linspace(0, 1, len(records)))
    rows = tuple(catalog.lookup(one.target) for one in records)
    return Sweep(domain, "", places, rows), {one.target: one for one in records}


# ---- curves


def test_the_area_is_numpys_trapezoid_and_the_retention_its_part_of_the_first_score(tmp_path):
    right = ((90, 95, 85), (80, 85, 75), (50, 55, 45))
    names = ("streets-fog@0", "streets-fog@0.5", "streets-fog@1")
    sweep, records = sweep_of(*(stored(tmp_path, name, two_class(*r)) for name, r in zip(names, right, strict=True)))
    (curve,) = curves([sweep], records)
    # r of 100 right in both classes: IoU r / (200 - r)
    by_hand = [270 / 330, 240 / 360, 150 / 450]
    assert [point.miou for point in curve.points] == pytest.approx(by_hand)
    assert curve.area == pytest.approx(np.trapezoid(by_hand, [0, 0.5, 1]))
    assert curve.retention == pytest.approx(curve.area / by_hand[0])
    assert curve.interval[0] < curve.area < curve.interval[1]


def test_the_areas_interval_is_the_jackknife_over_images_at_all_severities_at_once(tmp_path):
    counts = [two_class(90, 60, 85, 70), two_class(50, 20, 45, 30)]
    images = ("a", "b", "c", "d")
    sweep, records = sweep_of(
        stored(tmp_path, "streets-fog@0", counts[0], images),
        stored(tmp_path, "streets-fog@1", counts[1][::-1], images[::-1]),  # another order in the file
    )
    (curve,) = curves([sweep], records)
    without = [np.mean([metrics.miou(np.delete(c, i, axis=0).sum(0)) for c in counts]) for i in range(4)]
    error = np.sqrt(3 / 4 * ((without - np.mean(without)) ** 2).sum())
    assert curve.interval[1] - curve.area > 1.96 * error, "Student's quantile of few images is larger than the normal one"
    assert curve.interval[1] - curve.area == pytest.approx(curve.area - curve.interval[0])
    assert curve.area == pytest.approx(np.mean([metrics.miou(c.sum(0)) for c in counts]))


def test_a_curve_that_does_not_begin_at_0_has_an_area_over_its_range_and_no_retention(tmp_path):
    sweep, records = sweep_of(
        stored(tmp_path, "streets-fog@0.5", two_class(80, 80)), stored(tmp_path, "streets-fog@1", two_class(60, 60))
    )
    (curve,) = curves([Sweep(sweep.domain, "", (0.5, 1.0), sweep.targets)], records)
    assert curve.area == pytest.approx((80 / 120 + 60 / 140) / 2)
    assert curve.retention is None


def test_an_undefined_score_leaves_no_area(tmp_path):
    sweep, records = sweep_of(
        stored(tmp_path, "streets-fog@0", two_class(80, 80)),
        stored(tmp_path, "streets-fog@1", np.zeros((2, 19, 19), int), miou=None, interval=(None, None)),
    )
    (curve,) = curves([sweep], records)
    assert (curve.area, curve.retention, curve.interval) == (None, None, (None, None))
    assert "–" in plain(severity_tables(severity(curve))[0])


def test_scores_of_other_images_make_no_curve(tmp_path):
    sweep, records = sweep_of(
        stored(tmp_path, "streets-fog@0", two_class(80, 80), ("a", "b")),
        stored(tmp_path, "streets-fog@1", two_class(60, 60), ("a", "x")),
    )
    with pytest.raises(ResultError, match="are not of the same images"):
        curves([sweep], records)


def severity(*found: Curve):
    from dgbench.engine.severity import Severity

    return Severity(Path("runs/a"), "mfuser", "tiny + tiny", "streets/mfuser", "streets-game", "unified", "c3409c4a", found)


# ---- what is scored


def test_weather_is_over_severities_and_everything_else_over_corruptions():
    found = sweeps([catalog.lookup(name) for name in ("streets-fog", "cityscapes")], corruptions=["fog"], levels=[5, 1])
    assert [(one.domain, one.corruption, one.severities) for one in found] == [
        ("streets-fog", "", (0.0, 0.25, 0.5, 0.75, 1.0)),
        ("cityscapes", "fog", (0.0, 0.2, 1.0)),
    ]
    cityscapes = catalog.lookup("cityscapes")
    assert [one.severity for one in found[0].targets] == [0, 0.25, 0.5, 0.75, 1]
    assert found[1].targets == (cityscapes, *(Corrupted(cityscapes, Corruption("fog", level)) for level in (1, 5)))
    assert len(sweeps([cityscapes])) == len(CORRUPTIONS)


@pytest.mark.parametrize(
    ("names", "how", "message", "hint"),
    [
        (["streets-fog@0.5"], {}, "`streets-fog@0.5` is of one severity", "`streets-fog`, and severities with --steps"),
        (["streets-fog"], {"steps": [0.5, 0.5]}, "one severity is no curve", "--steps 0 0.5 1"),
        (["streets-fog"], {"levels": [1]}, "--corruptions and --levels are of domains without", "--steps"),
        (["streets-fog"], {"corruptions": ["fog"]}, "--corruptions and --levels are of domains without", "--steps"),
        (["streets-city"], {"steps": [0, 1]}, "--steps is of weather, which `streets-city` has not", "--levels"),
        (["streets-city"], {"corruptions": ["elastic"]}, "unknown corruption `elastic`", "choose from brightness"),
        (["streets-city"], {"levels": [6]}, "has no level 6", "1, 2, 3, 4, 5"),
    ],
)
def test_what_cannot_be_a_curve_is_refused_with_advice(names, how, message, hint):
    with pytest.raises(DataError) as caught:
        sweeps([catalog.lookup(name) for name in names], **how)
    assert message in caught.value.message
    assert hint in caught.value.hint


# ---- a run


def test_weather_is_scored_as_eval_scores_it(run):
    found = scored(run, "streets-fog", steps=[0, 1], limit=None)
    (again,) = evaluate(run, ["streets-fog@1"], progress=Silent(), device="cpu")
    (curve,) = found.curves
    assert curve.points[1].miou == again.miou
    assert curve.points[1].interval == again.interval
    assert (curve.n_images, curve.n_available, curve.partial) == (3, 100, True)
    kinds = {one.target: one.kind for one in results.query(run) if one.id in curve.points[1].records}
    assert kinds == {"streets-fog@1": "eval"}


def test_what_is_scored_already_is_not_scored_again(run):
    first = scored(run, "streets-city", "streets-snow", corruptions=["contrast"], levels=[5], steps=[0, 1])
    before = {path.name: path.stat().st_mtime_ns for path in run.glob("record-*")}
    assert scored(run, "streets-city", "streets-snow", corruptions=["contrast"], levels=[5], steps=[0, 1]) == first
    assert {path.name: path.stat().st_mtime_ns for path in run.glob("record-*")} == before
    more = scored(run, "streets-city", corruptions=["contrast"], levels=[3, 5])
    assert len(set(run.glob("record-*"))) == len(before) + 1
    assert more.curves[0].points[0::2] == first.curves[-1].points
    fewer = scored(run, "streets-snow", steps=[0, 1], limit=1)
    assert fewer.curves[0].n_images == 1, "scores of other numbers of images are others"
    assert not list(run.glob(".scoring-*"))


def test_a_record_whose_matrices_are_gone_is_scored_again(run):
    scored(run, "streets-rain", steps=[0, 1])
    (old,) = [one for one in results.query(run) if one.target == "streets-rain@1"]
    (run / old.confusion).unlink()
    again = scored(run, "streets-rain", steps=[0, 1])
    assert again.curves[0].points[1].miou == old.miou
    assert again.curves[0].points[1].records != (old.id,)


def test_rare_classes_of_the_same_scenes_are_told_once(run, caplog):
    scored(run, "streets-adverse", steps=[0, 0.5, 1])
    told = [each.getMessage() for each in caplog.records if "fewer than 5 of the scored images" in each.getMessage()]
    assert [line.split()[0] for line in told] == ["streets-adverse@0"]


def test_no_leaderboard_shows_scores_of_corrupted_or_of_fewer_images(run):
    scored(run, "streets-city", corruptions=["contrast"], levels=[5])
    scored(run, "streets-night", steps=[0, 1])
    kinds = {one.target: one.kind for one in results.query(run)}
    assert kinds["streets-city+contrast@5"] == kinds["streets-night@1"] == kinds["streets-city"] == "severity"
    board = leaderboard(results.query(run))
    shown = {target for group in board.groups for target in group.targets}
    assert not {name for name in shown if "+" in name or "night" in name}


def test_files_are_corrupted_and_their_labels_are_not(run, tmp_path):
    ids = np.array([c.label_id for c in CLASSES], np.uint8)
    pixels = []
    for number in range(2):
        image, label = streets.render("streets-city", "val", number, SIZE)
        label = np.where(label == 255, 0, label)
        pixels.append(np.bincount(label.ravel(), minlength=19))
        stem = f"cityscapes/{{}}/val/lindau/lindau_{number:06d}_000019_{{}}.png"
        for array, names in ((image, ("leftImg8bit", "leftImg8bit")), (ids[label], ("gtFine", "gtFine_labelIds"))):
            path = tmp_path / stem.format(*names)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
    wanted = sweeps([catalog.lookup("cityscapes")], corruptions=["contrast", "zoom_blur"], levels=[1, 5])
    found = measure(run, wanted, progress=Silent(), device="cpu", root=tmp_path)
    assert [(one.corruption, one.n_images, one.n_available) for one in found.curves] == [
        ("contrast", 2, 500),
        ("zoom_blur", 2, 500),
        (MEAN, 2, 500),
    ]
    by_target = {one.target: one for one in results.query(run) if one.target.startswith("cityscapes")}
    assert set(by_target) == {"cityscapes", *(f"cityscapes+{n}@{level}" for n in ("contrast", "zoom_blur") for level in (1, 5))}
    for one in by_target.values():
        assert np.array_equal(results.read_confusion(one).sum(2), pixels)
    assert len({one.protocol_hash for one in by_target.values()}) == 5
    assert by_target["cityscapes"].kind == "eval"
    predicted = [results.read_confusion(by_target[n]).sum(1) for n in ("cityscapes", "cityscapes+contrast@5")]
    assert not np.array_equal(*predicted)
    contrast, zoom, mean = found.curves
    assert mean.area == pytest.approx((contrast.area + zoom.area) / 2)
    assert mean.points[0] == contrast.points[0] == zoom.points[0]
    assert mean.points[2].miou == pytest.approx((contrast.points[2].miou + zoom.points[2].miou) / 2)
    assert len(mean.points[2].records) == 2


# ---- how it is shown


@pytest.fixture
def shown(tmp_path) -> tuple[Curve, ...]:
    sweep, records = sweep_of(
        stored(tmp_path, "streets-fog@0", two_class(90, 95, 85)), stored(tmp_path, "streets-fog@1", two_class(50, 55, 45))
    )
    (weather,) = curves([sweep], records)
    row = catalog.lookup("cityscapes")
    targets = (row, Corrupted(row, Corruption("fog", 5)))
    clean, worst = (
        stored(tmp_path, name, two_class(*right), n_available=500)
        for name, right in (("cityscapes", (90, 80, 70)), ("cityscapes+fog@5", (60, 50, 40)))
    )
    corrupted = curves([Sweep("cityscapes", "fog", (0.0, 1.0), targets)], {"cityscapes": clean, "cityscapes+fog@5": worst})
    return weather, *corrupted


def test_tables_have_the_scores_the_area_and_what_is_kept(shown):
    weather, corrupted = map(plain, severity_tables(severity(*shown)))
    assert weather.splitlines()[2].split()[:4] == ["streets-fog", "81.8", "33.3", "57.6"]
    assert "70 %" in weather
    assert corrupted.splitlines()[1].split() == ["domain", "corruption", "clean", "5", "area", "kept", "images"]
    assert corrupted.splitlines()[2].endswith("3 of 500")


def test_rows_for_other_programs_are_one_for_each_score(shown):
    rows = severity_rows(severity(*shown))
    assert [(row["domain"], row["corruption"], row["severity"]) for row in rows] == [
        ("streets-fog", "", 0.0),
        ("streets-fog", "", 1.0),
        ("cityscapes", "fog", 0.0),
        ("cityscapes", "fog", 1.0),
    ]
    assert rows[1]["miou"] == pytest.approx(1 / 3)
    assert rows[0]["area"] == rows[1]["area"]
    assert not any(isinstance(value, tuple | dict) for row in rows for value in row.values())


def test_json_has_every_point(shown, capsys):
    render.show(severity(*shown), "json")
    told = json.loads(capsys.readouterr().out)
    assert [point["severity"] for point in told["curves"][0]["points"]] == [0.0, 1.0]


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_plot_has_a_panel_of_weather_and_one_for_each_corrupted_domain(shown, suffix, tmp_path):
    path = render.draw_severity(severity(*shown), tmp_path / f"curves{suffix}")
    again = render.draw_severity(severity(*shown), tmp_path / f"again{suffix}")
    assert path.read_bytes() == again.read_bytes(), "the same numbers make the same file"
    if suffix == ".png":
        with Image.open(path) as image:
            assert image.width > image.height
    else:
        text = path.read_text()
        for words in ("weather of rendered streets, 3 of 100 images", "cityscapes, 3 of 500 images", "fog, area 57.6"):
            assert words in text


def test_the_default_conditions_have_a_severity():
    assert all(one.corruption == "" for one in sweeps([catalog.lookup(name) for name in CONDITIONS]))
