"""Procedural textures: images without any scene, in place of style images where there is no network and no collection.

An image is a pattern (clouds of noise, bands, cells, spots) whose coordinates are bent by noise, coloured by a palette, with
grain on top. It depends on its index and size alone. Only additions, multiplications, divisions, roots and look-ups are used,
which are exact in IEEE arithmetic: its bytes are the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

NAME = "textures"  # in place of a folder under `data.extra`, and in the label of rows that were trained with them
COUNT = 10_000
VERSION = 1  # of the bytes; raise it with any change of them

Field = NDArray[np.float64]  # (H, W)
_SEED = 20_231


def texture(index: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return image number `index`, (H, W, 3), of `size` (H, W)."""
    rng = np.random.default_rng([_SEED, index])
    height, width = size
    unit = float(max(size))
    rows, columns = np.meshgrid(np.arange(height) / unit, np.arange(width) / unit, indexing="ij")
    bend = rng.uniform(0.0, 0.25)
    y = rows + bend * (_noise(rng, rows, columns, 4, 2) - 0.5)
    x = columns + bend * (_noise(rng, rows, columns, 4, 2) - 0.5)
    value = _PATTERNS[int(rng.integers(len(_PATTERNS)))](rng, y, x)
    second = _PATTERNS[int(rng.integers(len(_PATTERNS)))](rng, x, y)
    share = rng.uniform(0.0, 0.5)
    colours = _palette(rng)
    image = _coloured((1 - share) * value + share * second, colours)
    light = 1 + rng.uniform(0.0, 0.6) * (_noise(rng, rows, columns, 2, 2) - 0.5)
    grain = rng.uniform(0.0, 0.12) * (rng.random((height, width)) - 0.5)
    image = image * light[..., None] + grain[..., None]
    return np.floor(np.clip(image, 0.0, 1.0) * 255 + 0.5).astype(np.uint8)


def _clouds(rng: np.random.Generator, y: Field, x: Field) -> Field:
    return _noise(rng, y, x, int(rng.integers(3, 12)), 5)


def _bands(rng: np.random.Generator, y: Field, x: Field) -> Field:
    """Parallel bands in any direction: a triangle wave."""
    a, b = rng.uniform(-1, 1), rng.uniform(0.2, 1)
    length = np.sqrt(a * a + b * b)
    along = (a * y + b * x) / length * rng.uniform(4, 24) + 0.5 * _noise(rng, y, x, 6, 2)
    part: Field = along - np.floor(along)
    return np.where(part < 0.5, 2 * part, 2 - 2 * part)


def _cells(rng: np.random.Generator, y: Field, x: Field) -> Field:
    """Cells around scattered points (Worley, 1996): the distance to the nearest, some with a shade for each cell."""
    first, second, shade = _nearest(rng, y, x, float(rng.uniform(4, 18)))
    edge = np.clip((second - first) * 1.6, 0, 1)
    return edge if rng.random() < 0.5 else 0.7 * shade + 0.3 * edge


def _spots(rng: np.random.Generator, y: Field, x: Field) -> Field:
    first, _, shade = _nearest(rng, y, x, float(rng.uniform(5, 20)))
    radius = rng.uniform(0.2, 0.5)
    return np.clip((radius - first) * 8 + 0.5, 0, 1) * (0.5 + 0.5 * shade)


_PATTERNS: tuple[Callable[[np.random.Generator, Field, Field], Field], ...] = (_clouds, _bands, _cells, _spots)


def _nearest(rng: np.random.Generator, y: Field, x: Field, cells: float) -> tuple[Field, Field, Field]:
    """Return the distances to the nearest and second nearest of points, one in each square of a grid, and the nearest's value."""
    period = 32
    points, values = rng.random((2, period, period)), rng.random((period, period))
    v, u = y * cells, x * cells
    row, column = np.floor(v), np.floor(u)
    first = np.full(y.shape, 1e9)
    second, shade = first.copy(), np.zeros(y.shape)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            i = (row + down).astype(np.int64) % period
            j = (column + right).astype(np.int64) % period
            dy, dx = row + down + points[0, i, j] - v, column + right + points[1, i, j] - u
            distance = np.sqrt(dy * dy + dx * dx)
            nearer = distance < first
            second = np.where(nearer, first, np.minimum(second, distance))
            shade = np.where(nearer, values[i, j], shade)
            first = np.where(nearer, distance, first)
    return first, second, shade


def _noise(rng: np.random.Generator, y: Field, x: Field, cells: int, octaves: int) -> Field:
    """Return fractal value noise in [0, 1]: each octave is twice as fine and half as strong."""
    total, weight = np.zeros(y.shape), 0.0
    for octave in range(octaves):
        strength = 0.5**octave
        total += strength * _lattice(rng, y * (cells * 2**octave), x * (cells * 2**octave))
        weight += strength
    return total / weight


def _lattice(rng: np.random.Generator, v: Field, u: Field) -> Field:
    """Return random values at whole coordinates, smoothly interpolated between them."""
    period = 64
    values = rng.random((period, period))
    row, column = np.floor(v), np.floor(u)
    t, s = v - row, u - column
    t, s = t * t * (3 - 2 * t), s * s * (3 - 2 * s)
    i, j = row.astype(np.int64) % period, column.astype(np.int64) % period
    below, right = (i + 1) % period, (j + 1) % period
    top = values[i, j] * (1 - s) + values[i, right] * s
    bottom = values[below, j] * (1 - s) + values[below, right] * s
    return np.asarray(top * (1 - t) + bottom * t)


def _palette(rng: np.random.Generator) -> Field:
    """Return 3 to 6 colours (N, 3) in [0, 1], around a colour of their own with some spread."""
    count = int(rng.integers(3, 7))
    spread = rng.uniform(0.15, 0.6)
    return np.clip(rng.random(3) + spread * (2 * rng.random((count, 3)) - 1), 0, 1)


def _coloured(value: Field, colours: Field) -> Field:
    """Return an image (H, W, 3): values in [0, 1] as places between neighbouring colours."""
    place = np.clip(value, 0, 1) * (len(colours) - 1)
    low = np.minimum(np.floor(place).astype(np.int64), len(colours) - 2)
    part = (place - low)[..., None]
    return np.asarray(colours[low] * (1 - part) + colours[low + 1] * part)
