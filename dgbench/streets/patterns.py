"""The patterns of the texture atlas: small tileable pictures of materials, facades, signs and wheels, from raw noise.

A texel holds a shade (1 = leave the colour as it is), a mix between a face's two colours, and an alpha. Everything is
elementwise float32 or integer work, so the patterns are the same on any machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dgbench.streets.dice import generator, uniform

Image = NDArray[np.floating[Any]]  # float32; NumPy's stubs lose that in arithmetic
Tile = tuple[Image, Image, Image]  # shade (1 = neutral), mix, alpha; (SIZE, SIZE), top row first

SIZE = 128

_row, _column = (grid.astype(np.float32) for grid in np.mgrid[0:SIZE, 0:SIZE])


def noise(name: str, cells: int, octaves: int = 4, size: int = SIZE) -> Image:
    """Return (size, size) tileable value noise in about [0, 1]; `cells` lattice cells per side in the first octave."""
    total = np.zeros((size, size), np.float32)
    weight, scale = np.float32(1.0), np.float32(0.0)
    for octave in range(octaves):
        count = cells << octave
        if count > size:
            break
        lattice = uniform(generator("noise", name, octave), count * count).astype(np.float32).reshape(count, count)
        position = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(count) / np.float32(size)
        cell = position.astype(np.int64)
        t = position - cell.astype(np.float32)
        t = t * t * (np.float32(3.0) - np.float32(2.0) * t)
        low, high = cell % count, (cell + 1) % count
        rows = lattice[low] + (lattice[high] - lattice[low]) * t[:, None]
        total = total + weight * (rows[:, low] + (rows[:, high] - rows[:, low]) * t[None, :])
        scale = scale + weight
        weight = weight * np.float32(0.5)
    return total / scale


def _plain(shade: Image, mix: Image | None = None, alpha: Image | None = None) -> Tile:
    return (
        shade.astype(np.float32),
        np.zeros_like(_row) if mix is None else mix.astype(np.float32),
        np.ones_like(_row) if alpha is None else alpha.astype(np.float32),
    )


def _flat() -> Tile:
    return _plain(np.ones_like(_row))


def _asphalt() -> Tile:
    patch = noise("asphalt", 4, 3)
    crack = np.abs(noise("crack", 3, 4) - 0.5) < 0.008
    return _plain(0.86 + 0.28 * noise("grain", 64, 2) * (0.5 + patch) - 0.25 * crack, 0.5 * (patch > 0.62))


def _slabs(across: int, down: int, bond: bool) -> Callable[[], Tile]:
    """Return joints between slabs; with `bond`, each second course is shifted by half a slab."""

    def make() -> Tile:
        high, wide = SIZE // down, SIZE // across
        course = (_row // high).astype(np.int64)
        shift = (course % 2) * (wide // 2) if bond else 0 * course
        column = (_column.astype(np.int64) + shift) % SIZE
        joint = (_row % high < 1.5) | (column % wide < 1.5)
        tone = uniform(generator("slab", across, down), 4096).astype(np.float32)
        each = tone[(course * 37 + (column // wide) * 11) % 4096]
        return _plain(0.82 + 0.24 * each + 0.14 * (noise("slab", 32, 2) - 0.5), joint)

    return make


def _grass() -> Tile:
    return _plain(0.6 + 0.8 * noise("blade", 48, 2), np.clip(noise("turf", 5, 4) * 2.6 - 0.8, 0, 1))


def _gravel() -> Tile:
    return _plain(0.55 + 0.9 * noise("gravel", 40, 2), np.clip(noise("soil", 4, 3) * 2.0 - 0.5, 0, 1))


def _plaster() -> Tile:
    return _plain(0.9 + 0.2 * noise("plaster", 6, 5))


def _concrete() -> Tile:
    joint = (_row % 64 < 1.2) | (_column % 64 < 1.2)
    return _plain(0.78 + 0.4 * noise("concrete", 5, 5) - 0.2 * joint)


def _planks() -> Tile:
    each = uniform(generator("plank"), 16).astype(np.float32)[(_column // 16).astype(np.int64)]
    gap = _column % 16 < 2
    return _plain((0.8 + 0.35 * each) * (0.85 + 0.3 * noise("wood", 16, 3)) * (1 - 0.65 * gap))


def _bars() -> Tile:
    bar = (_column % 16 < 5) | (np.abs(_row - 14) < 4) | (np.abs(_row - 108) < 4)
    return _plain(np.where(_column % 16 < 2, 1.25, 0.9), None, bar)


def _mesh() -> Tile:
    wire = ((_row + _column) % 16 < 3) | ((_row - _column) % 16 < 3) | (_column < 5) | (_row < 4)
    return _plain(np.ones_like(_row), None, wire)


def _pickets() -> Tile:
    inside = np.abs(_column % 32 - 15.5)
    picket = (inside < 10) & (_row > inside * 1.2)
    rail = (np.abs(_row - 36) < 6) | (np.abs(_row - 100) < 6)
    return _plain(np.where(picket, 1.0 - 0.02 * inside, 0.72), None, picket | rail)


def _rails() -> Tile:
    rail = (np.abs(_row - 20) < 7) | (np.abs(_row - 64) < 5) | (np.abs(_row - 104) < 5) | (_column < 8)
    return _plain(np.where(_row % 44 < 22, 1.1, 0.85), None, rail)


def _round() -> Tile:
    t = (_column - 63.5) / 64.0
    return _plain((1.12 - 0.5 * t * t - 0.14 * t) * (0.94 + 0.12 * noise("round", 8, 3)))


def _cloth() -> Tile:
    t = (_column - 63.5) / 64.0
    fold = noise("cloth", 5, 3)
    return _plain((1.12 - 0.45 * t * t - 0.12 * t) * (0.7 + 0.6 * fold), np.clip((fold - 0.62) * 6, 0, 1))


def _bark() -> Tile:
    t = (_column - 63.5) / 64.0
    return _plain((1.1 - 0.6 * t * t - 0.2 * t) * (0.6 + 0.8 * noise("bark", 20, 3)))


def _cloud() -> Tile:
    return _plain(np.ones_like(_row), np.clip(noise("cloud", 4, 6) * 2.6 - 0.85, 0, 1))


def _roof() -> Tile:
    course = _row % 16
    tile = np.abs((_column + 8 * ((_row // 16) % 2)) % 16 - 7.5)
    return _plain(0.72 + 0.03 * course + 0.02 * (8 - tile) - 0.25 * (course < 2) + 0.2 * (noise("roof", 16, 3) - 0.5))


def _corrugated() -> Tile:
    phase = _column % 16
    return _plain(np.where(phase < 8, 0.88 + 0.03 * phase, 1.12 - 0.03 * (phase - 8)) * (0.94 + 0.12 * noise("rust", 4, 4)))


def _pane(
    left: float,
    right: float,
    top: float,
    bottom: float,
    *,
    frame: float = 4.0,
    mullions: int = 1,
    transoms: int = 0,
    arch: bool = False,
    sill: bool = True,
    balcony: bool = False,
) -> Callable[[], Tile]:
    """Return one bay of a facade: wall (mix 0) around one window (mix 1) with frame, glazing bars, reveal shadow and sill."""

    def make() -> Tile:
        shade = 0.95 + 0.1 * noise("wall", 24, 3)
        inside = (_column >= left) & (_column < right) & (_row >= top) & (_row < bottom)
        rim = (_column >= left - frame) & (_column < right + frame) & (_row >= top - frame) & (_row < bottom + frame)
        if arch:
            half, middle = (right - left) / 2, (left + right) / 2
            drop = (_column - middle) * (_column - middle) / half * 0.8
            inside, rim = inside & (_row > top + drop), rim & (_row > top + drop - 2 * frame)
        shade = np.where(rim & ~inside, 1.3, shade)
        # light falls from the top left, so the reveal darkens the glass there
        reveal = inside & ((_row < top + 6) | (_column < left + 3))
        glass = 0.75 + 0.6 * (_row - top) / (bottom - top) + 0.35 * noise("glass", 3, 3)
        shade = np.where(inside, np.where(reveal, 0.35, glass), shade)
        mix = inside.astype(np.float32)
        for k in range(1, mullions + 1):
            bar = inside & (np.abs(_column - (left + (right - left) * k / (mullions + 1))) < 2.0)
            shade, mix = np.where(bar, 1.25, shade), np.where(bar, 0.0, mix)
        for k in range(1, transoms + 1):
            bar = inside & (np.abs(_row - (top + (bottom - top) * k / (transoms + 1) * 0.8)) < 2.0)
            shade, mix = np.where(bar, 1.25, shade), np.where(bar, 0.0, mix)
        if sill:
            shade = np.where((_row >= bottom + frame) & (_row < bottom + frame + 4) & rim.any(axis=0)[None, :], 1.35, shade)
            shade = np.where((_row >= bottom + frame + 4) & (_row < bottom + frame + 9) & rim.any(axis=0)[None, :], 0.72, shade)
        if balcony:
            rail = (_row > 84) & (_row < 120) & (_column > 12) & (_column < 116)
            bars = rail & ((_column % 8 < 3) | (_row < 88))
            shade, mix = np.where(bars, 0.4, shade), np.where(bars, 0.0, mix)
            shade = np.where((_row >= 118) & (_row < 124) & (_column > 8) & (_column < 120), 1.2, shade)
        return _plain(shade, mix)

    return make


def _beside(left: Callable[[], Tile], right: Callable[[], Tile]) -> Callable[[], Tile]:
    """Return one bay with the left half of one tile and the right half of another."""

    def make() -> Tile:
        (shade, mix, alpha), (shade2, mix2, alpha2) = left(), right()
        first = _column < SIZE // 2
        return np.where(first, shade, shade2), np.where(first, mix, mix2), np.where(first, alpha, alpha2)

    return make


def _siding() -> Tile:
    each = uniform(generator("siding"), 8).astype(np.float32)[(_row // 16).astype(np.int64)]
    return _plain((0.86 + 0.2 * each) * (0.9 + 0.2 * noise("siding", 24, 3)) * np.where(_row % 16 < 3, 0.6, 1.0))


def _roughcast() -> Tile:
    return _plain(0.72 + 0.56 * noise("roughcast", 36, 3), 0.4 * (noise("roughcast patch", 5, 3) > 0.6))


def _slats() -> Tile:
    slat = (_row % 26 < 15) | (np.abs(_column - 8) < 6)
    return _plain(np.where(_row % 26 < 4, 1.2, 0.92), None, slat)


def _ranch() -> Tile:
    beam = (np.abs(_row - 18) < 9) | (np.abs(_row - 110) < 9) | (_column < 10)
    cross = (np.abs(_row - _column) < 8) | (np.abs(_row + _column - 127) < 8)
    return _plain(np.where(beam, 1.08, 0.88), None, beam | cross)


def _shop() -> Tile:
    """Return a shop front: signboard on top, glass with goods behind it, a door, a plinth."""
    board = _row < 30
    glass = (_row >= 36) & (_row < 112) & (_column >= 5) & (_column < 123)
    bar = (np.abs(_column - 84) < 2.5) | (np.abs(_column - 116) < 2.5) | (np.abs(_row - 56) < 1.5)
    letters = board & (_row > 9) & (_row < 22) & (_column > 20) & (_column < 104) & (noise("letters", 32, 1) > 0.5)
    goods = 0.4 + 1.3 * noise("goods", 10, 3) * (_row > 64)
    shade = np.where(board, np.where(letters, 1.8, 1.05), np.where(glass & ~bar, goods, 0.8))
    return _plain(shade * np.where(np.abs(_row - 33) < 3, 0.4, 1.0), glass & ~bar)


def _garage() -> Tile:
    door = (_row > 24) & (_column > 14) & (_column < 114)
    return _plain(np.where(door, np.where(_row % 14 < 2, 0.7, 1.0), 1.0), door)


def _door() -> Tile:
    door = (_row > 20) & (_column > 34) & (_column < 94)
    panel = door & (np.abs(_column - 64) % 22 > 5) & (_row % 36 > 8)
    step = (_row > 120) & (_column > 24) & (_column < 104)
    return _plain(np.where(step, 1.3, np.where(door, np.where(panel, 0.85, 1.1), 1.0)), door)


def _glazing() -> Tile:
    """Return side windows of a bus or tram: glass with thin posts."""
    post = _column % 64 < 5
    return _plain(np.where(post, 0.6, 0.7 + 0.8 * noise("pane", 4, 3)), ~post)


def _crossing() -> Tile:
    return _plain(0.92 + 0.16 * noise("paint", 16, 3), ((_column >= 32) & (_column < 96)) * (noise("worn", 12, 3) > 0.3))


def _hedge() -> Tile:
    clump = noise("hedge", 12, 4)
    return _plain(0.35 + 1.2 * clump - 0.25 * (noise("twig", 40, 2) > 0.62), np.clip(clump * 2.4 - 0.8, 0, 1))


def _stones() -> Tile:
    shade, mix, alpha = _slabs(6, 10, True)()
    return shade * (0.75 + 0.5 * noise("stone", 10, 3)), mix * (noise("mortar", 10, 2) > 0.35), alpha


def _sign(shape: str, seed: int) -> Callable[[], Tile]:
    """Return a tile of a glyph on a plate: mix 0 is the field, mix 1 border and glyph."""

    def make() -> Tile:
        x, y = (_column - 63.5) / 64.0, (_row - 63.5) / 64.0
        if shape == "disc":
            border = x * x + y * y > 0.62
        elif shape == "triangle":
            border = (y > 0.72) | (np.abs(x) > 0.48 + 0.5 * (y - 0.3))
        elif shape == "text":
            border = (np.abs(x) > 0.93) | (np.abs(y) > 0.86)
        else:
            border = (np.abs(x) > 0.86) | (np.abs(y) > 0.86)
        blob = noise(f"sign{seed}", 10 if shape == "text" else 5, 1)
        if shape == "text":
            glyph = (np.abs((_row % 42) - 21) < 10) & (np.abs(x) < 0.8) & (noise(f"text{seed}", 20, 2) > 0.47)
        else:
            glyph = (blob > 0.56) & (np.abs(x) < 0.42) & (np.abs(y) < 0.45)
        return _plain(np.where(glyph & ~border, 0.85, 1.0), border | glyph)

    return make


def _poster() -> Tile:
    return _plain(0.6 + 0.8 * noise("poster", 6, 3), (noise("poster2", 4, 2) > 0.52).astype(np.float32))


def _wheel() -> Tile:
    x, y = (_column - 63.5) / 64.0, (_row - 63.5) / 64.0
    square = x * x + y * y
    spoke = (np.abs(x) < 0.05) | (np.abs(y) < 0.05) | (np.abs(x - y) < 0.06) | (np.abs(x + y) < 0.06)
    return _plain(np.ones_like(_row), None, ((square > 0.8) | spoke | (square < 0.03)) & (square < 1.0))


PATTERNS: dict[str, Callable[[], Tile]] = {
    "flat": _flat,
    "asphalt": _asphalt,
    "paving": _slabs(4, 4, True),
    "setts": _slabs(8, 8, True),
    "grass": _grass,
    "gravel": _gravel,
    "brick": _slabs(8, 16, True),
    "plaster": _plaster,
    "concrete": _concrete,
    "planks": _planks,
    "bars": _bars,
    "mesh": _mesh,
    "pickets": _pickets,
    "rails": _rails,
    "round": _round,
    "cloth": _cloth,
    "bark": _bark,
    "cloud": _cloud,
    "roof": _roof,
    "corrugated": _corrugated,
    "shop": _shop,
    "garage": _garage,
    "door": _door,
    "glazing": _glazing,
    "crossing": _crossing,
    "hedge": _hedge,
    "stones": _stones,
    "wheel": _wheel,
    "poster": _poster,
    "sash": _pane(40, 88, 30, 98, mullions=1, transoms=1),
    "tall": _pane(44, 84, 18, 112, mullions=1, transoms=1),
    "wide": _pane(18, 110, 34, 94, mullions=2),
    "band": _pane(0, 128, 40, 100, frame=3, mullions=3, sill=False),
    "arched": _pane(40, 88, 22, 100, arch=True),
    "curtain": _pane(3, 125, 6, 122, frame=3, mullions=1, sill=False),
    "small": _pane(46, 82, 44, 88, mullions=0, frame=6),
    "balcony": _pane(36, 92, 22, 118, balcony=True, sill=False),
    "shuttered": _pane(44, 84, 30, 98, frame=16, mullions=1),
    "disc0": _sign("disc", 0),
    "disc1": _sign("disc", 1),
    "triangle0": _sign("triangle", 2),
    "triangle1": _sign("triangle", 3),
    "square0": _sign("square", 4),
    "square1": _sign("square", 5),
    "text0": _sign("text", 6),
    "text1": _sign("text", 7),
    # of the pretraining streets alone
    "siding": _siding,
    "roughcast": _roughcast,
    "ashlar": _slabs(2, 8, True),
    "shingles": _slabs(16, 8, True),
    "flags": _slabs(2, 4, True),
    "pavers": _slabs(8, 4, False),
    "slats": _slats,
    "ranch": _ranch,
    "slit": _pane(54, 74, 14, 114, mullions=0, transoms=3),
    "lattice": _pane(28, 100, 26, 102, mullions=3, transoms=3, frame=6),
    "paired": _beside(_pane(12, 50, 32, 98, mullions=0), _pane(78, 116, 32, 98, mullions=0, transoms=1)),
    "fan": _pane(30, 98, 34, 108, arch=True, mullions=2, transoms=1),
    "louvre": _pane(24, 104, 46, 88, mullions=0, transoms=4, sill=False),
    "loft": _pane(10, 118, 14, 110, mullions=3, transoms=2, frame=5),
    "grid": _pane(8, 120, 10, 118, mullions=1, transoms=1, frame=8, sill=False),
    "strips": _pane(46, 82, 0, 128, mullions=0, frame=6, sill=False),
    "deck": _pane(0, 128, 62, 112, mullions=5, frame=8, sill=False),
    "emblem0": _sign("square", 8),
    "emblem1": _sign("square", 9),
    "notice0": _sign("text", 10),
    "notice1": _sign("text", 11),
}
