"""What is drawn of predictions: kinds of pictures, several models, images of domains, figures; which flags go together."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import mfuser
from dgbench import cli, metrics, results
from dgbench.data import sheet
from dgbench.data.catalog import lookup
from dgbench.data.dataset import SegDataset
from dgbench.data.domains import DOMAINS
from dgbench.data.export import export
from dgbench.engine.evaluate import evaluate
from dgbench.progress import Silent
from dgbench.recipe import dump, load_recipe

SIZE = (64, 128)
COLORS = {"car": (0, 0, 142), "road": (128, 64, 128)}


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DGBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of models that see many classes anywhere."""
    folder = tmp_path_factory.mktemp("runs")
    settings = ["data.size=[64, 128]", "data.crop=[64, 64]", "data.val_images=2", "eval.batch_size=1"]
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        model = mfuser.build("source-only", backbone="tiny", image_size=(64, 64), weights="random").eval()
        torch.nn.init.normal_(model.head.weight)
        mfuser.save(model, folder / name / "checkpoint/step-000001")
        dump(load_recipe("streets/source-only", settings), folder / name / "recipe.yaml")
    return folder


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(256, size=(48, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["predict", *map(str, arguments), "--device", "cpu"], prog_name="dgbench")


def written(*arguments: object) -> list[dict]:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def pixels(path: Path | str) -> np.ndarray:
    with Image.open(path) as file:
        return np.asarray(file)


def scene(domain: str, number: int) -> tuple[np.ndarray, np.ndarray]:
    sample = SegDataset(lookup(domain), "val", size=SIZE, limit=number + 1)[number]
    return sample.image, sample.label


def test_ids_and_colours_are_those_of_the_cityscapes_scripts(runs: Path, photo: Path, tmp_path: Path) -> None:
    table = pytest.importorskip("cityscapesscripts.helpers.labels").trainId2label
    kinds = ("train-ids", "label-ids", "color")
    rows = written(photo, "--checkpoint", runs / "first", "--as", *kinds, "--out", tmp_path / "out")
    assert [(row["content"], Path(row["path"]).name) for row in rows] == [(kind, f"photo-{kind}.png") for kind in kinds]
    train_ids, label_ids, colors = (pixels(row["path"]) for row in rows)
    assert train_ids.shape == label_ids.shape == (48, 90)
    assert train_ids.dtype == label_ids.dtype == np.uint8
    assert len(np.unique(train_ids)) > 1
    for value in np.unique(train_ids):
        assert set(label_ids[train_ids == value].tolist()) == {table[value].id}
        assert {tuple(color) for color in colors[train_ids == value].tolist()} == {table[value].color}
    every = np.arange(19, dtype=np.uint8)[None]
    assert sheet.label_ids(every).tolist() == [[table[value].id for value in range(19)]]
    assert sheet.color_map(every).tolist() == [[list(table[value].color) for value in range(19)]]


def test_the_prediction_of_a_domains_image_is_the_one_that_is_scored(runs: Path, tmp_path: Path) -> None:
    (record,) = evaluate(runs / "first", ["streets-fog@0.6"], progress=Silent(), device="cpu")
    rows = written(
        *("--domain", "streets-fog@0.6", "--limit", 2, "--checkpoint", runs / "first"),
        *("--as", "train-ids", "--out", tmp_path),
    )
    assert [row["image"] for row in rows] == ["streets-fog@0.6 000000", "streets-fog@0.6 000001"]
    truths = [scene("streets-fog@0.6", number)[1] for number in range(2)]
    found = [metrics.confusion(pixels(row["path"]), truth, 19) for row, truth in zip(rows, truths, strict=True)]
    assert np.array_equal(found, results.read_confusion(record))


def test_the_picture_of_an_overlay_is_the_image_or_the_colours_at_the_ends_of_opacity(runs: Path, photo: Path) -> None:
    run(photo, "--checkpoint", runs / "first", "--opacity", 0, "--out", "image.png")
    assert np.array_equal(pixels("image.png")[:48], pixels(photo))
    run(photo, "--checkpoint", runs / "first", "--opacity", 1, "--out", "all.png")
    run(photo, "--checkpoint", runs / "first", "--as", "color", "--out", "color.png")
    assert np.array_equal(pixels("all.png")[:48], pixels("color.png"))


def test_contours_are_drawn_on_both_sides_of_a_border_and_nowhere_else() -> None:
    image = np.full((20, 30, 3), 200, np.uint8)
    label = np.zeros((20, 30), np.uint8)
    label[5:12, 10:20] = 13
    label[:, 25:] = 255
    drawn = sheet.overlay(image, label, 0, contours=True)
    padded = np.pad(label, 1, mode="edge")
    around = np.stack([padded[y : y + 20, x : x + 30] for y in range(3) for x in range(3)])
    border = (around != label).any(0) & (label != 255)
    assert border.any()
    assert (drawn[~border] == 200).all()
    assert (drawn[border & (label == 13)] == COLORS["car"]).all()
    assert (drawn[border & (label == 0)] == COLORS["road"]).all()


def test_each_of_several_checkpoints_has_a_folder_of_its_own(runs: Path, photo: Path, tmp_path: Path) -> None:
    both = (runs / "first", runs / "second")
    rows = written(photo, "--checkpoint", *both, "--out", tmp_path / "out")
    assert [row["path"] for row in rows] == [str(tmp_path / f"out/{name}/photo-overlay.png") for name in ("first", "second")]
    assert rows[0]["shares"] != rows[1]["shares"]
    rows = written(photo, "--checkpoint", *both, "--titles", "A b", "A/b", "--out", tmp_path / "out")
    assert [Path(row["path"]).parent.name for row in rows] == ["1-A-b", "2-A-b"]
    refused = run(photo, "--checkpoint", *both, "--out", tmp_path / "one.png")
    assert refused.exit_code == 1
    assert "2 pictures cannot all be written to" in refused.stderr


def test_side_by_side_shows_the_image_the_truth_and_each_model(runs: Path, photo: Path, tmp_path: Path) -> None:
    both = (runs / "first", runs / "second")
    (row,) = written("--domain", "streets-city", "--ids", 1, "--side-by-side", "--as", "color", "--checkpoint", *both)
    assert row["models"] == ["first", "second"]
    picture, (image, truth) = pixels(row["path"]), scene("streets-city", 1)
    top = next(y for y in range(40) if np.array_equal(picture[y : y + 64, :128], image))
    gap = (picture.shape[1] - 4 * 128) // 3
    second = picture[top : top + 64, 128 + gap : 2 * 128 + gap]
    assert np.array_equal((second == (70, 70, 70)).all(-1), truth == 2)
    (row,) = written(photo, "--side-by-side", "--checkpoint", *both, "--out", tmp_path)
    assert pixels(row["path"]).shape[1] < 4 * 90, "nobody knows the truth of a photograph"


def test_a_figure_has_a_row_for_each_domain_and_the_image_that_is_asked_for(runs: Path, tmp_path: Path) -> None:
    both = (runs / "first", runs / "second")
    (row,) = written(
        *("--grid", tmp_path / "figure.png", "--domain", "streets-city", "streets-night", "--ids", "streets-night:2"),
        *("--checkpoint", *both, "--titles", "Ours", "A much longer title of some other method that is too wide for it"),
    )
    assert (row["image"], row["content"], row["path"]) == ("2 images", "figure", str(tmp_path / "figure.png"))
    picture = pixels(tmp_path / "figure.png")
    for domain, number, part in (("streets-city", 0, picture[:400]), ("streets-night", 2, picture[350:])):
        image = Image.fromarray(scene(domain, number)[0])
        expected = np.asarray(image.resize((640, 320), Image.Resampling.LANCZOS))
        places = [(y, x) for y in range(len(part) - 320) for x in range(100) if (part[y, x] == expected[0, 0]).all()]
        assert any(np.array_equal(part[y : y + 320, x : x + 640], expected) for y, x in places)


def test_images_are_chosen_by_number_name_and_path(runs: Path, tmp_path: Path) -> None:
    export("streets-city", "cityscapes", tmp_path, n=3, size=SIZE, splits=["val"])
    first, second, _ = (path.relative_to(tmp_path / "cityscapes") for path in sorted(tmp_path.rglob("*_leftImg8bit.png")))
    rows = written(
        *("--domain", "cityscapes", "streets-city", "--root", tmp_path, "--checkpoint", runs / "first"),
        *("--ids", second.stem, first, 5, "--as", "train-ids", "--out", tmp_path / "out"),
    )
    assert [row["image"] for row in rows] == [f"cityscapes {second}", f"cityscapes {first}", "streets-city 000005"]
    refused = run("--domain", "streets-city", "--ids", 100, "--checkpoint", runs / "first")
    assert "no image `100` in `streets-city`" in refused.stderr


def test_pictures_say_whether_their_images_may_be_passed_on(runs: Path, tmp_path: Path) -> None:
    export("streets-city", "cityscapes", tmp_path, n=1, size=SIZE, splits=["val"])
    shown = ("--domain", "cityscapes", "--root", tmp_path, "--checkpoint", runs / "first", "--as", "color")
    assert [row["redistributable"] for row in written(*shown)] == [True], "an export holds rendered scenes"
    for mark in tmp_path.rglob(".dgbench-rendered"):
        mark.unlink()
    done = run(*shown, "--json")
    assert [row["redistributable"] for row in json.loads(done.stdout)] == [False]
    assert "cityscapes (research, non-commercial): ask before you publish them" in done.stderr


def test_only_what_everybody_may_pass_on_counts_as_redistributable() -> None:
    free = {name for name, row in DOMAINS.items() if row.redistributable}
    assert free == {"urbansyn", *(name for name in DOMAINS if name.startswith("streets-"))}


def test_a_photograph_may_stand_behind_the_checkpoint(runs: Path, photo: Path, tmp_path: Path) -> None:
    assert run("--checkpoint", runs / "first", photo, "--out", tmp_path / "o.png").exit_code == 0
    assert (tmp_path / "o.png").is_file()


def test_ids_are_not_written_into_a_format_that_changes_pixels(runs: Path, photo: Path, tmp_path: Path) -> None:
    done = run(photo, "--checkpoint", runs / "first", "--as", "label-ids", "--out", tmp_path / "o.jpg")
    assert done.exit_code == 1
    assert "would not keep the ids of the classes" in done.stderr
    assert not (tmp_path / "o.jpg").exists()


def test_no_picture_replaces_a_photograph(runs: Path, photo: Path) -> None:
    other = photo.with_name("photo-color.png")
    other.write_bytes(photo.read_bytes())
    done = run(photo, other, "--checkpoint", runs / "first", "--as", "color", "--out", photo.parent)
    assert "is one of the photographs: its color would replace it" in done.stderr
    assert other.read_bytes() == photo.read_bytes()
    assert len(written(photo.parent, "--checkpoint", runs / "first", "--as", "color", "--out", photo.parent / "out")) == 1


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("x.jpg --domain streets-city", "'PHOTO': --domain takes no photographs"),
        ("--grid a.png", "'--grid': needs the domains whose images it shows"),
        ("--grid a.bmp --domain streets-city", "'--grid': a.bmp must end in .png, .jpg"),
        ("--grid a.png --domain streets-city --as label-ids", "'--as': takes one of overlay and color in one picture"),
        ("x.jpg --side-by-side --as overlay color", "'--as': takes one of overlay and color in one picture"),
        ("x.jpg --ids 3", "'--ids': goes with --domain or --grid, not with PHOTO"),
        ("x.jpg --partial", "'--partial': goes with --submission, not with PHOTO"),
        ("--submission acdc --ids 3", "'--ids': goes with --domain or --grid, not with --submission"),
        ("--submission acdc --out a.tar", "'--out': a.tar must end in .zip"),
        ("--submission acdc --checkpoint a b", "'--checkpoint': takes one run with --submission, 2 were given"),
        ("--domain streets-city --ids 1 --limit 2", "'--limit': says how many are taken where no --ids say which"),
        ("x.jpg --as color --contours", "'--contours': is of overlays, --as says color"),
        ("x.jpg --opacity 1.5", "'--opacity': must be at most 1.0, got 1.5"),
        ("x.jpg --as nosuch", "'--as': 'nosuch' is not one of 'overlay'"),
        ("x.jpg --titles a b", "'--titles': takes a different title for each of 1 checkpoints, got a, b"),
    ],
)
def test_flags_that_say_nothing_together_exit_2(typed: str, said: str) -> None:
    done = run(*typed.split())
    assert done.exit_code == 2
    assert f"error: invalid value for {said}" in done.stderr
