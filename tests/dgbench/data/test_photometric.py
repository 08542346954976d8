"""Photometric distortions do what torchvision and Pillow do, as strongly and as often as their methods state."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torchvision.transforms import functional

from dgbench.data import photometric


@pytest.fixture
def image() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)])
@pytest.mark.parametrize("factors", [(0.6, 1.4, 0.7, -0.1), (1.5, 0.8, 1.2, 0.3), (1.0, 1.0, 1.0, 0.0)])
def test_jitter_is_torchvisions_on_pillow_images(image: NDArray[np.uint8], order: tuple[int, ...], factors: tuple[float, ...]):
    steps = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation, functional.adjust_hue)
    expected = Image.fromarray(image)
    for step in order:
        expected = steps[step](expected, factors[step])
    names = ("brightness", "contrast", "saturation", "hue")
    ours = photometric.jittered(image, order=order, **dict(zip(names, factors, strict=True)))
    assert np.array_equal(ours, np.asarray(expected))


@pytest.mark.parametrize("sigma", [0.15, 0.5, 1.3])
def test_gaussian_blur_is_a_gaussian_cut_off_at_four_deviations_as_scikit_images(image: NDArray[np.uint8], sigma: float):
    radius = int(4 * sigma + 0.5)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    expected = np.pad(image.astype(np.float64), ((radius, radius), (radius, radius), (0, 0)), mode="edge")
    for axis in (0, 1):
        expected = np.apply_along_axis(np.convolve, axis, expected, kernel, mode="valid")
    assert np.abs(photometric.gaussian(image, sigma) - expected).max() < 0.51


def share(name: str, differs: NDArray[np.uint8], times: int = 2000) -> float:
    distort = photometric.PRESETS[name]
    rng = np.random.default_rng(1)
    return sum(not np.array_equal(distort(differs, rng), differs) for _ in range(times)) / times


def test_robustnet_always_blurs_and_jitters_half_of_the_images():
    flat = np.full((8, 8, 3), (200, 90, 30), np.uint8)  # which no blur changes
    assert share("robustnet", flat) == pytest.approx(0.5, abs=0.04)
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    rng = np.random.default_rng(2)
    blurred = [photometric.robustnet(noise, rng) for _ in range(50)]
    assert sum(np.array_equal(one, noise) for one in blurred) < 5  # a standard deviation of 0.15 pixels changes next to nothing


def test_san_saw_jitters_and_blurs_half_of_the_images_each():
    flat = np.full((8, 8, 3), (200, 90, 30), np.uint8)
    assert share("san-saw", flat) == pytest.approx(0.5, abs=0.04)
    grey = np.tile(np.array([0, 255], np.uint8)[:, None, None], (4, 8, 3))
    # either of them, 1 - 0.5 * 0.5, less the radii of Pillow's that change nothing
    assert 0.58 < share("san-saw", grey) < 0.76


def test_famix_changes_brightness_by_up_to_four_fifths_and_no_hue():
    grey = np.full((4, 4, 3), 100, np.uint8)  # which neither contrast nor saturation changes
    rng = np.random.default_rng(0)
    values = [int(photometric.famix(grey, rng)[0, 0, 0]) for _ in range(500)]
    assert (min(values), max(values)) == (pytest.approx(20, abs=2), pytest.approx(180, abs=2))
    red = np.full((4, 4, 3), (180, 60, 60), np.uint8)
    assert all(one[0, 0, 1] == one[0, 0, 2] <= one[0, 0, 0] for one in (photometric.famix(red, rng) for _ in range(200)))


def test_self_supervised_turns_a_fifth_of_the_images_grey():
    image = np.full((4, 4, 3), (200, 90, 30), np.uint8)
    rng = np.random.default_rng(0)
    seen = [photometric.self_supervised(image, rng) for _ in range(2000)]
    greys = sum(bool((one == one[..., :1]).all()) for one in seen)
    assert greys / len(seen) == pytest.approx(0.2, abs=0.03)


def test_self_supervised_leaves_the_colours_of_a_sixth_of_the_images():
    flat = np.full((4, 4, 3), (200, 90, 30), np.uint8)  # which no blur changes
    assert share("self-supervised", flat) == pytest.approx(1 - 0.2 * 0.8, abs=0.03)


def test_the_blur_of_pillow_is_pillows(image: NDArray[np.uint8]):
    expected = Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.7))
    assert np.array_equal(photometric._blur(image, 0.7), np.asarray(expected))


def test_none_leaves_the_image_and_the_generator_alone(image: NDArray[np.uint8]):
    rng = np.random.default_rng(0)
    assert np.array_equal(photometric.PRESETS["none"](image, rng), image)
    assert rng.random() == np.random.default_rng(0).random()


@pytest.mark.parametrize("name", sorted(photometric.PRESETS))
def test_every_preset_keeps_shape_and_type_and_repeats_with_its_generator(name: str, image: NDArray[np.uint8]):
    distort, before = photometric.PRESETS[name], image.copy()
    for seed in range(20):
        first, again = (distort(image, np.random.default_rng(seed)) for _ in range(2))
        assert (first.shape, first.dtype) == (image.shape, np.uint8)
        assert np.array_equal(first, again)
    assert np.array_equal(image, before)
