"""Cut-outs of tree crowns and bushes: many small leaf clumps, lit from the upper left, with ragged edges and holes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dgbench.streets.dice import Dice, turn
from dgbench.streets.strokes import dot, line

Image = NDArray[np.floating[Any]]  # float32; NumPy's stubs lose that in arithmetic


def _inside(kind: str, x: float, y: float) -> bool:
    """Return whether a clump centre (x, y in -1..1, y up) belongs to the crown's envelope."""
    if kind == "cone":
        return abs(x) < 0.62 * (0.92 - y) / 1.9
    if kind == "tiered":
        # four skirts of branches, each narrowing upwards
        level = (0.95 - y) / 0.475
        step = int(level) if level > 0 else 0
        return level > 0 and abs(x) < 0.16 * (step + 1) * (0.35 + 0.65 * (level - step))
    # half axes and height of the middle of an ellipse
    wide, high, middle = {
        "oval": (0.64, 0.85, 0.0),
        "bush": (0.89, 1.34, -0.75),
        "umbrella": (0.87, 0.46, 0.35),
        "column": (0.36, 0.92, 0.0),
        "dome": (0.9, 1.15, -0.55),
        "shrub": (0.7, 1.55, -0.8),
    }.get(kind, (0.85, 0.85, 0.0))
    a, b = x / wide, (y - middle) / high
    return a * a + b * b < 1.0


def _leafy(kind: str, name: str, size: int, noise: Callable[..., Image]) -> tuple[Image, Image, Image]:
    """Return clumps painted from the back and bottom to the front and top."""
    dice = Dice("crown", name)
    shade, alpha = np.zeros((size, size), np.uint8), np.zeros((size, size), np.uint8)
    lobes = [(dice.between(-0.6, 0.6), dice.between(-0.6, 0.6), dice.between(0.25, 0.5)) for _ in range(7)]
    clumps: list[tuple[float, float, float, float]] = []
    while len(clumps) < 210:
        x, y = dice.between(-1, 1), dice.between(-1, 1)
        # lobes break the outline, or every crown would be an ellipse
        near = min((x - a) * (x - a) + (y - b) * (y - b) - r * r for a, b, r in lobes)
        if _inside(kind, x, y) and (near < 0.06 or kind in ("cone", "column", "tiered")):
            clumps.append((x, y, dice.between(0.04, 0.13), dice.draw()))
    for x, y, radius, tone in sorted(clumps, key=lambda clump: clump[3] + 0.4 * clump[1] - 0.2 * clump[0]):
        light = 70 + 75 * tone + 38 * y - 26 * x
        column, row, reach = (x + 1) * size / 2, (1 - y) * size / 2, radius * size / 2
        dot(alpha, column, row, reach, 255)
        dot(shade, column, row, reach, int(light * 0.72))
        dot(shade, column - reach * 0.3, row - reach * 0.3, reach * 0.62, int(light))
    ragged = noise(name, 32, 2)
    # leaves thin out towards the rim: the noise threshold rises where a coarse blur of the alpha is low
    padded = np.pad(alpha.astype(np.float32), 6, mode="constant") / np.float32(255)
    rows, depth = np.zeros((size, size + 12), np.float32), np.zeros((size, size), np.float32)
    for k in range(13):
        rows = rows + padded[k : k + size]
    for k in range(13):
        depth = depth + rows[:, k : k + size] * np.float32(1 / 169)
    keep = (alpha > 0) & (ragged < 0.32 + 0.55 * depth)
    texture = shade.astype(np.float32) / np.float32(128) * (0.62 + 0.76 * noise(name + "leaf", 48, 2))
    return texture.astype(np.float32), np.clip(noise(name + "hue", 6, 3) * 2.2 - 0.6, 0, 1), keep.astype(np.float32)


def _branch(canvas: NDArray[np.uint8], dice: Dice, x: float, y: float, angle: float, length: float, width: float) -> None:
    """Draw a branch from (x, y) upwards and its forks; coordinates in texels."""
    c, s = turn(angle)
    tip = (x + s * length, y - c * length)
    line(canvas, (x, y), tip, width, 255)
    if length > 4.0:
        for side in (-1, 1) if length < 28 else (-1, 0, 1):
            _branch(
                canvas,
                dice,
                *tip,
                angle + side * dice.between(16, 40) + dice.between(-8, 8),
                length * dice.between(0.6, 0.82),
                width * 0.66,
            )


def _bare(name: str, size: int, noise: Callable[..., Image]) -> tuple[Image, Image, Image]:
    canvas = np.zeros((size, size), np.uint8)
    _branch(canvas, Dice("bare", name), size / 2, size - 1.0, 0.0, size * 0.24, 5.0)
    return (
        (0.7 + 0.6 * noise(name, 24, 2)).astype(np.float32),
        np.zeros((size, size), np.float32),
        (canvas > 0).astype(np.float32),
    )


def _palm(name: str, size: int, noise: Callable[..., Image]) -> tuple[Image, Image, Image]:
    dice = Dice("palm", name)
    alpha, shade = np.zeros((size, size), np.uint8), np.zeros((size, size), np.uint8)
    for frond in range(17):
        spread = dice.between(-1.0, 1.0)
        x, y, light = size / 2, size * 0.45, 70 + 7 * frond
        dx, dy = spread * size * 0.085, -size * dice.between(0.01, 0.075)
        for joint in range(7):
            points = []
            for side in (-1, 1):
                points.append((round((x + side * dy * 0.5) * 16), round((y - side * dx * 0.5 + 3) * 16)))
            tip = (round((x + dx * 1.7) * 16), round((y + dy + joint * size * 0.012) * 16))
            triangle = np.array([*points, tip], np.int32)
            cv2.fillConvexPoly(alpha, triangle, 255, cv2.LINE_8, 4)
            cv2.fillConvexPoly(shade, triangle, light, cv2.LINE_8, 4)
            x, y, dx, dy = x + dx, y + dy, dx * 0.93, dy + size * 0.014
    keep = (alpha > 0) & (noise(name, 40, 1) < 0.82)
    return (
        (shade.astype(np.float32) / np.float32(128)) * (0.7 + 0.6 * noise(name + "leaf", 40, 2)),
        np.clip(noise(name + "hue", 6, 2) * 2 - 0.6, 0, 1),
        keep.astype(np.float32),
    )


def crowns(names: Sequence[str], size: int, noise: Callable[..., Image]) -> list[tuple[Image, Image, Image]]:
    """Return (shade, mix, alpha) of each named crown, (size, size), top row first; a name is a kind and a number."""
    tiles = []
    for name in names:
        kind = name.rstrip("0123456789")
        if kind == "bare":
            tiles.append(_bare(name, size, noise))
        elif kind == "palm":
            tiles.append(_palm(name, size, noise))
        else:
            tiles.append(_leafy(kind, name, size, noise))
    return tiles
