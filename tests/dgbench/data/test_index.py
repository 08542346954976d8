"""Every layout of every domain is found, named and read; what has no counterpart is said and left out."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
from layouts import SIZE, write_image, write_label, write_split
from PIL import Image

from dgbench.data import dataset as dataset_module
from dgbench.data.catalog import lookup
from dgbench.data.dataset import SegDataset
from dgbench.data.domain import Layout
from dgbench.data.domains import DOMAINS
from dgbench.data.index import find, index, label_of
from dgbench.errors import DataError

FILES = {d.name: d for d in DOMAINS.values() if not d.procedural}
LAYOUTS = [
    pytest.param(d.name, split, i, id=f"{d.name}-{split}-{layout.name}".replace(" ", "_"))
    for d in FILES.values()
    for split, row in d.splits.items()
    for i, layout in enumerate(row.layouts)
    if d.label_map
]


@pytest.fixture(autouse=True)
def _say_again(monkeypatch: pytest.MonkeyPatch):
    dataset_module._warn.cache_clear()
    monkeypatch.setattr(logging.getLogger("dgbench"), "propagate", True)  # the command line, if it ran before, turns it off


def official(name: str, split: str = "val") -> Layout:
    return FILES[name].splits[split].layouts[0]


@pytest.mark.parametrize(("name", "split", "i"), LAYOUTS)
def test_each_layout_is_found_named_and_equal_pixel_for_pixel(name: str, split: str, i: int, tmp_path: Path):
    layout = FILES[name].splits[split].layouts[i]
    labels = write_split(tmp_path, FILES[name], layout)
    data = SegDataset(lookup(name), split, root=tmp_path)
    assert data.found is not None
    assert data.found.layout == layout
    assert len(data) == len(labels)
    for i, label in enumerate(labels):
        sample = data[i]
        assert np.array_equal(sample.label, label)
        with Image.open(data.found.folder / sample.name) as file:
            assert np.array_equal(sample.image, np.asarray(file.convert("RGB")))


@pytest.mark.parametrize("name", FILES)
def test_a_folder_of_any_of_its_names_is_found_and_one_inside_another_too(name: str, tmp_path: Path):
    domain = FILES[name]
    split, row = next(iter(domain.splits.items()))
    for folder in (*domain.folders, f"{domain.folders[0]}/{domain.folders[-1]}"):
        place = tmp_path / folder.replace("/", "-")
        write_image(place / folder / row.layouts[0].images.replace("*", "x"), 0)
        assert find(domain, split, place).folder == place / folder


def test_rows_are_one_dataset_of_ids_and_undecoded_files(tmp_path: Path):
    write_split(tmp_path, FILES["cityscapes"], official("cityscapes"), 2)
    rows = index(FILES["cityscapes"], "val", tmp_path).rows
    assert rows.column_names == ["id", "image", "label"]
    assert rows[1]["id"] == "leftImg8bit/val/a/00001_leftImg8bit.png"
    assert rows[1]["label"] == {"path": str(tmp_path / "cityscapes/gtFine/val/a/00001_gtFine_labelIds.png"), "bytes": None}


def test_loader_processes_get_the_whole_of_it(tmp_path: Path):
    (label, *_) = write_split(tmp_path, FILES["wilddash2"], official("wilddash2"), 2)
    copy = pickle.loads(pickle.dumps(SegDataset(lookup("wilddash2"), "val", root=tmp_path)))
    assert np.array_equal(copy[0].label, label)


def test_the_layout_with_most_pairs_wins_and_of_equals_the_official(tmp_path: Path):
    official_layout, made = FILES["cityscapes"].splits["val"].layouts
    write_split(tmp_path, FILES["cityscapes"], official_layout, 2)
    write_split(tmp_path, FILES["cityscapes"], made, 2)
    assert find(FILES["cityscapes"], "val", tmp_path).layout is official_layout
    (tmp_path / "cityscapes/gtFine/val/a/00000_gtFine_labelIds.png").unlink()
    assert find(FILES["cityscapes"], "val", tmp_path).layout is made


def test_files_that_a_converter_put_beside_the_labels_are_not_labels_without_images(tmp_path: Path):
    layouts = FILES["gta5"].splits["train"].layouts
    write_split(tmp_path, FILES["gta5"], layouts[0], 2)
    write_split(tmp_path, FILES["gta5"], layouts[1], 2)
    assert find(FILES["gta5"], "train", tmp_path).imageless == ()


def test_companions_of_other_programs_are_no_images(tmp_path: Path):
    write_split(tmp_path, FILES["gta5"], official("gta5", "train"), 2)
    (tmp_path / "gta5/images/._00000.png").write_bytes(b"resource fork")
    assert len(find(FILES["gta5"], "train", tmp_path)) == 2


def test_what_has_no_counterpart_is_left_out_and_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    layout = official("bdd100k")
    write_split(tmp_path, FILES["bdd100k"], layout, 4)
    folder = tmp_path / "bdd100k"
    (folder / "labels/sem_seg/masks/val/00000.png").unlink()
    (folder / "images/10k/val/00002.jpg").unlink()
    for _ in range(2):
        data = SegDataset(lookup("bdd"), "val", root=tmp_path)
    assert [data[i].name for i in range(len(data))] == ["images/10k/val/00001.jpg", "images/10k/val/00003.jpg"]
    said = [r.message for r in caplog.records if "are left out" in r.message]
    assert len(said) == 2
    assert "1 images without a label" in said[0]
    assert "images/10k/val/00000.jpg" in said[0]
    assert "1 labels without an image" in said[1]
    assert "labels/sem_seg/masks/val/00002.png" in said[1]


def test_known_mismatches_of_an_old_archive_go_without_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write_split(tmp_path, FILES["bdd100k"], official("bdd100k"), 2)
    write_image(tmp_path / "bdd100k/images/10k/val/80a9e37d-e4548ac1.jpg", 5)
    data = SegDataset(lookup("bdd"), "val", root=tmp_path)
    assert len(data) == 2
    assert data.available == 999
    assert not [r for r in caplog.records if "without" in r.message]


def test_a_known_bad_pair_is_left_out_only_if_it_is_bad(tmp_path: Path):
    write_split(tmp_path, FILES["gta5"], official("gta5", "train"), 2)
    gta_map = FILES["gta5"].read_by()
    for stem, size in (("15188", SIZE), ("17705", (16, 64))):
        write_image(tmp_path / f"gta5/images/{stem}.png", 1, size)
        write_label(tmp_path / f"gta5/labels/{stem}.png", np.zeros(SIZE, np.uint8), gta_map, "ids")
    found = find(FILES["gta5"], "train", tmp_path)
    assert [image for image, _ in found.pairs] == ["images/00000.png", "images/00001.png", "images/15188.png"]
    assert found.left_out == {"images/17705.png": "the image is 16x64 (H x W), its label 32x64"}
    assert found.expected == 24966 - 1


def test_an_incomplete_split_is_read_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write_split(tmp_path, FILES["cityscapes"], official("cityscapes"), 3)
    data = SegDataset(lookup("cityscapes"), "val", root=tmp_path)
    assert (len(data), data.available) == (3, 500)
    assert "3 of its 500 images are on this disk" in caplog.text


def test_a_layout_that_changes_scores_says_so_and_has_a_revision_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    half = next(layout for layout in FILES["mapillary"].splits["val"].layouts if layout.halved)
    write_split(tmp_path, FILES["mapillary"], half)
    data = SegDataset(lookup("mapillary"), "val", root=tmp_path, label_map="mapillary-openseg")
    assert data.policy == data.label_map.name == "train-ids"
    assert data.revision == "official, half"
    assert "layout `half`: images and labels were halved before" in caplog.text


def test_equal_labels_are_recorded_under_one_name_however_they_are_stored(tmp_path: Path):
    made = FILES["cityscapes"].splits["val"].layouts[1]
    write_split(tmp_path, FILES["cityscapes"], made)
    data = SegDataset(lookup("cityscapes"), "val", root=tmp_path)
    assert (data.label_map.name, data.policy, data.revision) == ("train-ids", "cityscapes-ids", "official")


def test_a_wrong_encoding_in_the_middle_of_a_split_is_noticed_at_once(tmp_path: Path):
    write_split(tmp_path, FILES["cityscapes"], official("cityscapes"), 3)
    path = tmp_path / "cityscapes/gtFine/val/a/00001_gtFine_labelIds.png"
    Image.fromarray(np.full(SIZE, 77, np.uint8)).save(path)
    with pytest.raises(DataError, match=f"{path.name} holds label value 77"):
        SegDataset(lookup("cityscapes"), "val", root=tmp_path)


def test_images_without_any_label_are_an_error_that_names_the_first(tmp_path: Path):
    for i in range(2):
        write_image(tmp_path / f"synthia/RGB/{i}.png", i)
    with pytest.raises(DataError, match=r"2 of 2 images have no label; the first missing file is .*GT/LABELS/0.png"):
        SegDataset(lookup("synthia"), "train", root=tmp_path)


@pytest.mark.parametrize(
    ("name", "split", "reason"),
    [
        ("cityscapes", "test", "its labels are dummies"),
        ("acdc-fog", "test", "labels are withheld"),
        ("dark-zurich", "train", "it has no labels"),
    ],
)
def test_a_split_without_labels_is_refused_with_the_reason(name: str, split: str, reason: str):
    with pytest.raises(DataError, match=f"`{name}` {split} cannot be scored here: .*{reason}"):
        SegDataset(lookup(name), split)


def test_the_reference_images_of_acdc_are_not_in_its_splits(tmp_path: Path):
    write_split(tmp_path, FILES["acdc"], official("acdc"), 2)
    write_image(tmp_path / "acdc/rgb_anon/fog/val_ref/a/00009_rgb_anon.png", 0)
    found = find(FILES["acdc"], "val", tmp_path)
    assert len(found) == 2
    assert found.unlabelled == ()


def test_a_condition_of_acdc_is_a_part_of_it(tmp_path: Path):
    for condition, n in (("fog", 1), ("snow", 2)):
        write_split(tmp_path, FILES[f"acdc-{condition}"], official(f"acdc-{condition}"), n)
    assert [len(find(lookup(name), "val", tmp_path)) for name in ("acdc-fog", "acdc-snow", "acdc")] == [1, 2, 3]


def test_vistas_2_has_no_silent_map(tmp_path: Path):
    layout = official("mapillary-v2")
    write_image(tmp_path / "mapillary" / layout.images.replace("*", "a"), 0)
    write_label(
        tmp_path / "mapillary" / label_of(layout.images.replace("*", "a"), layout),
        np.zeros(SIZE, np.uint8),
        lookup("mapillary").read_by(),
        "ids",
    )
    with pytest.raises(DataError, match="`mapillary-v2` has no agreed map"):
        SegDataset(lookup("mapillary-v2"), "val", root=tmp_path)


def test_a_size_is_of_images_and_labels_stay_as_they_are_stored(tmp_path: Path):
    (label,) = write_split(tmp_path, FILES["cityscapes"], official("cityscapes"), 1)
    dataset = SegDataset(lookup("cityscapes"), "val", root=tmp_path, size=(16, 32))
    assert dataset[0].image.shape == (16, 32, 3)
    assert np.array_equal(dataset[0].image, dataset.image(0))
    assert np.array_equal(dataset[0].label, label)
    assert np.array_equal(dataset.label(0), label)


def test_a_set_of_rows_is_a_domain_of_its_own(tmp_path: Path):
    """As `dgbench download --hub` leaves them: bytes in datasets' own folders, beside them how to read them."""
    import io
    import json

    import datasets

    def png(pixels: np.ndarray) -> dict[str, bytes | None]:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    images = [np.random.default_rng(i).integers(256, size=(*SIZE, 3), dtype=np.uint8) for i in range(2)]
    ids = np.full(SIZE, 26, np.uint8)
    columns = {"id": ["val/0", "val/1"], "image": [png(i) for i in images], "label": [png(ids)] * 2}
    features = datasets.Features(
        {"id": datasets.Value("string"), "image": datasets.Image(decode=False), "label": datasets.Image(decode=False)}
    )
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "rain/hub/val")
    source = {
        "repository": "someone/rain",
        "revision": "0123",
        "encoding": "ids",
        "label_map": "cityscapes-ids",
        "splits": {"val": 2},
    }
    (tmp_path / "rain/hub/source.json").write_text(json.dumps(source))
    data = SegDataset(lookup("rain", tmp_path), "val", root=tmp_path)
    assert [data[i].name for i in range(2)] == ["val/0", "val/1"]
    assert np.array_equal(data[1].image, images[1])
    assert (data[1].label == 13).all()
    assert (data.policy, data.available) == ("cityscapes-ids", 2)
    (tmp_path / "rain/hub/source.json").write_text(json.dumps(source | {"revision": "4567"}))
    assert SegDataset(lookup("rain", tmp_path), "val", root=tmp_path).revision != data.revision
