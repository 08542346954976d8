"""Corruptions of images against what the published package makes of the same image (goldens/README.md)."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dgbench.data.corruptions import CORRUPTIONS, LEVELS, Corruption
from dgbench.errors import DataError

GOLDENS = Path(__file__).parents[2] / "goldens" / "corruptions.npz"
DRAWN = ("gaussian_noise", "shot_noise", "impulse_noise", "motion_blur", "snow", "fog")


@pytest.fixture(scope="module")
def goldens() -> dict[str, NDArray[np.generic]]:
    with np.load(GOLDENS, allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def image(goldens: dict[str, NDArray[np.generic]]) -> NDArray[np.uint8]:
    return goldens["image"].astype(np.uint8)


def distance(a: NDArray[np.generic], b: NDArray[np.generic]) -> float:
    return float(np.sqrt(((a.astype(float) - b) ** 2).mean()))


@pytest.mark.parametrize("name", ["brightness", "contrast", "defocus_blur", "zoom_blur", "pixelate"])
def test_what_draws_nothing_is_the_published_image_to_the_cut_off_fraction(
    name: str, image: NDArray[np.uint8], goldens: dict[str, NDArray[np.generic]]
) -> None:
    for level, theirs in zip(LEVELS, goldens[name].astype(int), strict=True):
        ahead = Corruption(name, level).of(image, "a").astype(int) - theirs
        assert set(np.unique(ahead)) <= {0, 1}, f"level {level}"


@pytest.mark.parametrize("name", DRAWN)
def test_what_is_drawn_is_as_far_from_the_image_as_the_published(
    name: str, image: NDArray[np.uint8], goldens: dict[str, NDArray[np.generic]]
) -> None:
    for level, theirs in zip(LEVELS, goldens[f"rms_{name}"], strict=True):
        ours = np.mean([distance(Corruption(name, level).of(image, str(key)), image) for key in range(60)])
        assert ours == pytest.approx(float(theirs), rel=0.04), f"level {level}"


def test_jpeg_is_pillows_own_of_the_published_quality(image: NDArray[np.uint8], tmp_path: Path) -> None:
    for level, quality in zip(LEVELS, (25, 18, 15, 10, 7), strict=True):
        Image.fromarray(image).save(tmp_path / "x.jpg", quality=quality)
        with Image.open(tmp_path / "x.jpg") as kept:
            assert np.array_equal(Corruption("jpeg_compression", level).of(image, "a"), np.asarray(kept))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_distance_from_the_image_grows_with_the_level(name: str, image: NDArray[np.uint8]) -> None:
    far = [np.mean([distance(Corruption(name, level).of(image, str(key)), image) for key in range(8)]) for level in LEVELS]
    assert far[0] > 0
    # by the published parameters, the second and third level of snow and the third and fourth of fog are equally far
    slack = 0.03 if name in ("snow", "fog") else 0
    assert all(after > before * (1 - slack) for before, after in pairwise(far)), far
    assert far[4] > 1.2 * far[0]


@pytest.mark.parametrize("size", [(1, 1), (2, 7), (33, 20), (20, 33)])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_images_of_any_size_stay_bytes_of_their_size(name: str, size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(256, size=(*size, 3), dtype=np.uint8)
    image.setflags(write=False)  # as those that are read from files
    before = image.copy()
    for level in (1, 5):
        out = Corruption(name, level).of(image, "a")
        assert (out.shape, out.dtype) == (image.shape, np.uint8)
    assert np.array_equal(image, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("value", [0, 255])
def test_black_and_white_images_stay_images(name: str, value: int) -> None:
    out = Corruption(name, 3).of(np.full((9, 12, 3), value, np.uint8), "a")
    assert np.isfinite(out).all()
    assert out.shape == (9, 12, 3)


def test_draws_are_fixed_by_the_images_name_in_every_process(image: NDArray[np.uint8]) -> None:
    code = f"""
import hashlib, numpy as np
from dgbench.data.corruptions import Corruption
image = np.load({str(GOLDENS)!r})["image"]
np.random.seed(5)
print(*(hashlib.sha256(Corruption(name, 3).of(image, "a/b.png").tobytes()).hexdigest() for name in {DRAWN}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = [hashlib.sha256(Corruption(name, 3).of(image, "a/b.png").tobytes()).hexdigest() for name in DRAWN]
    assert done.stdout.split() == here


@pytest.mark.parametrize("name", DRAWN)
def test_images_of_other_names_are_drawn_otherwise(name: str, image: NDArray[np.uint8]) -> None:
    a, b = (Corruption(name, 3).of(image, key) for key in ("a", "b"))
    assert not np.array_equal(a, b)


def test_the_same_noise_grows_from_level_to_level(image: NDArray[np.uint8]) -> None:
    noise = [Corruption("gaussian_noise", level).of(image, "a").astype(int) - image for level in (1, 2)]
    assert np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1] > 0.95


def test_an_unknown_corruption_or_level_is_an_error_with_advice() -> None:
    with pytest.raises(DataError, match="unknown corruption `motion_blurr`") as caught:
        Corruption("motion_blurr", 1)
    assert caught.value.hint == "did you mean `motion_blur`?"
    with pytest.raises(DataError, match="`fog` has no level 6"):
        Corruption("fog", 6)
