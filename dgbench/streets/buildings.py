"""Buildings, walls and fences, made for each scene: facades with bays and floors, shop fronts, doors, roofs."""

from __future__ import annotations

import math

from dgbench.streets.atlas import TEX
from dgbench.streets.dice import Dice, turn
from dgbench.streets.mesh import BLUNT, SEE_THROUGH, SNOWY, TWO_SIDED, WINDOW, Colour, Mesh, Point, Scene
from dgbench.streets.style import Style

BUILDING, WALL, FENCE = 2, 3, 4


def tone(dice: Dice, colour: Colour, spread: float = 0.18) -> Colour:
    """Return a colour near `colour`: brightness and each channel vary independently."""
    light = dice.between(1.0 - spread, 1.0 + spread)
    return (
        min(colour[0] * light * dice.between(0.94, 1.06), 0.95),
        min(colour[1] * light * dice.between(0.94, 1.06), 0.95),
        min(colour[2] * light * dice.between(0.94, 1.06), 0.95),
    )


class Frame:
    """Local axes of a building: x across the frontage, z away from the street, turned about (x0, z0)."""

    def __init__(self, x: float, z: float, heading: float) -> None:
        self.x, self.z = x, z
        self.cosine, self.sine = turn(heading)

    def at(self, x: float, y: float, z: float) -> Point:
        return (self.x + x * self.cosine + z * self.sine, y, self.z - x * self.sine + z * self.cosine)


def building(
    scene: Scene,
    dice: Dice,
    style: Style,
    x: float,
    z: float,
    heading: float,
    *,
    width: float,
    depth: float,
    height: float,
    shop: bool = False,
    pitched: bool | None = None,
) -> None:
    """Add a building whose front is centred on (x, z); `heading` turns its inward normal from +z to the right."""
    mesh = scene.start()
    frame = Frame(x, z, heading)
    at, half = frame.at, width / 2.0
    wall = tone(dice, dice.pick(style.walls))
    glass = dice.pick(((0.06, 0.08, 0.1), (0.12, 0.15, 0.18), (0.2, 0.25, 0.3), (0.05, 0.05, 0.05), (0.3, 0.33, 0.36)))
    second = tone(dice, dice.pick(style.walls))
    roof = tone(dice, dice.pick(style.roofs))
    slot = scene.colour(wall, glass, second, roof, tone(dice, dice.pick(style.accents)))
    facade = TEX[dice.pick(style.facades_tall if height > 22 else style.facades)]
    detail = TEX[dice.pick(style.wall_textures)]
    bay, floor = dice.between(2.2, 3.6), dice.between(2.8, 3.5)
    base = floor * dice.between(1.0, 1.3) if shop else (dice.between(0.4, 0.9) if dice.chance(0.6) else 0.0)
    grain = dice.between(1.2, 2.4)

    def side(a: tuple[float, float], b: tuple[float, float], *, front: bool) -> None:
        bottom, top = base, height
        mesh.poly(
            [at(a[0], bottom, a[1]), at(b[0], bottom, b[1]), at(b[0], top, b[1]), at(a[0], top, a[1])],
            slot,
            BUILDING,
            tex=facade if front or dice.chance(0.55) else TEX[style.plain_side],
            slot2=slot + 1,
            detail=detail,
            period=(bay, floor),
            grain=grain,
            glow=WINDOW,
        )
        if base:
            mesh.poly(
                [at(a[0], 0.0, a[1]), at(b[0], 0.0, b[1]), at(b[0], base, b[1]), at(a[0], base, a[1])],
                slot + (4 if shop and front else 2),
                BUILDING,
                tex=TEX["shop"] if shop and front else TEX[style.base],
                slot2=slot + 1,
                period=(dice.between(3.5, 5.5), base) if shop else (2.0, 2.0),
                glow=WINDOW if shop and front else 0,
            )

    # corners go left to right as the street sees them
    side((-half, 0.0), (half, 0.0), front=True)
    side((-half, depth), (-half, 0.0), front=False)
    side((half, 0.0), (half, depth), front=False)
    if pitched is None:
        pitched = height < 18 and dice.chance(style.pitched)
    if pitched:
        _gable(mesh, dice, frame, slot, half, depth, height, dice.between(0.25, 0.55) * min(depth, 9.0))
    else:
        edge = dice.between(0.3, 0.8)
        mesh.poly(
            [at(-half, height, 0.0), at(half, height, 0.0), at(half, height, depth), at(-half, height, depth)],
            slot + 3,
            BUILDING,
            flags=SNOWY,
        )
        mesh.poly(
            [
                at(-half - 0.1, height - edge, -0.15),
                at(half + 0.1, height - edge, -0.15),
                at(half + 0.1, height, -0.15),
                at(-half - 0.1, height, -0.15),
            ],
            slot + 2,
            BUILDING,
            detail=detail,
            layer=1,
        )
        if dice.chance(0.3):
            a = dice.between(-half * 0.7, half * 0.3)
            mesh.poly(
                [
                    at(a, height, depth * 0.4),
                    at(a + 2.5, height, depth * 0.4),
                    at(a + 2.5, height + 2.2, depth * 0.4),
                    at(a, height + 2.2, depth * 0.4),
                ],
                slot + 2,
                BUILDING,
                detail=TEX["plaster"],
                layer=2,
            )
    if not shop:
        for _ in range(1 + dice.index(2)):
            a = dice.between(-half + 1.0, half - 1.0)
            garage = width > 9 and dice.chance(0.3)
            size = (2.6, 2.4) if garage else (1.9, 2.7)
            mesh.poly(
                [
                    at(a - size[0] / 2, 0.0, -0.04),
                    at(a + size[0] / 2, 0.0, -0.04),
                    at(a + size[0] / 2, size[1], -0.04),
                    at(a - size[0] / 2, size[1], -0.04),
                ],
                slot + 2,
                BUILDING,
                tex=TEX["garage" if garage else "door"],
                slot2=slot + 4,
                layer=1,
            )
    elif dice.chance(0.6):
        _awning(mesh, dice, frame, slot + 4, half, base)


def _gable(mesh: Mesh, dice: Dice, frame: Frame, slot: int, half: float, depth: float, height: float, rise: float) -> None:
    """Add a pitched roof: ridge along the street, or across it with the gable to the front."""
    at, over, tex = frame.at, 0.35, TEX["roof"]
    if dice.chance(0.6) or half > 7:
        middle = depth / 2
        mesh.poly(
            [
                at(-half - over, height - 0.1, -over),
                at(half + over, height - 0.1, -over),
                at(half + over, height + rise, middle),
                at(-half - over, height + rise, middle),
            ],
            slot + 3,
            BUILDING,
            tex=tex,
            period=(2.5, 2.5),
            layer=1,
            flags=SNOWY,
        )
        for sign in (-1.0, 1.0):
            a = half * sign
            mesh.poly(
                [
                    at(a, height, depth if sign < 0 else 0.0),
                    at(a, height, 0.0 if sign < 0 else depth),
                    at(a, height + rise, middle),
                ],
                slot,
                BUILDING,
            )
        for _ in range(dice.index(3)):
            a = dice.between(-half + 1.2, half - 1.2)
            y, z = height + rise * 0.25, middle * 0.25
            mesh.poly(
                [
                    at(a - 0.7, y, z - 0.3),
                    at(a + 0.7, y, z - 0.3),
                    at(a + 0.7, y + 1.2, z - 0.3),
                    at(a - 0.7, y + 1.2, z - 0.3),
                ],
                slot,
                BUILDING,
                tex=TEX["wide"],
                slot2=slot + 1,
                layer=2,
            )
    else:
        mesh.poly([at(-half, height, 0.0), at(half, height, 0.0), at(0.0, height + rise, 0.0)], slot, BUILDING, layer=1)
        for sign in (-1.0, 1.0):
            a, b = (half + over) * sign, 0.0
            low, high = (
                (at(a, height - 0.15, depth), at(a, height - 0.15, -over)),
                (at(b, height + rise, -over), at(b, height + rise, depth)),
            )
            points = [*low, *high] if sign < 0 else [low[1], low[0], high[1], high[0]]
            mesh.poly(points, slot + 3, BUILDING, tex=tex, period=(2.5, 2.5), layer=0, flags=SNOWY)
    if dice.chance(0.6):
        a = dice.between(-half * 0.7, half * 0.7)
        mesh.capsule(
            at(a, height + rise * 0.4, depth * 0.45),
            at(a, height + rise + 0.9, depth * 0.45),
            0.4,
            slot + 2,
            BUILDING,
            layer=2,
            flags=BLUNT,
            tex=TEX["brick"],
        )


def _awning(mesh: Mesh, dice: Dice, frame: Frame, slot: int, half: float, base: float) -> None:
    at, a, reach = frame.at, half * dice.between(0.4, 0.95), dice.between(0.9, 1.6)
    y = base * 0.78
    mesh.poly(
        [at(-a, y - 0.45, -reach), at(a, y - 0.45, -reach), at(a, y, -0.05), at(-a, y, -0.05)],
        slot,
        BUILDING,
        tex=TEX["planks"],
        period=(2.0, 0.0),
        layer=3,
        flags=SNOWY | TWO_SIDED,
    )
    mesh.poly(
        [at(-a, y - 0.7, -reach), at(a, y - 0.7, -reach), at(a, y - 0.45, -reach), at(-a, y - 0.45, -reach)],
        slot,
        BUILDING,
        layer=3,
    )


def wall(scene: Scene, dice: Dice, style: Style, x0: float, z0: float, x1: float, z1: float, height: float) -> None:
    """Add a free-standing wall from (x0, z0) to (x1, z1), seen from the left of that direction or from both sides."""
    mesh = scene.start()
    colour = tone(dice, dice.pick(style.walls), 0.25)
    slot = scene.colour(colour, tone(dice, (0.35, 0.33, 0.3)), tone(dice, dice.pick(style.walls)))
    tex = TEX[dice.pick(style.free_walls)]
    period = dice.between(1.4, 2.6)
    mesh.poly(
        [(x0, 0.0, z0), (x1, 0.0, z1), (x1, height, z1), (x0, height, z0)],
        slot,
        WALL,
        tex=tex,
        slot2=slot + 1,
        period=(period, period),
        flags=TWO_SIDED,
    )
    mesh.poly(
        [(x0, height - 0.04, z0), (x1, height - 0.04, z1), (x1, height + 0.12, z1), (x0, height + 0.12, z0)],
        slot + 2,
        WALL,
        flags=TWO_SIDED,
        layer=1,
    )
    if dice.chance(0.3):
        t = dice.between(0.1, 0.6)
        a, b = t, t + dice.between(0.1, 0.3)
        mesh.poly(
            [
                (x0 + (x1 - x0) * a, height * 0.25, z0 + (z1 - z0) * a),
                (x0 + (x1 - x0) * b, height * 0.25, z0 + (z1 - z0) * b),
                (x0 + (x1 - x0) * b, height * 0.85, z0 + (z1 - z0) * b),
                (x0 + (x1 - x0) * a, height * 0.85, z0 + (z1 - z0) * a),
            ],
            scene.colour(tone(dice, dice.pick(style.accents))),
            WALL,
            slot2=scene.colour(colour),
            tex=TEX["poster"],
            layer=2,
            flags=TWO_SIDED,
        )


def fence(scene: Scene, dice: Dice, style: Style, x0: float, z0: float, x1: float, z1: float, height: float) -> None:
    """Add a fence from (x0, z0) to (x1, z1): boards, pickets, rails, bars or mesh; see-through but labelled as a whole."""
    mesh = scene.start()
    tex = dice.pick(style.fences)
    colour = tone(dice, dice.pick(style.fence_paint))
    slot = scene.colour(colour)
    span = math.sqrt((x1 - x0) * (x1 - x0) + (z1 - z0) * (z1 - z0))
    flags = TWO_SIDED | (0 if tex == "planks" else SEE_THROUGH)
    period = {"mesh": 1.0, "rails": 2.2, "bars": 1.0, "pickets": 0.6}.get(tex, 1.3)
    mesh.poly(
        [(x0, 0.04, z0), (x1, 0.04, z1), (x1, height, z1), (x0, height, z0)],
        slot,
        FENCE,
        tex=TEX[tex],
        detail=TEX["plaster"],
        period=(period, 1.0 if tex == "mesh" else 0.0),
        flags=flags,
    )
    posts = max(2, int(span / dice.between(2.2, 3.2)))
    for k in range(posts + 1):
        a = k / posts
        x, z = x0 + (x1 - x0) * a, z0 + (z1 - z0) * a
        mesh.capsule((x, 0.0, z), (x, height + 0.08, z), 0.045, slot, FENCE, layer=1, flags=BLUNT, tex=TEX["round"])
