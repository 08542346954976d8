"""The texture atlas: all patterns and crowns with mip pyramids, built once per process."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dgbench.streets.dice import generator, uniform
from dgbench.streets.foliage import crowns
from dgbench.streets.patterns import PATTERNS, SIZE, Image, noise

LEVELS = 8
OFFSETS = tuple(sum((SIZE >> k) ** 2 for k in range(level)) for level in range(LEVELS))
PYRAMID = sum((SIZE >> k) ** 2 for k in range(LEVELS))

CROWNS = (
    "round0",
    "round1",
    "round2",
    "round3",
    "oval0",
    "oval1",
    "oval2",
    "cone0",
    "cone1",
    "cone2",
    "palm0",
    "palm1",
    "bare0",
    "bare1",
    "bare2",
    "bush0",
    "bush1",
    "bush2",
    "umbrella0",
    "umbrella1",
    "column0",
    "column1",
    "tiered0",
    "tiered1",
    "tiered2",
    "dome0",
    "dome1",
    "dome2",
    "shrub0",
    "shrub1",
    "shrub2",
)
TEX = {name: index for index, name in enumerate((*PATTERNS, *CROWNS))}


@dataclass(frozen=True)
class Atlas:
    """Flat pyramids, tile after tile, rows from the bottom up: shade (128 = 1), mix, alpha, each uint8."""

    shade: NDArray[np.uint8]
    mix: NDArray[np.uint8]
    alpha: NDArray[np.uint8]
    drift: Image  # (256, 256) slow fractal noise around 0, for dirt and wear
    random: Image  # (4096,) uniform, for what differs from one window or slab to the next
    grain: Image  # (2**20,) about normal with deviation 1, for sensor noise


def _bytes(image: Image, scale: float) -> NDArray[np.uint8]:
    values: NDArray[np.uint8] = np.floor(np.clip(image * np.float32(scale), 0.0, 255.0) + np.float32(0.5)).astype(np.uint8)
    return values


def _pyramid(level: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return all mip levels of a (SIZE, SIZE) image as one vector; a level is the rounded integer mean of four texels."""
    level, parts = level[::-1], []
    for _ in range(LEVELS):
        parts.append(level.reshape(-1))
        if len(level) > 1:
            wide = level.astype(np.uint16)
            level = ((wide[0::2, 0::2] + wide[1::2, 0::2] + wide[0::2, 1::2] + wide[1::2, 1::2] + 2) >> 2).astype(np.uint8)
    return np.concatenate(parts)


@functools.cache
def atlas() -> Atlas:
    """Return the atlas, built at first use (a fraction of a second) and kept."""
    tiles = [make() for make in PATTERNS.values()]
    tiles.extend(crowns(CROWNS, SIZE, noise))
    shade, mix, alpha = (
        np.concatenate([_pyramid(_bytes(tile[part], scale)) for tile in tiles])
        for part, scale in ((0, 128.0), (1, 255.0), (2, 255.0))
    )
    drift = noise("drift", 8, 5, size=256) - np.float32(0.5)
    random = uniform(generator("cells"), 4096).astype(np.float32)
    grain = np.zeros(1 << 20, np.float32)
    for part in range(4):
        grain = grain + uniform(generator("grain", part), 1 << 20).astype(np.float32)
    # the sum of four uniforms has variance 4 / 12
    return Atlas(shade, mix, alpha, drift, random, (grain - np.float32(2.0)) * np.float32(1.7320508))
