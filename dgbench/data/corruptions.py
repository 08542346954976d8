"""Common corruptions of images at five levels: those of ImageNet-C that leave every object where its label is.

Names, levels and parameters are those of Hendrycks and Dietterich (ICLR 2019, `ImageNet-C/create_c` of their repository), on
images of any size as Michaelis et al. (2019, `imagecorruptions`) have them: the parameters are in pixels and do not grow with
the image, the fog's fractal does. Of the 15, three are left out: `elastic_transform` moves objects, `frost` needs photographs,
`glass_blur` swaps pixels one after another. Differences from the published scripts: values are rounded, not cut off; the image
is not kept as a JPEG afterwards; draws are fixed by the image's name (`Corruption.of`).
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dgbench.data.domain import Domain
from dgbench.errors import DataError, unknown

VERSION = 1  # raised with any change of a pixel; part of a score's protocol hash
LEVELS = (1, 2, 3, 4, 5)

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]  # (H, W, 3) RGB in 0..1, or (H, W)


@dataclass(frozen=True, slots=True)
class Corruption:
    """One corruption at one level.

    Raises: DataError for a name or a level that there is not.
    """

    name: str
    level: int  # 1..5

    def __post_init__(self) -> None:
        """Refuse what there is not."""
        if self.name not in CORRUPTIONS:
            raise DataError(*unknown("corruption", self.name, CORRUPTIONS))
        if self.level not in LEVELS:
            raise DataError(f"`{self.name}` has no level {self.level}", f"its levels are {', '.join(map(str, LEVELS))}")

    def __str__(self) -> str:
        return f"{self.name}@{self.level}"

    def of(self, image: Pixels, key: str) -> Pixels:
        """Return the corrupted image.

        Args:
            image: (H, W, 3) RGB of any size.
            key: the image's name. It and the corruption's fix what is drawn, the same at each level and in every process.
        """
        seed = hashlib.sha256(f"{self.name}\0{key}".encode()).digest()[:8]
        draws = np.random.Generator(np.random.PCG64(int.from_bytes(seed, "big")))
        return CORRUPTIONS[self.name](image, self.level - 1, draws)


@dataclass(frozen=True, slots=True)
class Corrupted:
    """A domain whose images are corrupted before they are scored."""

    domain: Domain
    corruption: Corruption

    @property
    def name(self) -> str:
        """As `cityscapes+fog@3`."""
        return f"{self.domain.name}+{self.corruption}"


_Draws = np.random.Generator


def _as_floats(image: Pixels) -> Floats:
    return image.astype(np.float32) / np.float32(255)


def _as_pixels(values: Floats) -> Pixels:
    return np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)


# ---- noise


def _gaussian_noise(image: Pixels, level: int, draws: _Draws) -> Pixels:
    deviation = np.float32((0.08, 0.12, 0.18, 0.26, 0.38)[level])
    return _as_pixels(_as_floats(image) + deviation * draws.standard_normal(image.shape, dtype=np.float32))


def _shot_noise(image: Pixels, level: int, draws: _Draws) -> Pixels:
    photons = (60, 25, 12, 5, 3)[level]
    return _as_pixels((draws.poisson(_as_floats(image) * photons) / photons).astype(np.float32))


def _impulse_noise(image: Pixels, level: int, draws: _Draws) -> Pixels:
    amount = (0.03, 0.06, 0.09, 0.17, 0.27)[level]
    hit = draws.random(image.shape, dtype=np.float32) < amount
    white = draws.random(image.shape, dtype=np.float32) < 0.5
    return np.where(hit, np.where(white, 255, 0), image).astype(np.uint8)


# ---- blur


def _defocus_blur(image: Pixels, level: int, draws: _Draws) -> Pixels:
    radius, smoothing = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[level]
    half, width = (8, 3) if radius <= 8 else (radius, 5)
    across = np.arange(-half, half + 1) ** 2
    disk = (across[:, None] + across <= radius**2).astype(np.float32)
    kernel = cv2.GaussianBlur(disk / disk.sum(), (width, width), smoothing)
    return _as_pixels(_floats(cv2.filter2D(_as_floats(image), -1, kernel)))


def _motion_blur(image: Pixels, level: int, draws: _Draws) -> Pixels:
    radius, deviation = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[level]
    return _as_pixels(_moved(_as_floats(image), radius, deviation, draws.uniform(-45, 45)))


def _zoom_blur(image: Pixels, level: int, draws: _Draws) -> Pixels:
    end, step = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))[level]
    values, factors = _as_floats(image), np.arange(1, end, step)
    total = values.copy()
    for factor in factors:
        total += _zoomed(values, float(factor))
    return _as_pixels(total / np.float32(len(factors) + 1))


# ---- weather


def _snow(image: Pixels, level: int, draws: _Draws) -> Pixels:
    mean, deviation, zoom, threshold, radius, blur, kept = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[level]
    flakes = draws.standard_normal(image.shape[:2], dtype=np.float32) * np.float32(deviation) + np.float32(mean)
    flakes = _zoomed(flakes, zoom)
    flakes = np.clip(np.where(flakes < threshold, 0, flakes), 0, 1).astype(np.float32)
    flakes = _moved(flakes, radius, blur, draws.uniform(-135, -45))
    values = _as_floats(image)
    whitened = np.maximum(values, _floats(cv2.cvtColor(values, cv2.COLOR_RGB2GRAY))[..., None] * 1.5 + 0.5)
    return _as_pixels(kept * values + (1 - kept) * whitened + (flakes + flakes[::-1, ::-1])[..., None])


def _fog(image: Pixels, level: int, draws: _Draws) -> Pixels:
    amount, decay = ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))[level]
    values = _as_floats(image)
    brightest = float(values.max())
    veil = _plasma(image.shape[0], image.shape[1], decay, draws)
    return _as_pixels((values + np.float32(amount) * veil[..., None]) * np.float32(brightest / (brightest + amount)))


def _brightness(image: Pixels, level: int, draws: _Draws) -> Pixels:
    added = np.float32((0.1, 0.2, 0.3, 0.4, 0.5)[level])
    values = _as_floats(image)
    # V of HSV is the largest channel; with hue and saturation kept, all channels grow as it does
    value = values.max(axis=2, keepdims=True)
    grown = np.minimum(value + added, 1)
    return _as_pixels(np.where(value > 0, values * (grown / np.where(value > 0, value, 1)), grown))


# ---- what cameras and files do


def _contrast(image: Pixels, level: int, draws: _Draws) -> Pixels:
    kept = np.float32((0.4, 0.3, 0.2, 0.1, 0.05)[level])
    values = _as_floats(image)
    means = values.mean(axis=(0, 1), dtype=np.float64).astype(np.float32)
    return _as_pixels((values - means) * kept + means)


def _pixelate(image: Pixels, level: int, draws: _Draws) -> Pixels:
    share = (0.6, 0.5, 0.4, 0.3, 0.25)[level]
    height, width = image.shape[:2]
    small = (max(1, int(width * share)), max(1, int(height * share)))
    blocks = Image.fromarray(image).resize(small, Image.Resampling.BOX)
    return np.array(blocks.resize((width, height), Image.Resampling.NEAREST))


def _jpeg_compression(image: Pixels, level: int, draws: _Draws) -> Pixels:
    data = io.BytesIO()
    Image.fromarray(image).save(data, "JPEG", quality=(25, 18, 15, 10, 7)[level])
    with Image.open(data, formats=("JPEG",)) as file:
        return np.array(file)


CORRUPTIONS: dict[str, Callable[[Pixels, int, _Draws], Pixels]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}


def _floats(values: Any) -> Floats:
    return np.asarray(values, dtype=np.float32)


def _moved(values: Floats, radius: int, deviation: float, angle: float) -> Floats:
    """Blur along a line at `angle` degrees, by the falling half of a normal curve (ImageMagick's motion blur)."""
    reach = 2 * radius
    steps = np.arange(reach + 1)
    weights = np.exp(-(steps**2) / (2 * deviation**2))
    across = np.ceil(steps * math.cos(math.radians(angle)) - 0.5).astype(int)
    down = np.ceil(steps * math.sin(math.radians(angle)) - 0.5).astype(int)
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1), np.float32)
    np.add.at(kernel, (down + reach, across + reach), weights / weights.sum())
    return _floats(cv2.filter2D(values, -1, kernel, borderType=cv2.BORDER_REPLICATE))


def _zoomed(values: Floats, factor: float) -> Floats:
    """Enlarge about the centre and cut to the same size: the corners of the part that is enlarged stay corners."""
    matrix = np.zeros((2, 3))
    for axis, side in enumerate((values.shape[1], values.shape[0])):
        part = math.ceil(side / factor)
        large = max(round(part * factor), side)
        scale = (part - 1) / max(large - 1, 1)
        matrix[axis, axis], matrix[axis, 2] = scale, (side - part) // 2 + (large - side) // 2 * scale
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    size = (values.shape[1], values.shape[0])
    return _floats(cv2.warpAffine(values, matrix, size, flags=flags, borderMode=cv2.BORDER_REPLICATE))


def _plasma(height: int, width: int, decay: float, draws: _Draws) -> Floats:
    """Return (H, W) of a fractal in 0..1 by the diamond-square algorithm; `decay` divides the noise at each halving."""
    grid, noise = np.zeros((1, 1), np.float32), 100.0
    while len(grid) < max(height, width):
        side, spread = len(grid), noise**2
        finer = np.empty((2 * side, 2 * side), np.float32)
        # the grid's ends meet: every point has four neighbours
        rows = grid + np.roll(grid, -1, axis=0)
        centres = (rows + np.roll(rows, -1, axis=1)) / 4 + _uniform(draws, spread, side)
        upright = (rows + centres + np.roll(centres, 1, axis=1)) / 4 + _uniform(draws, spread, side)
        level = (grid + np.roll(grid, -1, axis=1) + centres + np.roll(centres, 1, axis=0)) / 4 + _uniform(draws, spread, side)
        finer[::2, ::2], finer[1::2, 1::2], finer[1::2, ::2], finer[::2, 1::2] = grid, centres, upright, level
        grid, noise = finer, noise / decay
    grid -= grid.min()
    highest = grid.max()
    return _floats((grid / highest if highest > 0 else grid)[:height, :width])


def _uniform(draws: _Draws, spread: float, side: int) -> Floats:
    return (2 * draws.random((side, side), dtype=np.float32) - 1) * np.float32(spread)
