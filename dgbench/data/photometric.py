"""Photometric distortions of training images, named after the code that they are from.

Each takes an RGB image (H, W, 3), uint8, and a generator, and returns a new image of the same shape. Those of the CNN-era
methods are torchvision's `ColorJitter` on Pillow images, with random numbers from our generator.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter

Pixels = NDArray[np.uint8]
Distortion = Callable[[Pixels, np.random.Generator], Pixels]


def none(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Return the image as it is."""
    return image


def mmsegmentation(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Change brightness, contrast, saturation and hue, each in half of the draws.

    The ranges and the order are those of mmsegmentation's PhotoMetricDistortion, which all compared methods train with:
    torchvision's transform of the same name shuffles colour channels as well, which none of them does.
    """
    if rng.random() < 0.5:
        image = _affine(image, 1.0, rng.uniform(-32, 32))
    contrast_first = rng.random() < 0.5
    if contrast_first and rng.random() < 0.5:
        image = _affine(image, rng.uniform(0.5, 1.5), 0.0)
    saturate, turn = rng.random(2) < 0.5
    if saturate or turn:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        if saturate:
            hsv[..., 1] = _affine(hsv[..., 1], rng.uniform(0.5, 1.5), 0.0)
        if turn:  # OpenCV counts hue in steps of two degrees
            hsv[..., 0] = (hsv[..., 0].astype(np.int16) + rng.integers(-18, 18)) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).astype(np.uint8, copy=False)
    if not contrast_first and rng.random() < 0.5:
        image = _affine(image, rng.uniform(0.5, 1.5), 0.0)
    return image


def robustnet(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Jitter colours in half of the draws and always blur, as RobustNet, WildNet and SHADE do.

    ColorJitter(0.4, 0.4, 0.4, 0.1); then Gaussian blur with a standard deviation out of [0.15, 1.30] pixels.
    """
    if rng.random() < 0.5:
        image = _jitter(image, rng, 0.4, 0.4, 0.4, 0.1)
    return gaussian(image, rng.uniform(0.15, 1.30))


def san_saw(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Jitter colours and blur, each in half of the draws, as SAN-SAW does.

    ColorJitter(0.5, 0.2, 0.2, 0.3); Pillow's Gaussian blur with a radius out of [0, 1] pixels.
    """
    if rng.random() < 0.5:
        image = _jitter(image, rng, 0.5, 0.2, 0.2, 0.3)
    return _blur(image, rng.uniform(0, 1)) if rng.random() < 0.5 else image


def famix(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Jitter colours strongly in every draw, but for their hue, as FAMix does: ColorJitter(0.8, 0.8, 0.8)."""
    order = tuple(int(step) for step in rng.permutation(3))
    brightness, contrast, saturation = rng.uniform(0.2, 1.8, 3)
    return jittered(image, order=order, brightness=brightness, contrast=contrast, saturation=saturation, hue=0.0)


def self_supervised(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Distort as self-supervised training does (MoCo v2, Chen et al., 2020, arXiv 2003.04297).

    What its authors' code has with `--aug-plus` (facebookresearch/moco at 010242b, main_moco.py), but for crop and mirror:
    ColorJitter(0.4, 0.4, 0.4, 0.1) in 80 % of the draws, grey in 20 %, Pillow's Gaussian blur with a radius out of [0.1, 2]
    pixels in 50 %.
    """
    if rng.random() < 0.8:
        image = _jitter(image, rng, 0.4, 0.4, 0.4, 0.1)
    if rng.random() < 0.2:
        image = np.repeat(np.asarray(Image.fromarray(image).convert("L"))[..., None], 3, axis=2)
    return _blur(image, rng.uniform(0.1, 2.0)) if rng.random() < 0.5 else image


PRESETS: dict[str, Distortion] = {
    "mmsegmentation": mmsegmentation,
    "robustnet": robustnet,
    "san-saw": san_saw,
    "famix": famix,
    "self-supervised": self_supervised,
    "none": none,
}


def jittered(
    image: Pixels, *, order: tuple[int, ...], brightness: float, contrast: float, saturation: float, hue: float
) -> Pixels:
    """Return torchvision's ColorJitter with these factors.

    Args:
        order: of 0 brightness, 1 contrast, 2 saturation, 3 hue.
        hue: part of a turn, -0.5 to 0.5; the others are factors, 1 leaves the image as it is.
    """
    picture = Image.fromarray(image)
    for step in order:
        if step == 0:
            picture = ImageEnhance.Brightness(picture).enhance(brightness)
        elif step == 1:
            picture = ImageEnhance.Contrast(picture).enhance(contrast)
        elif step == 2:
            picture = ImageEnhance.Color(picture).enhance(saturation)
        else:
            planes = picture.convert("HSV").split()
            turned = (np.asarray(planes[0]).astype(np.int16) + int(hue * 255)) % 256
            picture = Image.merge("HSV", (Image.fromarray(turned.astype(np.uint8)), *planes[1:])).convert("RGB")
    return np.asarray(picture)


def gaussian(image: Pixels, sigma: float) -> Pixels:
    """Return the image under a Gaussian of this standard deviation, cut off at 4 of them, borders repeated (as scikit-image)."""
    side = 2 * int(4 * sigma + 0.5) + 1
    blurred = cv2.GaussianBlur(image.astype(np.float32), (side, side), sigma, borderType=cv2.BORDER_REPLICATE)
    rounded: Pixels = np.rint(blurred).astype(np.uint8)
    return rounded


def _jitter(image: Pixels, rng: np.random.Generator, brightness: float, contrast: float, saturation: float, hue: float) -> Pixels:
    order = tuple(int(step) for step in rng.permutation(4))
    factors = [rng.uniform(1 - reach, 1 + reach) for reach in (brightness, contrast, saturation)]
    return jittered(
        image, order=order, brightness=factors[0], contrast=factors[1], saturation=factors[2], hue=rng.uniform(-hue, hue)
    )


def _blur(image: Pixels, radius: float) -> Pixels:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def _affine(values: Pixels, gain: float, offset: float) -> Pixels:
    """Apply gain and offset by a look-up table: eight-bit values have no more than 256 results."""
    table = np.clip(np.arange(256, dtype=np.float32) * gain + offset, 0, 255).astype(np.uint8)
    mapped: Pixels = cv2.LUT(values, table)
    return mapped
