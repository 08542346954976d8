"""Exported scenes are what they were rendered as, and are found, verified and read as the published sets are."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from dgbench import cli, temporaries
from dgbench.data.catalog import lookup
from dgbench.data.dataset import SegDataset
from dgbench.data.domain import Domain, Layout
from dgbench.data.domains import DOMAINS
from dgbench.data.export import export
from dgbench.data.labels import IGNORE, LABEL_MAPS, NAMES
from dgbench.data.verify import verify
from dgbench.errors import DataError

SIZE = (64, 128)
STREETS = "streets-city"
ROWS = [row for row in DOMAINS.values() if not row.procedural and row.label_map]
# what each set's own labels cannot say: SYNTHIA has 16 of the classes; WildDash has no trains
LACKS = {"synthia": {"terrain", "truck", "train"}, "wilddash2": {"train"}, "idd": set()}
REAL_NAMES = {
    "gta5": "images/00001.png",
    "synthia": "RGB/0000000.png",
    "urbansyn": "rgb/rgb_0001.png",
    "cityscapes": "leftImg8bit/train/streets-city/streets-city_000000_000000_leftImg8bit.png",
    "acdc": "rgb_anon/fog/train/GOPR0475/GOPR0475_frame_000000_rgb_anon.png",
    "acdc-snow": "rgb_anon/snow/train/GOPR0475/GOPR0475_frame_000000_rgb_anon.png",
    "dark-zurich": "rgb_anon/val/night/GOPR0356/GOPR0356_frame_000000_rgb_anon.png",
    "idd": "leftImg8bit/train/0/000000_leftImg8bit.png",
    "wilddash2": "images/aa0000_100000.jpg",
}


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DGBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], prog_name="dgbench")


def same(root: Path, domain: str, split: str, lacks: set[str] = frozenset(), label_map: str | None = None) -> SegDataset:
    """Compare a split with what was rendered, pixel by pixel."""
    read = SegDataset(lookup(domain, root), split, root=root, label_map=label_map)
    scenes = SegDataset(lookup(STREETS), "val" if split.endswith("val") else "train", size=SIZE, limit=len(read))
    for got, rendered in zip(read, scenes, strict=True):
        expected = np.where(np.isin(rendered.label, [NAMES.index(name) for name in lacks]), IGNORE, rendered.label)
        assert np.array_equal(got.label, expected)
        if got.name.endswith(".png"):
            assert np.array_equal(got.image, rendered.image)
        else:
            assert got.name.endswith(".jpg")
            assert np.abs(got.image.astype(int) - rendered.image).mean() < 6
    return read


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_each_published_domain_is_listed_verified_and_read(row: Domain, tmp_path: Path) -> None:
    done = run("data", "export", STREETS, "--as", row.name, "--out", tmp_path, "--n", 2, "--size", *SIZE, "--json")
    assert done.exit_code == 0, done.stderr
    exported = json.loads(done.stdout)
    splits = [split for split in ("train", "val") if split in row.splits]
    assert [(one["split"], one["n_images"]) for one in exported] == [(split, 2) for split in splits]
    states = json.loads(run("data", "list", "--root", tmp_path, "--json").stdout)
    (state,) = [state for state in states if state["name"] == row.name]
    assert {split: (here["layout"], here["n_pairs"]) for split, here in state["here"].items() if split in splits} == {
        split: (row.splits[split].layouts[0].name, 2) for split in splits
    }
    assert all(state["here"][split]["rendered"] for split in splits)
    verified = run("data", "verify", row.name, "--root", tmp_path, "--partial")
    assert verified.exit_code == 0
    assert "not the published set" in verified.stdout
    for split in splits:
        read = same(tmp_path, row.name, split, LACKS.get(row.name, set()))
        assert len(read) == 2
    if row.name in REAL_NAMES:
        assert (tmp_path / row.folders[0] / REAL_NAMES[row.name]).is_file()


LAYOUTS = [
    pytest.param(row, split, layout, id=f"{row.name}-{split}-{layout.name}")
    for row in ROWS
    if row.name not in ("acdc-fog", "acdc-night", "acdc-rain")
    for split in row.splits
    if split != "train" or "val" not in row.splits
    for i, layout in enumerate(row.splits[split].layouts)
    if layout.name not in [earlier.name for earlier in row.splits[split].layouts[:i]]
]


@pytest.mark.parametrize(("row", "split", "layout"), LAYOUTS)
def test_each_layout_is_found_by_its_name(row: Domain, split: str, layout: Layout, tmp_path: Path) -> None:
    export(STREETS, row.name, tmp_path, n=1, size=SIZE, splits=[split], layout=layout.name)
    report = verify(row.name, split, tmp_path)
    assert (report.layout, report.ok, report.n_pairs) == (layout.name, True, 1)
    classes = LABEL_MAPS[layout.label_map or row.label_map].classes.values()
    same(tmp_path, row.name, split, {name for i, name in enumerate(NAMES) if i not in classes} | LACKS.get(row.name, set()))


def test_labels_are_encoded_as_the_published_ones_are(tmp_path: Path) -> None:
    for domain in ("gta5", "mapillary", "synthia", "wilddash2", "cityscapes", "bdd100k"):
        export(STREETS, domain, tmp_path, n=1, size=SIZE)
    for palette_image in ("gta5/labels/00001.png", *_under(tmp_path, "mapillary/validation/labels/*.png")):
        with Image.open(tmp_path / palette_image) as file:
            assert file.mode == "P"
            used = {
                LABEL_MAPS["gta5-ids" if "gta5" in palette_image else "mapillary-robustnet"].classes.get(v)
                for v in np.unique(np.asarray(file)).tolist()
            }
            colors = {tuple(color) for color in np.unique(np.asarray(file.convert("RGB")).reshape(-1, 3), axis=0).tolist()}
            # in colour they look as Cityscapes does: road is purple, what is ignored is black
            assert len(colors) == len(used)
            assert (128, 64, 128) in colors
    for grey in ("cityscapes/gtFine/val/*/*_labelIds.png", "bdd100k/labels/sem_seg/masks/val/*.png"):
        with Image.open(tmp_path / _under(tmp_path, grey)[0]) as file:
            assert file.mode == "L"
    pixels = cv2.imread(str(tmp_path / "synthia/GT/LABELS/0000000.png"), cv2.IMREAD_UNCHANGED)
    assert pixels.dtype == np.uint16
    (scene,) = SegDataset(lookup(STREETS), "train", size=SIZE, limit=1)
    assert ((pixels[..., 2] == 8) == (scene.label == NAMES.index("car"))).all()
    assert ((pixels[..., 1] > 0) == np.isin(scene.label, range(NAMES.index("person"), 19))).all()
    told = json.loads((tmp_path / "wilddash2/panoptic.json").read_text())
    with Image.open(tmp_path / "wilddash2/panoptic" / told["annotations"][0]["file_name"]) as file:
        segments = np.asarray(file).astype(int) @ (1, 256, 65536)
    areas = {segment["id"]: segment["area"] for segment in told["annotations"][0]["segments_info"]}
    assert areas == dict(zip(*(values.tolist() for values in np.unique(segments, return_counts=True)), strict=True))


def _under(root: Path, glob: str) -> list[str]:
    return [path.relative_to(root).as_posix() for path in sorted(root.glob(glob))]


def test_what_labels_cannot_express_is_ignored_and_counted(tmp_path: Path) -> None:
    scenes = np.stack([sample.label for sample in SegDataset(lookup(STREETS), "train", size=SIZE, limit=4)])
    counts = {name: int((scenes == NAMES.index(name)).sum()) for name in ("terrain", "truck", "train")}
    (done,) = export(STREETS, "synthia", tmp_path, n=4, size=SIZE)
    assert counts["terrain"] > 0
    assert done.ignored == {name: n for name, n in counts.items() if n}
    told = run("data", "export", STREETS, "--as", "synthia", "--out", tmp_path / "b", "--n", 4, "--size", *SIZE, "--quiet")
    assert f"terrain {counts['terrain']}" in told.stdout


def test_labels_may_be_written_by_another_of_the_domains_maps(tmp_path: Path) -> None:
    export(STREETS, "idd", tmp_path, n=1, size=SIZE, label_map="idd-no-terrain")
    same(tmp_path, "idd", "train", {"terrain"}, "idd-no-terrain")
    with pytest.raises(DataError, match="`idd` is not read by the label map `train-ids`"):
        export(STREETS, "idd", tmp_path / "b", n=1, size=SIZE, label_map="train-ids")


@pytest.mark.parametrize(
    "declared",
    [
        "encoding: polygons\nlabel_map: {street: road, human: person}\nignored: [unlabeled]",
        "label_map: {300: road, 2: person}\nignored: [0]",
        "encoding: panoptic\nlabel_map: {300: road, 2: person}\nignored: [9]",
        "encoding: rgb16\nlabel_map: {3: road, 2: person}",
        "encoding: colors",
    ],
    ids=["polygons", "16 bits", "panoptic", "rgb16", "colors"],
)
def test_a_user_domain_is_a_row_like_any_other(declared: str, tmp_path: Path) -> None:
    suffix = ".json" if "polygons" in declared else ".png"
    (tmp_path / "domains").mkdir()
    (tmp_path / "domains/mine.yaml").write_text(
        f"folder: my-folder\nsplits: {{val: {{images: '*/photos/x_*.png', labels: {{/photos/: /masks/, .png: {suffix}}}}}}}\n"
        + declared
    )
    (done,) = export(STREETS, "mine", tmp_path, n=2, size=SIZE)
    lacks = set() if "colors" in declared else set(NAMES) - {"road", "person"}
    assert len(same(tmp_path, "mine", "val", lacks)) == 2
    assert (tmp_path / "my-folder/val/photos/x_000000.png").is_file()
    assert set(done.ignored) <= lacks


@pytest.mark.parametrize(
    "moved", ["cityscapes", "cityscapes/leftImg8bit", "cityscapes/gtFine", "cityscapes/gtFine/val/streets-city"]
)
def test_wherever_a_part_of_an_export_is_moved_it_says_what_it_is(
    moved: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The other part comes from elsewhere, without a word of an export."""
    export(STREETS, "cityscapes", tmp_path / "a", n=2, size=SIZE, splits=["val"])
    plain = shutil.ignore_patterns(".dgbench-rendered")
    shutil.copytree(tmp_path / "a", tmp_path / "real", ignore=plain)
    assert not SegDataset(lookup("cityscapes"), "val", root=tmp_path / "real").exported
    assert "rendered" not in caplog.text
    shutil.rmtree(tmp_path / "real" / moved)
    (tmp_path / "a" / moved).rename(tmp_path / "real" / moved)
    mixed = SegDataset(lookup("cityscapes"), "val", root=tmp_path / "real")
    assert mixed.exported
    assert mixed.revision == "official, rendered"
    assert "holds rendered scenes (dgbench data export), not the published set" in caplog.text
    assert ", rendered" in run("data", "list", "--root", tmp_path / "real").stdout


def test_nothing_is_downloaded_into_an_export(tmp_path: Path) -> None:
    export(STREETS, "cityscapes", tmp_path, n=1, size=SIZE, splits=["val"])
    refused = run("download", "cityscapes", "--root", tmp_path, "--yes")
    assert refused.exit_code == 1
    assert "holds rendered scenes" in refused.stderr
    shutil.rmtree(tmp_path / "cityscapes")
    export(STREETS, "cityscapes", tmp_path, n=1, size=SIZE)
    listed = run("download", "cityscapes", "--root", tmp_path, "--yes")
    assert "official, rendered" in listed.stdout + listed.stderr


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "bdd").mkdir()
    refused = run("data", "export", STREETS, "--as", "bdd100k", "--out", tmp_path, "--n", 1)
    assert refused.exit_code == 1
    assert f"{tmp_path / 'bdd'} exists" in refused.stderr
    assert _under(tmp_path, "**/*") == ["bdd"]


def test_an_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "domains").mkdir()
    # the second split's images would lie below a file of the first
    splits = "{train: {images: 'a/*.png', labels: {a/: b/}}, val: {images: 'a/000000.png/*.png', labels: {a/: c/}}}"
    (tmp_path / "domains/mine.yaml").write_text(f"folder: mine\nsplits: {splits}\n")
    failed = run("data", "export", STREETS, "--as", tmp_path / "domains/mine.yaml", "--out", tmp_path, "--n", 1)
    assert failed.exit_code == 1
    assert "000000.png" in failed.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["domains"]


@pytest.mark.parametrize(
    ("declared", "key"),
    [
        ("folder: ../../elsewhere\nsplits: {val: {images: 'img/*.png', labels: {img/: gt/}}}", "folder"),
        ("splits: {val: {images: 'img/*.png', labels: {img/: OUTSIDE/}}}", "labels"),
        ("splits: {val: {images: 'img/*.png', labels: {img/: ../../gt/}}}", "labels"),
        ("splits: {../../val: {images: '*/img/x_*.png', labels: {img/: gt/}}}", "splits"),
    ],
)
def test_nothing_is_written_outside_of_the_folder_that_is_given(declared: str, key: str, tmp_path: Path) -> None:
    out = tmp_path / "a/b/out"
    (tmp_path / "mine.yaml").write_text(declared.replace("OUTSIDE", str(tmp_path / "outside")) + "\n")
    refused = run("data", "export", STREETS, "--as", tmp_path / "mine.yaml", "--out", out, "--n", 1, "--size", 32, 64)
    assert refused.exit_code == 1
    assert key in refused.stderr
    assert _under(tmp_path, "**/*") == ["mine.yaml"]


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = temporaries.beside(tmp_path / "cityscapes")
    for folder in (left.with_name(left.name.replace(str(os.getpid()), str(gone.pid))), tmp_path / f".cityscapes.{gone.pid}.tmp"):
        (folder / "leftImg8bit").mkdir(parents=True)
        (folder / "leftImg8bit/a.png").touch()
    running, other = tmp_path / f".cityscapes.{os.getppid()}.tmp", tmp_path / f".other.{gone.pid}.tmp"
    running.mkdir()
    other.mkdir()
    export(STREETS, "cityscapes", tmp_path, n=1, size=SIZE, splits=["val"])
    assert {path.name for path in tmp_path.iterdir()} == {"cityscapes", running.name, other.name}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("streets-city", "--as", "streets-world"), "`streets-world` is rendered and has no files"),
        (("gta5", "--as", "cityscapes"), "`gta5` is not a rendered domain"),
        (("streets-city", "--as", "cityscape"), "did you mean `cityscapes`"),
        (("streets-city", "--as", "bdd", "--layout", "color maps"), "did you mean `colour maps`"),
        (("streets-city", "--as", "cityscapes", "--split", "test"), "`cityscapes` test cannot be scored here"),
        (("streets-city", "--as", "mapillary-v2"), "has no agreed map"),
        (("streets-city", "--as", "bdd", "--size", "16", "64"), "scenes cannot be 16 x 64"),
    ],
)
def test_mistakes_are_told_before_anything_is_rendered(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    refused = run("data", "export", *arguments, "--out", tmp_path)
    assert refused.exit_code == 1
    assert message in " ".join(refused.stderr.split())
    assert not list(tmp_path.iterdir())
