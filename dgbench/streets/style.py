"""Styles: ranges from which a domain's streets and camera are drawn.

Places: `game` (clean and saturated, one camera), `city` (muted, noisy), `adverse` (the city's streets in
bad weather) and `world` (other cameras, left-hand traffic, other architecture and plants). Colours are linear
reflectances.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from dgbench.streets.mesh import Colour

Range = tuple[float, float]

WEATHERS = ("night", "rain", "fog", "snow")


@dataclass(frozen=True)
class Style:
    """Ranges and palettes of one place. Lengths in metres, angles in degrees, probabilities 0..1."""

    # camera
    height: Range = (1.3, 1.45)
    focal: Range = (0.86, 0.9)
    pitch: Range = (-0.5, 1.0)
    yaw: Range = (-3.0, 3.0)
    roll: Range = (0.0, 0.0)
    # traffic and layout
    left_hand: float = 0.0
    lanes: dict[int, float] = field(default_factory=lambda: {1: 0.6, 2: 0.32, 3: 0.08})
    lane_width: Range = (3.1, 3.6)
    sidewalk: Range = (3.5, 7.0)
    bend: Range = (-0.0012, 0.0012)
    verge: float = 0.4
    frontage: dict[str, float] = field(
        default_factory=lambda: {"row": 0.38, "houses": 0.26, "park": 0.22, "wall": 0.07, "tower": 0.07}
    )
    traffic: Range = (0.35, 0.8)
    parked: Range = (0.2, 0.8)
    crowd: Range = (0.3, 1.0)
    street_trees: float = 0.75
    markings: tuple[Colour, ...] = ((0.75, 0.75, 0.74),)
    centre_line: tuple[Colour, ...] = ((0.75, 0.75, 0.74),)
    # architecture
    storeys: Range = (3.0, 7.0)
    pitched: float = 0.5
    facades: tuple[str, ...] = ("sash", "tall", "wide", "arched", "balcony", "shuttered")
    facades_tall: tuple[str, ...] = ("band", "curtain", "wide", "small")
    wall_textures: tuple[str, ...] = ("plaster", "plaster", "brick", "concrete", "stones")
    walls: tuple[Colour, ...] = ()
    roofs: tuple[Colour, ...] = ((0.3, 0.12, 0.08), (0.12, 0.12, 0.13), (0.2, 0.16, 0.13), (0.35, 0.2, 0.13))
    accents: tuple[Colour, ...] = (
        (0.5, 0.06, 0.05),
        (0.06, 0.16, 0.4),
        (0.05, 0.28, 0.12),
        (0.75, 0.55, 0.08),
        (0.1, 0.1, 0.1),
        (0.7, 0.7, 0.68),
        (0.28, 0.16, 0.1),
    )
    plain_side: str = "plaster"  # facade of a side without windows
    base: str = "stones"
    free_walls: tuple[str, ...] = ("brick", "stones", "concrete", "plaster", "setts", "concrete")
    fences: tuple[str, ...] = ("planks", "bars", "pickets", "mesh")
    fence_paint: tuple[Colour, ...] = (
        (0.3, 0.22, 0.14),
        (0.75, 0.73, 0.68),
        (0.1, 0.12, 0.1),
        (0.35, 0.36, 0.37),
        (0.14, 0.25, 0.16),
        (0.45, 0.36, 0.25),
    )
    # ground
    road: tuple[Colour, ...] = ((0.14, 0.14, 0.145), (0.2, 0.2, 0.2), (0.11, 0.115, 0.125))
    paving: tuple[Colour, ...] = ((0.38, 0.37, 0.35), (0.3, 0.3, 0.3), (0.42, 0.36, 0.3))
    paving_textures: tuple[str, ...] = ("paving", "setts", "paving", "concrete")
    terrain: tuple[Colour, ...] = ((0.1, 0.2, 0.05), (0.16, 0.24, 0.07), (0.2, 0.2, 0.08))
    # plants
    trees: dict[str, float] = field(default_factory=lambda: {"round": 0.6, "oval": 0.25, "cone": 0.15})
    shrub: str = "bush"
    leaves: tuple[Colour, ...] = ((0.1, 0.2, 0.04), (0.14, 0.24, 0.06), (0.07, 0.16, 0.06), (0.18, 0.24, 0.05))
    # signs and paint
    signs: tuple[str, ...] = ("disc", "triangle", "square", "text")
    board: str = "text"  # shape of large signs on two posts
    sign_colours: tuple[tuple[Colour, Colour], ...] = (
        ((0.8, 0.8, 0.8), (0.65, 0.03, 0.03)),
        ((0.03, 0.12, 0.5), (0.85, 0.85, 0.85)),
        ((0.85, 0.65, 0.05), (0.05, 0.05, 0.05)),
        ((0.7, 0.04, 0.04), (0.85, 0.85, 0.85)),
    )
    cars: tuple[Colour, ...] = ()
    clothes: tuple[Colour, ...] = ()
    fleet: str = "usual"  # key of `dgbench.streets.fleet.FLEETS`
    # light and sensor
    sunny: float = 0.8
    sun_height: Range = (0.35, 0.9)
    haze: Range = (0.0008, 0.002)
    saturation: Range = (1.12, 1.3)
    contrast: Range = (1.0, 1.15)
    exposure: Range = (0.95, 1.1)
    tint: float = 0.02
    hue: float = 0.0  # all hues turn by up to so many degrees
    noise: Range = (0.0, 0.004)
    blur: Range = (0.25, 0.4)
    vignette: Range = (0.0, 0.05)


VIVID_WALLS: tuple[Colour, ...] = (
    (0.62, 0.5, 0.36),
    (0.55, 0.53, 0.5),
    (0.42, 0.17, 0.11),
    (0.72, 0.68, 0.6),
    (0.6, 0.42, 0.2),
    (0.3, 0.3, 0.32),
    (0.5, 0.25, 0.16),
    (0.66, 0.58, 0.4),
    (0.25, 0.3, 0.36),
)
MUTED_WALLS: tuple[Colour, ...] = (
    (0.45, 0.42, 0.37),
    (0.36, 0.35, 0.34),
    (0.3, 0.2, 0.16),
    (0.55, 0.53, 0.49),
    (0.42, 0.36, 0.27),
    (0.22, 0.22, 0.22),
    (0.5, 0.45, 0.35),
    (0.33, 0.28, 0.23),
    (0.6, 0.6, 0.58),
    (0.28, 0.31, 0.28),
)
WORLD_WALLS: tuple[Colour, ...] = (
    (0.75, 0.72, 0.66),
    (0.65, 0.38, 0.25),
    (0.3, 0.5, 0.52),
    (0.72, 0.55, 0.2),
    (0.6, 0.25, 0.28),
    (0.4, 0.5, 0.3),
    (0.35, 0.33, 0.31),
    (0.68, 0.5, 0.48),
    (0.8, 0.78, 0.76),
    (0.5, 0.32, 0.2),
    (0.3, 0.36, 0.55),
)
CAR_PAINT: tuple[Colour, ...] = (
    (0.6, 0.6, 0.6),
    (0.35, 0.36, 0.37),
    (0.05, 0.05, 0.055),
    (0.8, 0.8, 0.78),
    (0.14, 0.15, 0.16),
    (0.45, 0.04, 0.04),
    (0.05, 0.1, 0.3),
    (0.06, 0.2, 0.1),
    (0.5, 0.46, 0.38),
    (0.6, 0.42, 0.05),
    (0.2, 0.13, 0.09),
    (0.3, 0.4, 0.5),
    (0.22, 0.27, 0.2),
)
CLOTHES: tuple[Colour, ...] = (
    (0.04, 0.05, 0.09),
    (0.5, 0.06, 0.07),
    (0.1, 0.2, 0.45),
    (0.7, 0.7, 0.68),
    (0.25, 0.25, 0.25),
    (0.08, 0.3, 0.14),
    (0.65, 0.5, 0.1),
    (0.36, 0.22, 0.13),
    (0.55, 0.2, 0.4),
    (0.12, 0.1, 0.09),
    (0.5, 0.42, 0.32),
    (0.2, 0.35, 0.4),
    (0.75, 0.32, 0.08),
)

GAME = Style(walls=VIVID_WALLS, cars=CAR_PAINT, clothes=CLOTHES)

CITY = replace(
    GAME,
    height=(1.2, 1.35),
    focal=(0.98, 1.12),
    pitch=(-1.5, 1.0),
    yaw=(-4.0, 4.0),
    roll=(-0.6, 0.6),
    lanes={1: 0.75, 2: 0.25},
    lane_width=(2.9, 3.5),
    walls=MUTED_WALLS,
    storeys=(3.0, 7.0),
    frontage={"row": 0.42, "houses": 0.23, "park": 0.19, "wall": 0.1, "tower": 0.06},
    traffic=(0.4, 1.0),
    parked=(0.35, 1.0),
    crowd=(0.5, 1.6),
    street_trees=0.72,
    pitched=0.6,
    facades=("tall", "sash", "arched", "shuttered", "small", "wide"),
    road=((0.17, 0.17, 0.17), (0.24, 0.235, 0.23), (0.13, 0.13, 0.135), (0.28, 0.265, 0.25)),
    paving=((0.33, 0.32, 0.31), (0.4, 0.38, 0.36), (0.26, 0.25, 0.25)),
    terrain=((0.13, 0.17, 0.07), (0.2, 0.18, 0.1), (0.17, 0.2, 0.08), (0.24, 0.2, 0.13)),
    leaves=((0.1, 0.15, 0.05), (0.15, 0.19, 0.07), (0.07, 0.11, 0.05), (0.2, 0.19, 0.07), (0.25, 0.17, 0.06)),
    trees={"round": 0.62, "oval": 0.26, "cone": 0.06, "bare": 0.06},
    sunny=0.4,
    haze=(0.002, 0.006),
    saturation=(0.65, 0.9),
    contrast=(0.92, 1.12),
    exposure=(0.9, 1.3),
    tint=0.06,
    noise=(0.006, 0.02),
    blur=(0.35, 0.8),
    vignette=(0.05, 0.25),
)

ADVERSE = replace(
    CITY,
    height=(1.25, 1.5),
    focal=(0.9, 1.08),
    crowd=(0.4, 1.2),
    walls=MUTED_WALLS + VIVID_WALLS[:4],
    frontage={"row": 0.42, "houses": 0.22, "park": 0.2, "wall": 0.08, "tower": 0.08},
    sunny=0.15,
    noise=(0.008, 0.024),
)

WORLD = replace(
    GAME,
    height=(1.1, 2.4),
    focal=(0.62, 1.2),
    pitch=(-3.0, 4.0),
    yaw=(-9.0, 9.0),
    roll=(-1.5, 1.5),
    left_hand=0.6,
    lanes={1: 0.6, 2: 0.28, 3: 0.12},
    lane_width=(2.8, 3.8),
    sidewalk=(2.5, 6.5),
    bend=(-0.002, 0.002),
    verge=0.5,
    frontage={"row": 0.3, "houses": 0.28, "park": 0.2, "wall": 0.12, "tower": 0.1},
    traffic=(0.25, 1.0),
    parked=(0.1, 0.8),
    crowd=(0.3, 1.8),
    street_trees=0.75,
    markings=((0.7, 0.7, 0.68), (0.62, 0.6, 0.52)),
    centre_line=((0.65, 0.45, 0.08), (0.7, 0.7, 0.68), (0.6, 0.5, 0.2)),
    storeys=(1.5, 6.0),
    pitched=0.25,
    facades=("wide", "balcony", "small", "curtain", "band", "shuttered", "sash"),
    wall_textures=("plaster", "concrete", "planks", "brick", "corrugated", "setts"),
    walls=WORLD_WALLS,
    roofs=((0.4, 0.16, 0.09), (0.3, 0.32, 0.34), (0.2, 0.3, 0.32), (0.45, 0.3, 0.18), (0.13, 0.13, 0.13)),
    fences=("mesh", "rails", "bars", "planks", "pickets"),
    road=((0.2, 0.19, 0.18), (0.28, 0.26, 0.24), (0.13, 0.13, 0.13), (0.3, 0.24, 0.19)),
    paving=((0.45, 0.36, 0.28), (0.4, 0.4, 0.39), (0.4, 0.24, 0.18), (0.5, 0.47, 0.4)),
    paving_textures=("setts", "paving", "concrete", "brick", "gravel"),
    terrain=((0.36, 0.25, 0.14), (0.4, 0.34, 0.2), (0.16, 0.22, 0.06), (0.3, 0.17, 0.1), (0.28, 0.27, 0.12)),
    trees={"palm": 0.25, "umbrella": 0.25, "round": 0.25, "cone": 0.15, "oval": 0.1},
    leaves=((0.14, 0.2, 0.06), (0.2, 0.22, 0.1), (0.08, 0.18, 0.1), (0.24, 0.24, 0.08), (0.12, 0.14, 0.07)),
    signs=("diamond", "octagon", "text", "square", "disc"),
    sign_colours=(
        ((0.85, 0.62, 0.04), (0.04, 0.04, 0.04)),
        ((0.65, 0.04, 0.04), (0.85, 0.85, 0.85)),
        ((0.03, 0.3, 0.14), (0.85, 0.85, 0.85)),
        ((0.82, 0.82, 0.8), (0.05, 0.05, 0.05)),
        ((0.8, 0.35, 0.03), (0.05, 0.05, 0.05)),
    ),
    sunny=0.65,
    sun_height=(0.3, 1.0),
    haze=(0.001, 0.008),
    saturation=(0.75, 1.2),
    contrast=(0.85, 1.2),
    exposure=(0.8, 1.25),
    tint=0.09,
    noise=(0.0, 0.022),
    blur=(0.2, 0.9),
    vignette=(0.0, 0.35),
)
