"""`dgbench data verify`: what is wrong with files is found, named and told by the exit code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from layouts import SIZE, blocks, write_image, write_label, write_split
from PIL import Image
from typer.testing import CliRunner, Result

from dgbench import cli
from dgbench.data.catalog import lookup
from dgbench.data.dataset import SegDataset
from dgbench.data.domains import DOMAINS
from dgbench.data.labels import IGNORE, NAMES
from dgbench.data.sampling import UniformSampler
from dgbench.data.transforms import Augmentation, TrainView
from dgbench.data.verify import Problem, splits_to_verify, verify
from dgbench.errors import DataError

BDD = DOMAINS["bdd100k"]
OFFICIAL = BDD.splits["val"].layouts[0]
IMAGES, LABELS = "images/10k/val", "labels/sem_seg/masks/val"


@pytest.fixture
def bdd(tmp_path: Path) -> Path:
    """Six pairs, and what else there is in the folder."""
    write_split(tmp_path, BDD, OFFICIAL, 6)
    return tmp_path / "bdd100k"


def problems(root: Path) -> list[Problem]:
    return sorted(verify("bdd", "val", root).problems, key=lambda problem: problem.file)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments), prog_name="dgbench")


def test_a_sound_split_is_counted(bdd: Path):
    labels = np.stack([np.asarray(Image.open(path)) for path in sorted((bdd / LABELS).iterdir())])
    report = verify("bdd", "val", bdd.parent)
    assert report.ok
    assert (report.layout, report.label_map, report.folder) == ("official", "train-ids", bdd)
    assert (report.n_pairs, report.n_missing) == (6, 994)
    assert report.sizes == {f"{SIZE[1]}x{SIZE[0]}": 6}
    values, counts = np.unique(labels, return_counts=True)
    assert [(row.value, row.pixels) for row in report.values] == list(zip(values.tolist(), counts.tolist(), strict=True))
    assert all(row.images == sum(row.value in label for label in labels) for row in report.values)
    assert {row.value: row.meaning for row in report.values} == {
        v: "ignored" if v == IGNORE else NAMES[v] for v in values.tolist()
    }
    assert sum(report.shares.values()) == pytest.approx(1)
    labelled = labels[labels != IGNORE]
    assert report.shares["road"] == pytest.approx((labelled == 0).mean())


def test_everything_that_is_wrong_is_listed_at_once(bdd: Path):
    (bdd / IMAGES / "00000.jpg").write_bytes((bdd / IMAGES / "00000.jpg").read_bytes()[:600])
    (bdd / LABELS / "00001.png").write_bytes(b"no picture")
    Image.fromarray(np.full(SIZE, 77, np.uint8)).save(bdd / LABELS / "00002.png")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(bdd / LABELS / "00003.png")
    (bdd / LABELS / "00004.png").unlink()
    write_label(bdd / LABELS / "99.png", blocks([0], 0), BDD.read_by(), "ids")
    found = problems(bdd.parent)
    assert [(problem.kind, problem.file) for problem in found] == [
        ("unreadable", f"{IMAGES}/00000.jpg"),
        ("sizes differ", f"{IMAGES}/00003.jpg"),
        ("no label", f"{IMAGES}/00004.jpg"),
        ("unreadable", f"{LABELS}/00001.png"),
        ("unknown values", f"{LABELS}/00002.png"),
        ("no image", f"{LABELS}/99.png"),
    ]
    assert found[1].detail == f"the image is 64x32, its label {LABELS}/00003.png 8x8"
    assert found[4].detail == "77 not in the label map `train-ids`"
    strange = [row for row in verify("bdd", "val", bdd.parent).values if row.meaning == "unknown"]
    assert [(row.value, row.pixels, row.images) for row in strange] == [(77, SIZE[0] * SIZE[1], 1)]


def test_known_bad_files_are_told_apart_from_problems(bdd: Path):
    write_image(bdd / IMAGES / "80a9e37d-e4548ac1.jpg", 0)
    write_label(bdd / LABELS / "ff55861e-a06b953c.png", blocks([0], 0), BDD.read_by(), "ids")
    report = verify("bdd", "val", bdd.parent)
    assert report.ok
    assert sorted(report.known_bad) == [f"{IMAGES}/80a9e37d-e4548ac1.jpg", f"{LABELS}/ff55861e-a06b953c.png"]
    assert report.n_missing == 993


def test_images_of_one_colour_are_mentioned(bdd: Path):
    Image.new("RGB", SIZE[::-1]).save(bdd / IMAGES / "00005.jpg")
    report = verify("bdd", "val", bdd.parent)
    assert report.ok
    assert report.one_color == (f"{IMAGES}/00005.jpg",)


def test_the_map_that_is_asked_for_reads_the_labels(tmp_path: Path):
    mapillary = DOMAINS["mapillary"]
    write_image(tmp_path / "mapillary/validation/images/a.jpg", 0)
    path = tmp_path / "mapillary/validation/labels/a.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(np.full(SIZE, 44, np.uint8)).save(path)  # street lights
    for name, meaning in (("mapillary-robustnet", "ignored"), ("mapillary-openseg", "pole")):
        assert name in mapillary.label_maps
        assert [row.meaning for row in verify("mapillary", "val", tmp_path, label_map=name).values] == [meaning]


def test_vistas_2_is_shown_by_the_names_of_its_own_configuration(tmp_path: Path):
    write_image(tmp_path / "mapillary/validation/images/a.jpg", 0)
    path = tmp_path / "mapillary/validation/v2.0/labels/a.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(np.array([[0, 21], [21, 21]], np.uint8).repeat(16, 0).repeat(32, 1)).save(path)
    names = [{"readable": f"Label {i}", "name": f"some--label-{i}"} for i in range(124)]
    (tmp_path / "mapillary/config_v2.0.json").write_text(json.dumps({"labels": names}))
    report = verify("mapillary-v2", "val", tmp_path)
    assert report.ok
    assert report.label_map is None
    assert [(row.value, row.meaning) for row in report.values] == [(0, "Label 0"), (21, "Label 21")]


def test_without_a_split_those_on_the_disk_are_verified(bdd: Path):
    assert splits_to_verify("bdd", bdd.parent) == ["val"]
    with pytest.raises(DataError, match="`cityscapes` is not on this disk"):
        splits_to_verify("cityscapes", bdd.parent)
    with pytest.raises(DataError, match="`streets-fog@0.5` is rendered here"):
        splits_to_verify("streets-fog@0.5")


def test_images_without_any_label_make_a_report_too(bdd: Path):
    for path in (bdd / LABELS).iterdir():
        path.unlink()
    report = verify("bdd", "val", bdd.parent)
    assert not report.ok
    assert (report.n_pairs, len(report.problems)) == (0, 6)


def test_the_command_fails_for_a_bad_file_and_for_missing_ones(bdd: Path):
    root = str(bdd.parent)
    done = run("data", "verify", "bdd", "--root", root, "--quiet")
    assert done.exit_code == 1
    assert done.stdout.startswith("bdd100k val: no problems, 994 missing\n")
    assert run("data", "verify", "bdd", "--root", root, "--quiet", "--partial").exit_code == 0
    (bdd / LABELS / "00003.png").unlink()
    done = run("data", "verify", "bdd", "--root", root, "--quiet", "--partial")
    assert done.exit_code == 1
    assert "no label" in done.stdout
    assert f"{IMAGES}/00003.jpg" in done.stdout


def test_a_report_is_printed_as_json(bdd: Path):
    done = run("data", "verify", "bdd", "--split", "val", "--root", str(bdd.parent), "--json", "--quiet")
    (report,) = json.loads(done.stdout)
    assert (report["domain"], report["split"], report["n_pairs"], report["problems"]) == ("bdd100k", "val", 6, [])
    assert report["values"][0].keys() == {"value", "meaning", "pixels", "images"}


def test_list_names_the_layout_on_the_disk(bdd: Path):
    listed = {row["name"]: row for row in json.loads(run("data", "list", "--root", str(bdd.parent), "--json").stdout)}
    assert listed["bdd100k"]["here"] == {
        "val": {"layout": "official", "folder": str(bdd), "n_pairs": 6, "n_expected": 1000, "rendered": False}
    }
    assert listed["bdd100k"]["where"] == str(bdd)
    assert listed["cityscapes"]["where"] is None
    assert listed["mapillary"]["label_maps"] == ["mapillary-robustnet", "mapillary-openseg", "mapillary-wd2-policy"]
    assert "val 6 of 1000: official" in run("data", "list", "--root", str(bdd.parent)).stdout


def test_more_images_than_published_are_told_everywhere(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    row = DOMAINS["dark-zurich"]
    write_split(tmp_path, row, row.splits["val"].layouts[0], 52)
    report = verify("dark-zurich", "val", tmp_path)
    assert (report.n_pairs, report.n_missing, report.n_extra) == (52, 0, 2)
    root = str(tmp_path)
    done = run("data", "verify", "dark-zurich", "--root", root, "--quiet")
    assert done.exit_code == 1
    assert done.stdout.startswith("dark-zurich val: no problems, 2 more than published\n")
    assert run("data", "verify", "dark-zurich", "--root", root, "--quiet", "--partial").exit_code == 0
    assert "val 52, 2 more than published: official" in run("data", "list", "--root", root).stdout
    data = SegDataset(lookup("dark-zurich"), "val", root=tmp_path)
    assert (len(data), data.available, data.extra) == (52, 50, 2)
    assert "52 images are in" in caplog.text
    assert "2 more than the 50 that are published" in caplog.text


def test_show_and_stats_take_the_usual_split_of_a_domain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DGBENCH_CACHE", str(tmp_path / "cache"))
    write_split(tmp_path, DOMAINS["gta5"], DOMAINS["gta5"].splits["train"].layouts[0], 2)
    (row, *_) = json.loads(run("data", "stats", "gta", "--root", str(tmp_path), "--json", "--quiet").stdout)
    assert (row["split"], row["n_images"]) == ("train", 2)
    out = tmp_path / "sheet.png"
    done = run("data", "show", "gta", "--root", str(tmp_path), "--out", str(out), "--json", "--quiet")
    assert json.loads(done.stdout)["split"] == "train"
    assert Image.open(out).width > 0


def turned(path: Path, flag: int) -> None:
    """Write an image again with a flag of EXIF."""
    exif = Image.Exif()
    exif[0x0112] = flag
    with Image.open(path) as file:
        file.load()
        file.save(path, exif=exif)


def test_damaged_data_in_the_middle_of_a_jpeg_is_counted_by_file(bdd: Path, capfd: pytest.CaptureFixture[str]):
    for name in ("00001.jpg", "00004.jpg"):
        data = bytearray((bdd / IMAGES / name).read_bytes())
        data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
        (bdd / IMAGES / name).write_bytes(data)
    found = problems(bdd.parent)
    assert [(p.kind, p.file) for p in found] == [("damaged", f"{IMAGES}/00001.jpg"), ("damaged", f"{IMAGES}/00004.jpg")]
    assert all(p.detail.startswith("the decoder says: Corrupt JPEG data: ") for p in found)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("flag", [3, 6])
def test_images_that_exif_turns_and_labels_are_not_are_counted_and_refused(bdd: Path, flag: int):
    turned(bdd / IMAGES / "00002.jpg", flag)
    report = verify("bdd", "val", bdd.parent)
    assert report.turned == (f"{IMAGES}/00002.jpg",)
    assert [(p.kind, p.file) for p in report.problems] == [("turned", f"{IMAGES}/00002.jpg")]
    shown = run("data", "verify", "bdd", "--split", "val", "--root", str(bdd.parent))
    assert shown.exit_code == 1
    assert "turned by EXIF" in shown.stdout
    dataset = SegDataset(lookup("bdd"), "val", root=bdd.parent)
    says = rf"00002.jpg is to be turned when shown \(EXIF orientation {flag}\), but its label 00002.png is not"
    for read in (dataset.__getitem__, dataset.image):
        with pytest.raises(DataError, match=says):
            read(2)
    assert dataset[1].image.shape == (*SIZE, 3)
    view = TrainView(dataset, UniformSampler(len(dataset), 0), Augmentation((16, 16), (1.0, 1.0), 1.0, 0.0, "none"), 0)
    with pytest.raises(DataError, match=says):
        [view[i] for i in range(6)]


def test_images_and_labels_with_one_orientation_lie_on_each_other(bdd: Path):
    turned(bdd / IMAGES / "00002.jpg", 3)
    turned(bdd / LABELS / "00002.png", 3)
    report = verify("bdd", "val", bdd.parent)
    assert (report.ok, report.turned) == (True, (f"{IMAGES}/00002.jpg",))
    assert SegDataset(lookup("bdd"), "val", root=bdd.parent)[2].image.shape == (*SIZE, 3)


def test_labels_that_are_ignored_all_over_are_told(bdd: Path):
    for path in (bdd / LABELS).iterdir():
        Image.fromarray(np.full(SIZE, IGNORE, np.uint8)).save(path)
    (problem,) = problems(bdd.parent)
    assert (problem.kind, problem.file) == ("nothing labelled", "all labels")
    assert problem.detail == "the labels only hold 255, and no pixel has a class of the label map `train-ids`"
    done = run("data", "verify", "bdd", "--split", "val", "--root", str(bdd.parent))
    assert done.exit_code == 1
    assert "nothing labelled" in done.output


def test_one_label_that_is_ignored_all_over_is_no_problem(bdd: Path):
    Image.fromarray(np.full(SIZE, IGNORE, np.uint8)).save(sorted((bdd / LABELS).iterdir())[0])
    assert verify("bdd", "val", bdd.parent).ok
