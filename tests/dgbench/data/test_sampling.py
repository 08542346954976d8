"""Which image is drawn, and the counts of classes that decide it: made once, kept, made again when a label changes."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dgbench.data.catalog import lookup
from dgbench.data.dataset import SegDataset
from dgbench.data.labels import CLASSES, LABEL_MAPS
from dgbench.data.sampling import (
    Around,
    ClassUniformSampler,
    RareClassSampler,
    UniformSampler,
    WeightedSampler,
    class_counts,
    class_tiles,
    min_pixels,
)
from dgbench.data.transforms import Augmentation, TrainView
from dgbench.data.union import Union
from dgbench.errors import DataError

IDS = np.array([c.label_id for c in CLASSES], np.uint8)


class Counted:
    """A progress that notes what it is told."""

    def __init__(self) -> None:
        self.started: list[tuple[str, int, str]] = []
        self.done = 0

    def start(self, what: str, total: int, unit: str) -> None:
        self.started.append((what, total, unit))

    def advance(self, n: int = 1, **fields: float | str) -> None:
        self.done += n

    def stop(self) -> None:
        pass

    def note(self, text: str) -> None:
        pass


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DGBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gta(tmp_path: Path) -> Path:
    """Five images of 24x40 with random labels, in GTA5's folders."""
    rng = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (tmp_path / "gta5" / folder).mkdir(parents=True)
    for number in range(1, 6):
        Image.fromarray(rng.integers(0, 256, (24, 40, 3), dtype=np.uint8)).save(tmp_path / f"gta5/images/{number:05d}.png")
        ids = np.append(IDS, 0)[rng.integers(0, 20, (24, 40))]
        label = Image.fromarray(ids.astype(np.uint8)).convert("P")
        label.save(tmp_path / f"gta5/labels/{number:05d}.png")
    return tmp_path


def counted_by_hand(root: Path) -> NDArray[np.int64]:
    rows = []
    for path in sorted((root / "gta5/labels").glob("*.png")):
        with Image.open(path) as file:
            stored = np.asarray(file)
        rows.append([int((stored == label_id).sum()) for label_id in IDS])
    return np.array(rows)


def test_counts_are_those_of_the_files_made_once_and_told(gta: Path) -> None:
    progress = Counted()
    counts = class_counts(SegDataset(lookup("gta5"), "train", root=gta), progress)
    assert np.array_equal(counts, counted_by_hand(gta))
    assert progress.started == [("counting classes of gta5 train", 5, "images")]
    assert progress.done == 5
    [kept] = (gta / "gta5").rglob("*.npy")
    assert kept.parent.name == ".dgbench"
    again = Counted()
    assert np.array_equal(class_counts(SegDataset(lookup("gta5"), "train", root=gta), again), counts)
    assert again.started == []


def test_a_changed_label_is_counted_again_by_size_or_time(gta: Path) -> None:
    first = class_counts(SegDataset(lookup("gta5"), "train", root=gta), Counted())
    path = gta / "gta5/labels/00003.png"
    times = path.stat()
    with Image.open(path) as file:
        label = Image.fromarray(np.full_like(np.asarray(file), 7))
    label.save(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # the time alone would not tell
    second = class_counts(SegDataset(lookup("gta5"), "train", root=gta), Counted())
    assert second[2].tolist() == [24 * 40] + [0] * 18
    assert np.array_equal(np.delete(second, 2, 0), np.delete(first, 2, 0))
    os.utime(path)  # and neither would the size
    touched = Counted()
    class_counts(SegDataset(lookup("gta5"), "train", root=gta), touched)
    assert touched.done == 5


def test_another_label_map_or_number_of_images_is_counted_for_itself(gta: Path) -> None:
    class_counts(SegDataset(lookup("gta5"), "train", root=gta), Counted())
    few = class_counts(SegDataset(lookup("gta5"), "train", root=gta, limit=2), Counted())
    assert np.array_equal(few, counted_by_hand(gta)[:2])
    dataset = SegDataset(lookup("gta5"), "train", root=gta)
    before = dataset.fingerprint()
    dataset.label_map = LABEL_MAPS["cityscapes-ids"]
    assert dataset.fingerprint() != before


def test_where_the_data_cannot_be_written_the_cache_folder_keeps_them(gta: Path, cache: Path) -> None:
    (gta / "gta5/.dgbench").write_text("in the way, also of a user who may write everywhere")
    counts = class_counts(SegDataset(lookup("gta5"), "train", root=gta), Counted())
    [kept] = cache.rglob("*.npy")
    assert np.array_equal(np.load(kept), counts)
    again = Counted()
    class_counts(SegDataset(lookup("gta5"), "train", root=gta), again)
    assert again.started == []


def test_damaged_counts_are_made_again(gta: Path) -> None:
    counts = class_counts(SegDataset(lookup("gta5"), "train", root=gta), Counted())
    [kept] = (gta / "gta5").rglob("*.npy")
    kept.write_bytes(kept.read_bytes()[:200])
    assert np.array_equal(class_counts(SegDataset(lookup("gta5"), "train", root=gta), Counted()), counts)


def test_uniform_sampling_shows_every_image_once_an_epoch() -> None:
    sampler = UniformSampler(7, seed=1)
    draws = [sampler.draw(i)[0] for i in range(21)]
    assert all(sorted(draws[e : e + 7]) == list(range(7)) for e in (0, 7, 14))
    assert draws[:7] != draws[7:14]


@pytest.mark.parametrize("temperature", [0.01, 0.1, 100.0])
def test_rare_class_sampling_draws_classes_by_the_formula(temperature: float) -> None:
    counts = np.zeros((30, 19), np.int64)
    counts[:, 0] = 900_000
    counts[:3, 12] = 100_000  # a rare class in three images
    sampler = RareClassSampler(counts, temperature, seed=0)
    f = counts.sum(0) / counts.sum()
    weights = np.exp((1 - f[[0, 12]]) / temperature - (1 - f[12]) / temperature)
    assert sampler.probability == pytest.approx(weights / weights.sum())
    drawn = [sampler.draw(i) for i in range(400)]
    assert all(image < 3 for image, wanted in drawn if wanted and wanted.train_id == 12)
    rare = np.mean([wanted is not None and wanted.train_id == 12 for _, wanted in drawn])
    assert rare == pytest.approx(weights[1] / weights.sum(), abs=0.08)
    assert drawn[5] == RareClassSampler(counts, temperature, 0).draw(5)


def test_an_image_needs_more_than_3000_pixels_of_the_class_and_its_crop_1500() -> None:
    counts = np.zeros((3, 19), np.int64)
    counts[:, 0] = 10**6
    counts[:, 6] = (2999, 3000, 3001)
    sampler = RareClassSampler(counts, 0.01, seed=0)
    for position in range(40):
        image, wanted = sampler.draw(position)
        assert wanted is not None
        assert wanted.pixels == 1500
        assert wanted.train_id != 6 or image == 2


def test_where_no_image_has_enough_any_that_holds_the_class_will_do() -> None:
    counts = np.zeros((3, 19), np.int64)
    counts[:, 0], counts[1, 6] = 10**6, 5
    images = {
        image for image, wanted in map(RareClassSampler(counts, 0.01, 0).draw, range(40)) if wanted and wanted.train_id == 6
    }
    assert images == {1}


def test_smaller_renderings_need_the_same_share_of_the_image() -> None:
    assert min_pixels(None) == 3000
    assert min_pixels((1052, 1914)) == pytest.approx(3000)
    assert min_pixels((526, 957)) == pytest.approx(750)
    counts = np.zeros((2, 19), np.int64)
    counts[:, 0], counts[:, 6] = 526 * 957, (700, 800)
    sampler = RareClassSampler(counts, 0.01, 0, (526, 957))
    drawn = [sampler.draw(i) for i in range(40)]
    assert {image for image, wanted in drawn if wanted and wanted.train_id == 6} == {1}
    assert drawn[0][1] is not None
    assert drawn[0][1].pixels == pytest.approx(375)


def test_labels_without_a_class_cannot_be_sampled_by_class() -> None:
    with pytest.raises(DataError, match="all pixels of the 4 labels are ignored"):
        RareClassSampler(np.zeros((4, 19), np.int64), 0.01, seed=0)


# ---- by weight, and class-uniform


def test_sources_are_drawn_by_their_weights_and_their_images_evenly() -> None:
    sampler = WeightedSampler([3, 10], [3, 1], seed=0)
    drawn = np.array([sampler.draw(i)[0] for i in range(4000)])
    assert np.mean(drawn < 3) == pytest.approx(0.75, abs=0.03)
    assert np.bincount(drawn, minlength=13)[3:] / 4000 == pytest.approx(np.full(10, 0.025), abs=0.01)
    assert drawn[7] == WeightedSampler([3, 10], [3, 1], 0).draw(7)[0]


def test_centroids_of_classes_in_tiles_are_the_means_of_their_pixels(gta: Path) -> None:
    tiles = class_tiles(SegDataset(lookup("gta5"), "train", root=gta), 12, Counted())
    expected = []
    for image, path in enumerate(sorted((gta / "gta5/labels").glob("*.png"))):
        with Image.open(path) as file:
            stored = np.asarray(file)
        for top, left in itertools.product((0, 12), (0, 12, 24)):  # 40 columns hold three whole tiles, the last four none
            part = stored[top : top + 12, left : left + 12]
            for c, label_id in enumerate(IDS):
                if (part == label_id).any():
                    places = np.argwhere(part == label_id).mean(0)
                    expected.append((image, c, top + places[0], left + places[1]))
    assert np.allclose(tiles, expected)
    again = Counted()
    assert np.array_equal(class_tiles(SegDataset(lookup("gta5"), "train", root=gta), 12, again), tiles)
    assert again.started == []


def test_a_class_uniform_epoch_has_as_many_images_of_every_class_and_the_rest_evenly() -> None:
    # class 0 in all of 190 images, class 12 in two
    tiles = np.array([(i, 0, 5.0, 5.0) for i in range(190)] + [(3, 12, 7.0, 8.0), (4, 12, 9.0, 1.0)])
    sampler = ClassUniformSampler(tiles, 190, 0.5, seed=0, tile=16)
    assert sampler.length == 95 + 5 + 5  # int(190 * 0.5) of any, int(190 * 0.5 / 19) of each of two classes
    for epoch in range(3):
        drawn = [sampler.draw(epoch * sampler.length + i) for i in range(sampler.length)]
        placed = [(image, place) for image, place in drawn if place is not None]
        assert len(placed) == 10
        rare = [(image, place) for image, place in placed if place != Around(5.0, 5.0)]
        assert sorted(set(rare), key=str) == [(3, Around(7.0, 8.0)), (4, Around(9.0, 1.0))]
        free = [image for image, place in drawn if place is None]
        assert len(set(free)) == 95
    assert sampler.draw(11) == ClassUniformSampler(tiles, 190, 0.5, 0, 16).draw(11)


def test_class_uniform_sampling_says_what_it_lacks(gta: Path) -> None:
    tiles = class_tiles(SegDataset(lookup("gta5"), "train", root=gta), 1024, Counted())
    with pytest.raises(DataError, match="no label holds a class in a whole tile of 1024 x 1024 pixels"):
        ClassUniformSampler(tiles, 5, 0.5, 0, 1024)
    with pytest.raises(DataError, match="5 images are too few for class-uniform sampling"):
        ClassUniformSampler(np.array([(0, 1, 2.0, 3.0)]), 5, 0.5, 0, 12)


def test_sampling_by_class_runs_over_the_union_of_the_sources(gta: Path) -> None:
    one = SegDataset(lookup("gta5"), "train", root=gta)
    union = Union([one, SegDataset(lookup("gta5"), "train", root=gta, limit=2)])
    counts = counted_by_hand(gta)
    assert np.array_equal(class_counts(union, Counted()), np.concatenate([counts, counts[:2]]))
    tiles, alone = class_tiles(union, 12, Counted()), class_tiles(one, 12, Counted())
    assert np.array_equal(tiles[: len(alone)], alone)
    assert np.array_equal(tiles[len(alone) :, 1:], alone[alone[:, 0] < 2][:, 1:])
    assert set(tiles[len(alone) :, 0]) == {5, 6}
    assert [union.locate(i)[1] for i in range(7)] == [0, 1, 2, 3, 4, 0, 1]
    assert union.locate(4)[0] is one


def test_a_crop_drawn_by_class_holds_the_class_in_images_brought_to_a_size(tmp_path: Path) -> None:
    (tmp_path / "gta5/images").mkdir(parents=True)
    (tmp_path / "gta5/labels").mkdir()
    label = np.zeros((64, 128), np.uint8)
    label[48:56, 96:104] = 24  # a person, at (52, 100)
    Image.fromarray(np.zeros((64, 128, 3), np.uint8)).save(tmp_path / "gta5/images/00001.png")
    Image.fromarray(label).save(tmp_path / "gta5/labels/00001.png")
    dataset = SegDataset(lookup("gta5"), "train", root=tmp_path, size=(32, 64))
    tiles = np.concatenate([class_tiles(dataset, 64, Counted())] * 40)
    view = TrainView(dataset, ClassUniformSampler(tiles, 40, 1.0, 0, 64), Augmentation((16, 16), (1.0, 1.0), 1.0, 0.0, "none"), 0)
    assert all((view[i][1] == 11).any() for i in range(2))
