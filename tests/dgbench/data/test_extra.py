"""Streams of further images: which one a position gets, how it is cropped, and what its labels are."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dgbench.data.catalog import lookup
from dgbench.data.dataset import SegDataset
from dgbench.data.extra import Stream, WithExtras, files_of, streams
from dgbench.data.sampling import UniformSampler
from dgbench.data.textures import texture
from dgbench.data.transforms import Augmentation, TrainView
from dgbench.errors import DataError, RecipeError
from mfuser.segmentor import Extra, ExtraFile

CROP = (32, 48)


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DGBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def folder(where: Path, sizes: list[tuple[int, int]]) -> Path:
    """Images of these (H, W), each with a label that is its image's red channel."""
    rng = np.random.default_rng(0)
    for part in ("images", "labels"):
        (where / part).mkdir(parents=True)
    for i, (height, width) in enumerate(sizes):
        ids = rng.integers(0, 19, (height, width), dtype=np.uint8)
        Image.fromarray(np.stack([ids, ids * 0 + i, ids * 0], 2)).save(where / "images" / f"{i}.png")
        Image.fromarray(ids).save(where / "labels" / f"{i}.png")
    return where


def opened(place: Path | str, **given: object) -> Stream:
    (stream,) = streams([Extra("wild", **given)], {"wild": str(place)}, "some", CROP, ())  # type: ignore[arg-type]
    return stream


def view(stream: Stream, seed: int = 3) -> WithExtras:
    dataset = SegDataset(lookup("streets-game"), "train", size=(64, 96), limit=2)
    plain = TrainView(dataset, UniformSampler(2, seed), Augmentation(CROP, (1, 1), 1, 0, "none"), seed)
    return WithExtras(plain, [stream], seed)


def test_a_position_gets_the_same_images_whoever_makes_it_and_whenever(tmp_path):
    stream = opened(folder(tmp_path, [(40, 60), (50, 50), (90, 33)]), labels=True)
    made = [view(stream)[i][2] for i in range(6)]
    loaded = list(DataLoader(view(stream), batch_sampler=[[4, 5], [2, 3]], num_workers=1))
    for batch, positions in zip(loaded, ((4, 5), (2, 3)), strict=True):
        for name in ("wild", "wild_labels"):
            assert torch.equal(batch[2][name], torch.stack([made[i][name] for i in positions])), name
    other = [view(stream, seed=4)[i][2]["wild"] for i in range(6)]
    assert any(not torch.equal(a, b["wild"]) for a, b in zip(other, made, strict=True))


def test_each_epoch_of_a_stream_has_every_image_once(tmp_path):
    stream = opened(folder(tmp_path, [(40, 60)] * 5) / "images")
    assert sorted(int(view(stream)[i][2]["wild"][1].max()) for i in range(5)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("size", [(32, 48), (32, 200), (90, 48)])
def test_labels_stay_with_their_pixels(tmp_path, size):
    image, label = opened(folder(tmp_path, [size]), labels=True).crop(0, np.random.default_rng(1))
    assert label.shape == CROP
    assert np.array_equal(image[..., 0], label), "its shorter side is the crop's: nothing is resized"


@pytest.mark.parametrize("size", [(10, 10), (500, 40), (31, 47), (64, 96)])
def test_an_image_of_any_size_covers_the_crop(tmp_path, size):
    Image.new("RGB", size[::-1], (9, 8, 7)).save(tmp_path / "a.jpg", quality=100)
    image, label = opened(tmp_path).crop(0, np.random.default_rng(0))
    assert image.shape == (*CROP, 3)
    assert label is None
    assert abs(image.astype(int) - (9, 8, 7)).max() <= 3, "nothing is padded"


def test_a_domain_gives_its_training_split(tmp_path):
    stream = opened("streets-game", labels=True)
    image, label = stream.crop(5, np.random.default_rng(0))
    assert image.shape[:2] == label.shape == CROP
    assert set(np.unique(label)) <= {*range(19), 255}


def test_images_are_told_by_content_and_what_is_none_is_named(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(DataError, match=r"a.png cannot be read as an image: it is no PNG, JPEG"):
        opened(tmp_path).crop(0, np.random.default_rng(0))


def test_a_pair_of_two_sizes_and_an_image_without_a_label_are_named(tmp_path):
    folder(tmp_path, [(40, 60), (40, 60)])
    Image.new("L", (20, 20)).save(tmp_path / "labels" / "0.png")
    with pytest.raises(DataError, match=r"0.png is 40x60 \(H x W\), but its label .*0.png is 20x20"):
        opened(tmp_path, labels=True).crop(0, np.random.default_rng(0))
    (tmp_path / "labels" / "1.png").unlink()
    with pytest.raises(DataError, match="1 of 2 images have no label in .*labels, the first is .*1.png"):
        opened(tmp_path, labels=True)


def test_segments_come_by_their_numbers_and_stay_with_their_pixels(tmp_path):
    folder(tmp_path, [(32, 90)])
    (tmp_path / "labels").rename(tmp_path / "segments")
    numbers = np.arange(32 * 90, dtype=np.uint32).reshape(32, 90) % 256  # beyond any train id
    Image.fromarray(numbers.astype(np.uint8)).save(tmp_path / "segments" / "0.png")
    Image.fromarray(np.stack([numbers.astype(np.uint8)] * 3, 2)).save(tmp_path / "images" / "0.png")
    stream = opened(tmp_path, segments=True)
    image, found = stream.crop(0, np.random.default_rng(1))
    assert np.array_equal(image[..., 0], found)
    assert set(view(stream)[0][2]) == {"wild", "wild_segments"}


def test_segments_that_are_not_there_are_named(tmp_path):
    with pytest.raises(DataError, match="has no folder segments/") as caught:
        opened(folder(tmp_path, [(40, 60)]), segments=True)
    assert caught.value.hint == "it should hold images/ and segments/, of segments' numbers"
    with pytest.raises(RecipeError, match="the domain `streets-game` has no segments"):
        opened("streets-game", segments=True)
    Image.fromarray(np.full((40, 60), 300, np.uint16)).save(tmp_path / "wide.png")
    (tmp_path / "labels").rename(tmp_path / "segments")
    (tmp_path / "wide.png").rename(tmp_path / "segments" / "0.png")
    with pytest.raises(DataError, match="0.png"):
        opened(tmp_path, segments=True).crop(0, np.random.default_rng(0))


def test_textures_take_the_place_of_a_collection():
    stream = opened("textures")
    image, label = stream.crop(7, np.random.default_rng(0))
    assert image.shape == (*CROP, 3)
    assert image.dtype == np.uint8
    assert label is None
    assert np.array_equal(image, stream.crop(7, np.random.default_rng(1))[0])
    assert not np.array_equal(image, stream.crop(8, np.random.default_rng(0))[0])


def test_the_bytes_of_textures_do_not_change():
    digest = hashlib.sha256(b"".join(texture(index, (48, 64)).tobytes() for index in range(12))).hexdigest()
    assert digest[:16] == "7add333039e279dc"


def test_textures_have_no_labels():
    with pytest.raises(RecipeError, match="data.extra.wild of `some`: textures have no labels"):
        opened("textures", labels=True)


def test_a_stretched_image_is_seen_as_a_whole(tmp_path):
    image = np.zeros((20, 90, 3), np.uint8)
    image[:, :45] = 200
    Image.fromarray(image).save(tmp_path / "a.png")
    found, _ = opened(tmp_path, stretch=True).crop(0, np.random.default_rng(0))
    assert found.shape == (*CROP, 3)
    assert (found[:, :23] == 200).all()
    assert (found[:, 25:] == 0).all()


def test_a_file_that_a_method_needs_is_asked_for_by_name(tmp_path):
    network = ExtraFile("network", "the weights of a network", instead="set method.variant=plain")
    with pytest.raises(
        RecipeError, match="`some` trains with the weights of a network, but data.extra does not say where"
    ) as said:
        files_of([network], {}, "some")
    assert said.value.hint == "--set data.extra.network=PATH; or set method.variant=plain"
    with pytest.raises(DataError, match="data.extra.network of `some`: .* is not a file"):
        files_of([network], {"network": str(tmp_path)}, "some")
    (tmp_path / "a.pth").write_bytes(b"1")
    assert files_of([network], {"network": str(tmp_path / "a.pth")}, "some") == {"network": tmp_path / "a.pth"}
    assert files_of([ExtraFile("network", "it", optional=True)], {}, "some") == {}


def test_an_augmented_stream_is_mirrored_and_distorted_like_the_source(tmp_path):
    folder(tmp_path, [CROP])
    image = np.asarray(Image.open(tmp_path / "images" / "0.png"))

    def drawn(flip: float, photometric: str, **given: object) -> list[dict[str, np.ndarray]]:
        dataset = SegDataset(lookup("streets-game"), "train", size=(64, 96), limit=2)
        how = Augmentation(CROP, (1, 1), 1, flip, photometric)
        stream = opened(tmp_path, labels=True, **given)
        samples = WithExtras(TrainView(dataset, UniformSampler(2, 3), how, 3), [stream], 3)
        return [{name: value.numpy() for name, value in samples[i][2].items()} for i in range(4)]

    (first, *_) = drawn(1.0, "none", augmented=True)
    assert np.array_equal(first["wild"].transpose(1, 2, 0), image[:, ::-1])
    assert np.array_equal(first["wild_labels"], image[:, ::-1, 0])
    distorted = drawn(0.0, "robustnet", augmented=True)
    assert all(np.array_equal(sample["wild_labels"], image[..., 0]) for sample in distorted)
    assert not all(np.array_equal(sample["wild"].transpose(1, 2, 0), image) for sample in distorted)
    (plain, *_) = drawn(1.0, "robustnet")
    assert np.array_equal(plain["wild"].transpose(1, 2, 0), image)
