"""Reading domains: official layouts in place, rendered domains through the cache, and what is wrong with a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dgbench import streets
from dgbench.data.catalog import lookup, names
from dgbench.data.dataset import SegDataset, read_image
from dgbench.data.labels import CLASSES
from dgbench.errors import DataError
from dgbench.progress import Silent


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DGBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_cityscapes(root: Path, label: np.ndarray, stem: str = "aachen_000000_000019") -> tuple[Path, Path]:
    image = root / f"cityscapes/leftImg8bit/val/aachen/{stem}_leftImg8bit.png"
    target = root / f"cityscapes/gtFine/val/aachen/{stem}_gtFine_labelIds.png"
    for path in (image, target):
        path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(256, size=(*label.shape, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(image)
    Image.fromarray(label).save(target)
    return image, target


def test_a_rendered_domain_reads_back_what_was_rendered():
    dataset = SegDataset(lookup("streets-city"), "val", size=(64, 128), limit=18)
    dataset.prepare(Silent(), workers=2)
    for i in range(3):
        image, label = streets.render("streets-city", "val", i, (64, 128))
        assert np.array_equal(dataset[i].image, image)
        assert np.array_equal(dataset[i].label, label)


def test_a_damaged_cache_file_is_rendered_again(cache):
    dataset = SegDataset(lookup("streets-game"), "val", size=(64, 128), limit=1)
    expected = dataset[0].image
    (file,) = (f for f in cache.rglob("*.png") if "label" not in f.name)
    file.write_bytes(file.read_bytes()[:100])
    assert np.array_equal(dataset[0].image, expected)


def test_label_ids_become_train_ids(tmp_path):
    ids = np.array([[c.label_id for c in CLASSES] + [0, 4, 255]], np.uint8)
    write_cityscapes(tmp_path, ids)
    sample = SegDataset(lookup("cityscapes"), "val", root=tmp_path)[0]
    assert sample.label.tolist() == [[*range(19), 255, 255, 255]]
    assert sample.name == "leftImg8bit/val/aachen/aachen_000000_000019_leftImg8bit.png"


def test_palette_labels_are_read_as_indices_not_colours(tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / "gta" / folder).mkdir(parents=True)
    Image.fromarray(np.zeros((1, 3, 3), np.uint8)).save(tmp_path / "gta/images/00001.png")
    label = Image.fromarray(np.array([[7, 26, 34]], np.uint8), mode="P")
    label.putpalette([value for c in range(256) for value in (255 - c, c, 7)])
    label.save(tmp_path / "gta/labels/00001.png")
    assert SegDataset(lookup("gta5"), "train", root=tmp_path)[0].label.tolist() == [[0, 13, 255]]


def test_a_label_outside_the_map_is_named(tmp_path):
    _, target = write_cityscapes(tmp_path, np.full((4, 4), 77, np.uint8))
    with pytest.raises(DataError, match=r"labelIds.png holds label value 77, which the label map `cityscapes-ids`"):
        SegDataset(lookup("cityscapes"), "val", root=tmp_path)[0]
    assert target.exists()


def test_a_colour_label_is_refused(tmp_path):
    _, target = write_cityscapes(tmp_path, np.zeros((4, 4), np.uint8))
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(target)
    with pytest.raises(DataError, match="RGB image, not an 8-bit label map"):
        SegDataset(lookup("cityscapes"), "val", root=tmp_path)[0]


def test_a_truncated_image_is_named(tmp_path):
    image, _ = write_cityscapes(tmp_path, np.zeros((64, 64), np.uint8))
    image.write_bytes(image.read_bytes()[:500])
    with pytest.raises(DataError, match=f"{image.name} cannot be read as an image"):
        SegDataset(lookup("cityscapes"), "val", root=tmp_path)[0]


def test_an_image_without_a_label_is_named(tmp_path):
    _, target = write_cityscapes(tmp_path, np.zeros((4, 4), np.uint8))
    target.unlink()
    with pytest.raises(DataError, match=r"1 of 1 images have no label.*labelIds.png"):
        SegDataset(lookup("cityscapes"), "val", root=tmp_path)


def test_a_pair_of_two_sizes_is_refused(tmp_path):
    _, target = write_cityscapes(tmp_path, np.zeros((4, 4), np.uint8))
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(target)
    with pytest.raises(DataError, match="is 4x4 but its label .* is 6x4"):
        SegDataset(lookup("cityscapes"), "val", root=tmp_path)[0]


def test_a_missing_domain_says_where_it_is_looked_for(tmp_path):
    with pytest.raises(DataError, match="`mapillary` is not on this disk") as error:
        SegDataset(lookup("mapillary"), "val", root=tmp_path)
    assert "mapillary.com" in str(error.value.hint)


def test_an_empty_folder_says_which_files_are_expected(tmp_path):
    (tmp_path / "bdd100k").mkdir()
    with pytest.raises(DataError, match="no image matches .*images/10k/val"):
        SegDataset(lookup("bdd"), "val", root=tmp_path)


def test_an_unknown_split_lists_the_known_ones():
    with pytest.raises(DataError, match="no split `test`"):
        SegDataset(lookup("streets-city"), "test")


def test_text_is_not_an_image(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_text("hello")
    with pytest.raises(DataError, match="photo.jpg cannot be read as an image"):
        read_image(path)


def test_domains_are_found_by_name_alias_and_severity():
    assert lookup("bdd").name == "bdd100k"
    assert lookup("streets-fog@0.60").name == "streets-fog@0.6"
    assert lookup("streets-fog@0.6").severity == 0.6
    assert all(lookup(name).name == name for name in names())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("streets-frog", "unknown domain `streets-frog`"),
        ("streets-fog@2", "severity `2` of `streets-fog`"),
        ("streets-fog@x", "severity `x` of `streets-fog`"),
        ("streets-game@0.5", "`streets-game` has no severity"),
    ],
)
def test_a_wrong_domain_name_is_explained(name, message):
    with pytest.raises(DataError, match=message):
        lookup(name)
