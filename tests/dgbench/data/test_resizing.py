"""Images and labels as protocols show them: equal to what OpenCV, Pillow and the papers' scripts make of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dgbench.data.resizing import as_tested, prepared, resize_image, resize_label
from dgbench.protocol import Protocol, lookup

UNIFIED = lookup("unified")


def pair(height: int, width: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    rng = np.random.default_rng(height * width)
    label = rng.integers(0, 19, (height // 4 + 1, width // 4 + 1), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8), label[:height, :width]


@pytest.mark.parametrize("size", [(32, 64), (47, 90), (128, 256), (200, 111), (64, 128)])
def test_opencvs_resize_is_opencvs(size: tuple[int, int]) -> None:
    image, label = pair(64, 128)
    assert np.array_equal(
        resize_image(image, size, by="opencv-bilinear"), cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    )
    assert np.array_equal(
        resize_label(label, size, by="opencv-bilinear"), cv2.resize(label, size[::-1], interpolation=cv2.INTER_NEAREST)
    )


@pytest.mark.parametrize(("by", "kernel"), [("pillow-bilinear", Image.BILINEAR), ("pillow-bicubic", Image.BICUBIC)])
@pytest.mark.parametrize("size", [(32, 64), (47, 90), (128, 256)])
def test_pillows_resize_is_pillows(size: tuple[int, int], by: str, kernel: Image.Resampling) -> None:
    image, label = pair(64, 128)
    expected = Image.fromarray(image).resize(size[::-1], kernel)
    assert np.array_equal(resize_image(image, size, by=by), np.asarray(expected))
    nearest = Image.fromarray(label).resize(size[::-1], Image.Resampling.NEAREST)
    assert np.array_equal(resize_label(label, size, by=by), np.asarray(nearest))


def test_the_two_differ_where_an_image_shrinks() -> None:
    image, _ = pair(64, 128)
    by_opencv, by_pillow = (resize_image(image, (32, 64), by=by).astype(int) for by in ("opencv-bilinear", "pillow-bilinear"))
    # antialiasing averages twice as many pixels each way
    assert by_pillow.std() < 0.9 * by_opencv.std()


@pytest.mark.parametrize("size", [(64, 128), (65, 131)])
def test_halved_files_are_those_of_reins_script(size: tuple[int, int], tmp_path: Path) -> None:
    """It opens both files with Pillow, resizes to half and saves; PNG here, where Mapillary's images are JPEG."""
    image, label = pair(*size)
    half = (size[1] // 2, size[0] // 2)
    Image.fromarray(image).resize(half, resample=Image.BICUBIC).save(tmp_path / "image.png")
    Image.fromarray(label).resize(half, resample=Image.NEAREST).save(tmp_path / "label.png")
    rules = replace(UNIFIED, halved=("mapillary",))
    halved = prepared(image, label, rules, "mapillary")
    for made, name in zip(halved, ("image", "label"), strict=True):
        with Image.open(tmp_path / f"{name}.png") as file:
            assert np.array_equal(made, np.asarray(file))
    assert prepared(image, label, rules, "cityscapes")[0] is image


def test_a_wide_image_becomes_a_square_by_its_middle() -> None:
    image, label = pair(60, 100)
    square, mask = prepared(image, label, replace(UNIFIED, square={"mapillary": 48}), "mapillary")
    picture = Image.fromarray(image).resize((80, 48), Image.Resampling.BICUBIC).crop((16, 0, 64, 48))
    assert np.array_equal(square, np.asarray(picture))
    expected = Image.fromarray(label).resize((80, 48), Image.Resampling.NEAREST).crop((16, 0, 64, 48))
    assert np.array_equal(mask, np.asarray(expected))


def test_a_tall_image_is_padded_to_a_square_with_ignored_pixels() -> None:
    image, label = pair(100, 60)
    square, mask = prepared(image, label, replace(UNIFIED, square={"mapillary": 50}), "mapillary")
    assert square.shape == (50, 50, 3)
    assert (mask[:, :10] == 255).all()
    assert (mask[:, 40:] == 255).all()
    assert (square[:, :10] == 0).all()
    assert np.array_equal(mask[:, 10:40], np.asarray(Image.fromarray(label).resize((30, 50), Image.Resampling.NEAREST)))


def test_labels_stay_unless_the_protocol_resizes_them() -> None:
    image, label = pair(64, 128)
    fitted = replace(UNIFIED, fit={"cityscapes": (32, 64)})
    [view], original = as_tested(image, label, fitted, "cityscapes")
    assert view.shape == (32, 64, 3)
    assert original is label
    # CLOUDS': image and label to one short edge, by Pillow
    clouds = replace(lookup("clouds"), short_edge=96)
    [view], resized = as_tested(image, label, clouds, "bdd100k")
    assert np.array_equal(view, np.asarray(Image.fromarray(image).resize((192, 96), Image.Resampling.BILINEAR)))
    assert np.array_equal(resized, np.asarray(Image.fromarray(label).resize((192, 96), Image.Resampling.NEAREST)))


@pytest.mark.parametrize("size", [None, (48, 96)])
def test_there_is_a_view_for_every_scale(size: tuple[int, int] | None) -> None:
    image, label = pair(64, 128)
    views, _ = as_tested(image, label, replace(UNIFIED, scales=(1.0, 0.5, 1.25)), "streets-city", size)
    height, width = size or (64, 128)
    assert [view.shape[:2] for view in views] == [
        (height, width),
        (height // 2, width // 2),
        (round(height * 1.25), round(width * 1.25)),
    ]


def test_a_recipes_own_size_goes_before_the_protocols() -> None:
    image, label = pair(64, 128)
    rules = Protocol("x", fit={"mapillary": (1024, 2048)}, halved=("mapillary",))
    [view], original = as_tested(image, label, rules, "mapillary", (40, 60))
    assert np.array_equal(view, cv2.resize(image, (60, 40), interpolation=cv2.INTER_LINEAR))
    assert original is label
