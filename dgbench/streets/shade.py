"""Deferred shading: from face numbers to linear colour, class, depth and emission of each pixel.

Every pixel looks up its face's planes, gets exact depth and texture coordinates, picks the mip level from the analytic
derivative, and mixes the face's two lit colours. float32 and elementwise throughout; tables replace transcendentals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dgbench.streets.atlas import LEVELS, OFFSETS, PYRAMID, atlas
from dgbench.streets.camera import Faces
from dgbench.streets.mesh import (
    CLASS,
    DETAIL,
    FLAGS,
    GLOW,
    GROUND,
    PD,
    PU,
    SEE_THROUGH,
    SLOT,
    SLOT2,
    SNOWY,
    WINDOW,
)
from dgbench.streets.mesh import TEX as TEX_COLUMN
from dgbench.streets.patterns import SIZE

Image = NDArray[np.floating[Any]]  # float32; NumPy's stubs lose that in arithmetic

ROAD, SKY = 0, 10

OFFSET = np.array(OFFSETS, np.int32)


@dataclass(frozen=True, slots=True)
class Lighting:
    """Linear light: `sun` direction and colour, sky light from above, bounce from below, and emission by glow code."""

    sun: tuple[float, float, float]
    sun_colour: tuple[float, float, float]
    sky: tuple[float, float, float]
    bounce: tuple[float, float, float]
    glow: tuple[float, ...]  # strength of DARK, HEADLIGHT, TAILLIGHT, WINDOW, LAMP, SIGNAL
    lit_windows: float  # fraction of windows that are lit
    snow: float  # 0..1: cover of upward faces


@dataclass(frozen=True)
class Table:
    """Per-face rows that pixels look up, float32 unless noted."""

    planes: list[Image]  # nine of (F,)
    colour: list[Image]  # three of (F,): lit first colour
    colour2: list[Image]
    emit: list[Image]
    shaded: list[Image]  # three of (F,): what the first colour loses per channel in full sun shadow
    tex: NDArray[np.int32]
    detail: NDArray[np.int32]
    ratio: Image  # detail tiles per texture tile
    window: Image  # how much the second colour differs from tile to tile
    glowing: Image  # emission of lit windows
    ground: Image
    snowy: Image
    see_through: NDArray[np.bool_]
    kind: NDArray[np.uint8]


def table(faces: Faces, attributes: NDArray[np.float64], palette: list[tuple[float, float, float]], light: Lighting) -> Table:
    """Light the two colours of each visible face: Lambert sun, a sky and bounce hemisphere. Row 0 is the sky's."""
    rows = attributes[faces.source]
    normal = faces.normal
    sun = normal[:, 0] * light.sun[0] + normal[:, 1] * light.sun[1] + normal[:, 2] * light.sun[2]
    sun = np.maximum(sun, 0.0)
    up = 0.5 + 0.5 * normal[:, 1]
    colours = np.array(palette)
    first, second = colours[rows[:, SLOT].astype(np.int64)], colours[rows[:, SLOT2].astype(np.int64)]
    glow = np.array(light.glow)[rows[:, GLOW].astype(np.int64)]
    windows = rows[:, GLOW] == WINDOW
    flags = rows[:, FLAGS].astype(np.int64)
    snowy = np.where((flags & SNOWY) > 0, np.maximum(normal[:, 1], 0.0), 0.0) * light.snow
    colour: list[NDArray[np.float64]] = []
    colour2: list[NDArray[np.float64]] = []
    emit: list[NDArray[np.float64]] = []
    shaded: list[NDArray[np.float64]] = []
    for k in range(3):
        ambient = light.sky[k] * up + light.bounce[k] * (1.0 - up)
        total = ambient + light.sun_colour[k] * sun
        colour.append(first[:, k] * total)
        colour2.append(second[:, k] * total)
        emit.append(first[:, k] * np.where(windows, 0.0, glow))
        shaded.append(light.sun_colour[k] * sun / np.maximum(total, 1e-3))
    ratio = np.where(rows[:, PU] > 0, np.maximum(rows[:, PU], 0.01), 3.0) / rows[:, PD]
    kind = rows[:, CLASS]

    def row(values: NDArray[Any], sky: float = 0.0) -> Image:
        return np.concatenate([[sky], values]).astype(np.float32)

    return Table(
        planes=[row(plane) for plane in faces.planes],
        colour=[row(channel) for channel in colour],
        colour2=[row(channel) for channel in colour2],
        emit=[row(channel) for channel in emit],
        shaded=[row(channel) for channel in shaded],
        tex=row(rows[:, TEX_COLUMN]).astype(np.int32),
        detail=row(rows[:, DETAIL]).astype(np.int32),
        ratio=row(ratio, 1.0),
        window=row(windows),
        glowing=row(windows * glow),
        ground=row((flags & GROUND) > 0),
        # traffic wears the snow off the carriageway
        snowy=row(snowy * np.where(kind == ROAD, 0.66, 1.0)),
        see_through=row((flags & SEE_THROUGH) > 0) > 0,
        kind=row(kind, SKY).astype(np.uint8),
    )


@dataclass
class Pixels:
    """Shaded pixels, flat (N,): linear light reflected and emitted, depth in metres, texture alpha, ground flag."""

    colour: list[Image]
    emission: list[Image]
    depth: Image
    alpha: NDArray[np.uint8]
    ground: Image


def shade(
    face: NDArray[np.int64],
    column: Image,
    row: Image,
    faces: Table,
    light: Lighting,
    shadow: Image | None,
    contact: Image | None,
) -> Pixels:
    """Shade pixels (N,): their face, pixel column and row, and 0..1 sun shadow and contact masks for ground faces."""
    maps = atlas()
    planes = [np.take(plane, face) for plane in faces.planes]
    depth = np.float32(1.0) / np.maximum(planes[0] * column + planes[1] * row + planes[2], np.float32(1e-5))
    u = (planes[3] * column + planes[4] * row + planes[5]) * depth
    v = (planes[6] * column + planes[7] * row + planes[8]) * depth
    # |d(u, v)| per pixel step: the quotient rule on (u/z) / (1/z)
    across = np.maximum(np.abs(planes[3] - u * planes[0]), np.abs(planes[6] - v * planes[0]))
    down = np.maximum(np.abs(planes[4] - u * planes[1]), np.abs(planes[7] - v * planes[1]))
    step = (across + down) * depth * np.float32(SIZE * 0.75)
    # the exponent bits of a float32 are floor(log2) + 127
    level = (np.minimum(np.maximum(step, np.float32(1.0)), np.float32(SIZE)).view(np.int32) >> 23) - 127
    u = np.minimum(np.maximum(u, np.float32(-8000.0)), np.float32(8000.0))
    v = np.minimum(np.maximum(v, np.float32(-8000.0)), np.float32(8000.0))
    index = _texel(u, v, level, np.take(faces.tex, face))
    tint = np.take(maps.shade, index).astype(np.float32)
    mix = np.take(maps.mix, index).astype(np.float32) * np.float32(1 / 255)
    alpha = np.take(maps.alpha, index)

    ratio = np.take(faces.ratio, face)
    exponent = (np.maximum(ratio, np.float32(1.0)).view(np.int32) >> 23) - 127
    fine_u, fine_v = u * ratio, v * ratio
    fine = _texel(fine_u, fine_v, np.minimum(level + exponent, LEVELS - 1), np.take(faces.detail, face))
    grain = np.take(maps.shade, fine).astype(np.float32) * np.float32(1 / 16384)
    tint *= grain + (np.float32(1 / 128) - grain) * mix
    # slow dirt at a scale of decimetres, whatever the pattern's own
    dirt = ((fine_u * np.float32(23.0)).astype(np.int32) & 255) | (((fine_v * np.float32(23.0)).astype(np.int32) & 255) << 8)
    tint *= np.float32(1.0) + np.float32(0.3) * np.take(maps.drift.reshape(-1), dirt)

    # tiles count from far below zero, so that truncation is floor
    tile = (
        (u + np.float32(8192.0)).astype(np.int32) * 37
        + (v + np.float32(8192.0)).astype(np.int32) * 101
        + face.astype(np.int32) * 7
    )
    chance = np.take(maps.random, tile & 4095)
    varied = np.float32(1.0) + np.take(faces.window, face) * (chance * np.float32(1.6) - np.float32(0.6))
    glowing = np.take(faces.glowing, face) * mix * (chance > np.float32(1.0 - light.lit_windows))
    ground = np.take(faces.ground, face)
    if contact is not None:
        tint *= np.float32(1.0) - np.float32(0.72) * contact * ground
    colour: list[Image] = []
    emission: list[Image] = []
    cover = _snow_cover(face, fine_u, fine_v, tint, faces, light)
    for k in range(3):
        first = np.take(faces.colour[k], face)
        value = first + (np.take(faces.colour2[k], face) * varied - first) * mix
        value *= tint
        if cover is not None:
            white = np.float32(0.8 * (light.sky[k] + 0.45 * light.sun_colour[k]))
            value += (white - value) * cover
        if shadow is not None:
            value *= np.float32(1.0) - shadow * ground * np.take(faces.shaded[k], face)
        warm = (1.0, 0.78, 0.45)[k]
        colour.append(value)
        emission.append(np.take(faces.emit[k], face) + glowing * np.float32(warm))
    return Pixels(colour, emission, depth, alpha, ground)


def _texel(u: Image, v: Image, level: NDArray[np.int32], tile: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the flat atlas index of texture coordinates in tiles."""
    bits = 7 - level
    scale = np.left_shift(np.int32(1), bits)
    mask = scale - 1
    size = scale.astype(np.float32)
    # 8192 tiles up, so that truncation is floor; float32 still resolves 1/1024 there
    x = ((u + np.float32(8192.0)) * size).astype(np.int32) & mask
    y = ((v + np.float32(8192.0)) * size).astype(np.int32) & mask
    index: NDArray[np.int32] = tile * np.int32(PYRAMID) + np.take(OFFSET, level) + (y << bits) + x
    return index


def _snow_cover(face: NDArray[np.int64], u: Image, v: Image, tint: Image, faces: Table, light: Lighting) -> Image | None:
    """Return 0..1 cover of upward faces: patchy, thicker where the texture is raised to the light; None without snow."""
    if light.snow <= 0.0:
        return None
    patch = np.take(
        atlas().drift.reshape(-1),
        ((u * np.float32(31.0)).astype(np.int32) & 255) | (((v * np.float32(31.0)).astype(np.int32) & 255) << 8),
    )
    snowy = np.take(faces.snowy, face)
    cover = (
        snowy * np.float32(1.5) + patch * np.float32(1.7) + np.minimum(tint, np.float32(1.4)) * np.float32(0.6) - np.float32(0.95)
    )
    thick: Image = np.minimum(np.maximum(cover * np.float32(3.0), np.float32(0.0)), np.float32(0.95)) * (snowy > 0)
    return thick
