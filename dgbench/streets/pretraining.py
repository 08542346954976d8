"""Styles of `streets-pretrain`, on which towers are pretrained: four towns seen from four kinds of vehicle, always by day.

Nothing that sets one domain apart from another is shared with any other domain: heights and focal lengths of cameras,
palettes, facades, wall and paving textures, fences, trees, signs, vehicles, haze. `tests/dgbench/streets/test_pretraining.py`
compares them. There is no weather, and no night.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import replace

from dgbench.streets.mesh import Colour
from dgbench.streets.style import Range, Style

HUES = (0.01, 0.07, 0.13, 0.21, 0.3, 0.42, 0.55, 0.66, 0.78, 0.9)
LOW, HIGH = (0.7, 1.05), (2.45, 3.6)  # metres
WIDE, LONG = (0.44, 0.6), (1.25, 1.7)  # focal lengths in image widths
RIGS: tuple[tuple[Range, Range, Range], ...] = (  # height, focal length, pitch: of a kart, a scooter, a bus, a lorry
    (LOW, WIDE, (-5.0, 3.0)),
    (LOW, LONG, (-2.0, 1.0)),
    (HIGH, WIDE, (-2.0, 10.0)),
    (HIGH, LONG, (0.0, 5.0)),
)


def _shades(hues: Sequence[float], saturation: float, *values: float) -> tuple[Colour, ...]:
    """Return linear colours of each value in each hue (0..1 around the circle), rounded to thousandths."""
    mixed = [colorsys.hsv_to_rgb(hue, saturation, value) for value in values for hue in hues]
    return tuple((round(r, 3), round(g, 3), round(b, 3)) for r, g, b in mixed)


_WORN = _shades((0.1, 0.6), 0.11, 0.67)
_PLATES: tuple[tuple[Colour, Colour], ...] = tuple(
    (field, border)
    for field, border in zip(
        _shades((0.03, 0.15, 0.4, 0.62, 0.8), 0.78, 0.58) + _shades((0.12,), 0.14, 0.76),
        (*_shades((0.12,), 0.12, 0.73), *_shades((0.6,), 0.6, 0.09)) * 3,
        strict=True,
    )
)

BASE = Style(
    yaw=(-10.0, 10.0),
    roll=(-2.5, 2.5),
    left_hand=0.5,
    lanes={1: 0.5, 2: 0.35, 3: 0.15},
    lane_width=(2.7, 4.0),
    sidewalk=(2.0, 7.5),
    bend=(-0.0024, 0.0024),
    verge=0.5,
    frontage={"row": 0.32, "houses": 0.25, "park": 0.19, "wall": 0.14, "tower": 0.1},
    traffic=(0.25, 1.1),
    parked=(0.1, 0.9),
    crowd=(0.3, 1.8),
    street_trees=0.75,
    markings=_WORN,
    centre_line=(*_shades((0.11, 0.14), 0.58, 0.61), *_shades((0.55,), 0.08, 0.66)),
    storeys=(1.5, 7.5),
    facades=("slit", "lattice", "paired", "fan", "louvre", "loft"),
    facades_tall=("grid", "strips", "deck"),
    wall_textures=("siding", "roughcast", "ashlar", "shingles"),
    plain_side="roughcast",
    base="ashlar",
    free_walls=("ashlar", "roughcast", "siding", "shingles"),
    fences=("slats", "ranch"),
    paving_textures=("flags", "pavers", "roughcast"),
    trees={"dome": 0.45, "column": 0.3, "tiered": 0.25},
    shrub="shrub",
    signs=("hexagon", "shield", "arrow"),
    board="notice",
    sign_colours=_PLATES,
    cars=_shades(HUES, 0.72, 0.36) + _shades(HUES[::3], 0.35, 0.52) + _shades((0.09, 0.58), 0.12, 0.07, 0.24, 0.71),
    clothes=_shades(HUES, 0.66, 0.27) + _shades(HUES[1::3], 0.5, 0.62) + _shades((0.08, 0.61), 0.24, 0.058, 0.31, 0.66),
    fleet="pretraining",
    sunny=0.6,
    sun_height=(0.2, 0.99),
    haze=(0.0001, 0.0007),
    saturation=(0.5, 1.45),
    contrast=(0.8, 1.25),
    exposure=(0.72, 1.4),
    tint=0.15,
    hue=20.0,
    noise=(0.0, 0.025),
    blur=(0.2, 0.9),
    vignette=(0.0, 0.4),
)

TOWNS = (
    replace(
        BASE,
        pitched=0.7,
        walls=_shades((0.02, 0.05, 0.09), 0.52, 0.33, 0.49) + _shades((0.12,), 0.31, 0.58),
        roofs=_shades((0.61, 0.7), 0.21, 0.15, 0.26),
        accents=_shades((0.02, 0.36, 0.63), 0.81, 0.22) + _shades((0.13,), 0.17, 0.53),
        fence_paint=_shades((0.06, 0.38), 0.48, 0.19, 0.41),
        road=_shades((0.66,), 0.09, 0.155, 0.225),
        paving=_shades((0.03, 0.09), 0.3, 0.34),
        terrain=_shades((0.2, 0.26), 0.7, 0.17, 0.23),
        leaves=_shades((0.23, 0.29, 0.34), 0.68, 0.13, 0.21),
    ),
    replace(
        BASE,
        pitched=0.35,
        walls=_shades(HUES[::2], 0.29, 0.63, 0.78),
        roofs=_shades((0.04, 0.08), 0.64, 0.31, 0.43),
        accents=_shades((0.48, 0.57, 0.94), 0.57, 0.47) + _shades((0.16,), 0.62, 0.69),
        fence_paint=_shades((0.55, 0.15), 0.13, 0.69, 0.84),
        road=_shades((0.1,), 0.15, 0.26, 0.33),
        paving=_shades((0.12, 0.17), 0.21, 0.49),
        terrain=_shades((0.13, 0.17), 0.47, 0.34, 0.41),
        leaves=_shades((0.19, 0.25, 0.41), 0.55, 0.19, 0.29),
    ),
    replace(
        BASE,
        pitched=0.15,
        walls=_shades((0.1, 0.35, 0.6, 0.85), 0.08, 0.19, 0.41, 0.66),
        roofs=_shades((0.58, 0.12), 0.12, 0.085, 0.37),
        accents=_shades((0.09, 0.6, 0.98), 0.9, 0.33) + _shades((0.62,), 0.25, 0.16),
        fence_paint=_shades((0.6, 0.02), 0.27, 0.15, 0.29),
        road=_shades((0.5, 0.8), 0.06, 0.12, 0.185),
        paving=_shades((0.58, 0.7), 0.14, 0.27),
        terrain=_shades((0.09, 0.22), 0.36, 0.21, 0.29),
        leaves=_shades((0.27, 0.33, 0.45), 0.46, 0.1, 0.16),
    ),
    replace(
        BASE,
        pitched=0.45,
        walls=_shades(HUES[1::2], 0.58, 0.37, 0.54),
        roofs=_shades((0.4, 0.93), 0.43, 0.21, 0.34),
        accents=_shades((0.17, 0.45, 0.75), 0.7, 0.42) + _shades((0.07,), 0.36, 0.29),
        fence_paint=_shades((0.12, 0.72), 0.61, 0.25, 0.52),
        road=_shades((0.03,), 0.25, 0.17, 0.28),
        paving=_shades((0.98, 0.07), 0.41, 0.28),
        terrain=_shades((0.05, 0.24), 0.55, 0.26, 0.2),
        leaves=_shades((0.06, 0.11, 0.16, 0.31), 0.74, 0.17, 0.26),
    ),
)

PRETRAINING = tuple(replace(town, height=height, focal=focal, pitch=pitch) for town in TOWNS for height, focal, pitch in RIGS)
