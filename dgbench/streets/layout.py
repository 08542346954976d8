"""The street plan: one seeded street with its ground, blocks, traffic and people, placed into a `Scene`.

The street runs along +z and bends by an offset in x that grows with the square of z. The camera drives at z = 0.
"""

from __future__ import annotations

from dgbench.streets.atlas import TEX
from dgbench.streets.blocks import block, skyline
from dgbench.streets.buildings import tone
from dgbench.streets.dice import Dice
from dgbench.streets.furniture import bollards, lamp, pole, sign, signals, tree
from dgbench.streets.mesh import GROUND, SNOWY, WORLD_UV, Scene
from dgbench.streets.plan import Plan
from dgbench.streets.style import Style
from dgbench.streets.traffic import fill_street, people

ROAD, SIDEWALK, TERRAIN, SKY = 0, 1, 9, 10
FAR = 150.0
LAID = WORLD_UV | GROUND


def _plan(dice: Dice, style: Style) -> Plan:
    lanes, lane_width = dice.weighted(style.lanes), dice.between(*style.lane_width)
    parking = {-1.0: dice.chance(0.42), 1.0: dice.chance(0.42)}
    crossings: list[tuple[float, float]] = []
    z = dice.between(14.0, 45.0)
    while z < 115.0 and len(crossings) < 3:
        if dice.chance(0.75):
            crossings.append((z, dice.between(6.5, 12.0)))
        z += dice.between(35.0, 70.0)
    return Plan(
        bend=dice.between(*style.bend) if dice.chance(0.6) else 0.0,
        hand=-1.0 if dice.chance(style.left_hand) else 1.0,
        lanes=lanes,
        lane_width=lane_width,
        half=lanes * lane_width + (2.1 if parking[-1.0] or parking[1.0] else 0.4),
        parking=parking,
        verge={side: dice.between(1.0, 2.6) if dice.chance(style.verge) else 0.0 for side in (-1.0, 1.0)},
        sidewalk={side: dice.between(*style.sidewalk) for side in (-1.0, 1.0)},
        crossings=crossings,
        tram=dice.chance(0.33),
    )


class Ground:
    """Painted strips; later layers cover earlier ones."""

    def __init__(self, scene: Scene, plan: Plan) -> None:
        self.scene, self.plan, self.mesh = scene, plan, scene.static
        self.layer = 0

    def strip(
        self,
        x0: float,
        x1: float,
        z0: float,
        z1: float,
        slot: int,
        kind: int,
        *,
        y: float = 0.0,
        tex: str = "flat",
        slot2: int | None = None,
        period: float = 4.0,
        flags: int = LAID | SNOWY,
    ) -> None:
        """Add a rectangle of ground between x0 < x1 that follows the bend from z0 to z1."""
        self.layer += 1
        steps = 1 if self.plan.bend == 0.0 else max(1, int((z1 - max(z0, 0.0)) / 14.0))
        for k in range(steps):
            a, b = z0 + (z1 - z0) * k / steps, z0 + (z1 - z0) * (k + 1) / steps
            sa, sb = self.plan.shift(a), self.plan.shift(b)
            self.mesh.poly(
                [(x0 + sa, y, a), (x1 + sa, y, a), (x1 + sb, y, b), (x0 + sb, y, b)],
                slot,
                kind,
                tex=TEX[tex],
                slot2=slot2,
                period=(period, period),
                grain=period,
                layer=self.layer,
                flags=flags,
            )

    def kerb(self, side: float, z0: float, z1: float, slot: int) -> None:
        self.layer += 1
        steps = 1 if self.plan.bend == 0.0 else max(1, int((z1 - max(z0, 0.0)) / 14.0))
        for k in range(steps):
            a, b = z0 + (z1 - z0) * k / steps, z0 + (z1 - z0) * (k + 1) / steps
            pa, pb = side * self.plan.half + self.plan.shift(a), side * self.plan.half + self.plan.shift(b)
            points = [(pa, 0.0, a), (pb, 0.0, b), (pb, 0.13, b), (pa, 0.13, a)]
            self.mesh.poly(
                points if side > 0 else [points[1], points[0], points[3], points[2]],
                slot,
                SIDEWALK,
                layer=self.layer,
                flags=GROUND,
            )


def _segments(plan: Plan, start: float = -6.0, end: float = FAR) -> list[tuple[float, float]]:
    """Return the stretches of z between side streets."""
    pieces, z = [], start
    for near, width in plan.crossings:
        pieces.append((z, near))
        z = near + width
    pieces.append((z, end))
    return pieces


def _ground(scene: Scene, dice: Dice, style: Style, plan: Plan) -> None:
    ground = Ground(scene, plan)
    earth = scene.colour(tone(dice, dice.pick(style.terrain)), tone(dice, dice.pick(style.terrain)))
    surface = "gravel" if dice.chance(0.25) else "grass"
    road_colour = tone(dice, dice.pick(style.road))
    road = scene.colour(
        road_colour,
        (road_colour[0] * 0.8, road_colour[1] * 0.8, road_colour[2] * 0.82),
        tone(dice, dice.pick(style.road)),
    )
    pavement = scene.colour(tone(dice, dice.pick(style.paving)), tone(dice, (0.2, 0.2, 0.19)), tone(dice, (0.45, 0.44, 0.42)))
    paint = scene.colour(tone(dice, dice.pick(style.markings), 0.1), tone(dice, dice.pick(style.centre_line), 0.1))
    road_tex = "setts" if dice.chance(0.07) else "asphalt"
    paving_tex, paving_period = dice.pick(style.paving_textures), dice.between(1.6, 3.0)
    ground.mesh.poly(
        [(-400.0, 0.0, -8.0), (400.0, 0.0, -8.0), (400.0, 0.0, 700.0), (-400.0, 0.0, 700.0)],
        earth,
        TERRAIN,
        tex=TEX[surface],
        slot2=earth + 1,
        period=(6.0, 6.0),
        flags=LAID | SNOWY,
    )
    for near, width in plan.crossings:
        ground.strip(
            -90.0,
            90.0,
            near - 3.0,
            near + width + 3.0,
            pavement,
            SIDEWALK,
            tex=paving_tex,
            slot2=pavement + 1,
            period=paving_period,
        )
    for side in (-1.0, 1.0):
        outer, inner = plan.edge(side), side * (plan.half + plan.verge[side])
        for a, b in _segments(plan):
            ground.strip(
                min(outer, inner),
                max(outer, inner),
                a,
                b,
                pavement,
                SIDEWALK,
                tex=paving_tex,
                slot2=pavement + 1,
                period=paving_period,
            )
            if plan.verge[side]:
                ground.strip(
                    min(inner, side * plan.half),
                    max(inner, side * plan.half),
                    a,
                    b,
                    earth,
                    TERRAIN,
                    tex=surface,
                    slot2=earth + 1,
                    period=5.0,
                )
    for near, width in plan.crossings:
        ground.strip(-90.0, 90.0, near, near + width, road, ROAD, tex="asphalt", slot2=road + 1, period=5.0)
    ground.strip(
        -plan.half,
        plan.half,
        -6.0,
        FAR + 60.0,
        road,
        ROAD,
        tex=road_tex,
        slot2=road + 1,
        period=5.0 if road_tex == "asphalt" else 1.6,
    )
    for side in (-1.0, 1.0):
        for a, b in _segments(plan):
            ground.kerb(side, a, b, pavement + 2)
            ground.strip(
                min(side * plan.half, side * (plan.half + 0.18)),
                max(side * plan.half, side * (plan.half + 0.18)),
                a,
                b,
                pavement + 2,
                SIDEWALK,
            )
    _markings(ground, dice, plan, road, paint)


def _markings(ground: Ground, dice: Dice, plan: Plan, road: int, paint: int) -> None:
    plain = WORLD_UV | GROUND
    if dice.chance(0.4):
        for _ in range(1 + dice.index(3)):
            x, z = dice.between(-plan.half, plan.half - 2.0), dice.between(3.0, 40.0)
            ground.strip(
                x,
                x + dice.between(0.8, 2.5),
                z,
                z + dice.between(2.0, 14.0),
                road + 2,
                ROAD,
                tex="asphalt",
                slot2=road,
                period=4.0,
            )
    if plan.tram:
        for side in (-1.0, 1.0):
            for rail in (0.0, 1.435):
                x = side * (plan.lane_width * 0.5) + rail - 0.72
                ground.strip(x - 0.16, x + 0.16, -6.0, 110.0, road + 2, ROAD, tex="concrete", flags=plain)
                ground.strip(x - 0.04, x + 0.04, -6.0, 110.0, ground.scene.colour((0.1, 0.095, 0.09)), ROAD, flags=plain)
    dash, gap, worn = dice.between(2.5, 4.0), dice.between(3.0, 7.0), "asphalt"
    phase = dice.between(-4.0, 2.0)
    solid, marked = dice.chance(0.35), dice.chance(0.8)
    for a, b in _segments(plan, end=110.0):
        if not marked:
            break
        for lane in range(-plan.lanes + 1, plan.lanes):
            x = lane * plan.lane_width
            if lane == 0 and solid:
                for offset in (-0.14, 0.14):
                    ground.strip(x + offset - 0.06, x + offset + 0.06, a, b - 2.0, paint + 1, ROAD, tex=worn, flags=plain)
                continue
            z = a + phase + 6.0
            while z < min(b - 3.0, 75.0):
                ground.strip(x - 0.07, x + 0.07, z, z + dash, paint + (1 if lane == 0 else 0), ROAD, tex=worn, flags=plain)
                z += dash + gap
        for side in (-1.0, 1.0):
            if plan.parking[side]:
                x = side * plan.lanes * plan.lane_width
                ground.strip(x - 0.06, x + 0.06, a, b - 4.0, paint, ROAD, tex=worn, flags=plain)
    for near, width in plan.crossings:
        if dice.chance(0.65):
            for z in (near - 3.4, near + width + 0.4) if dice.chance(0.6) else (near - 3.4,):
                ground.mesh.poly(
                    [
                        (-plan.half + plan.shift(z), 0.0, z),
                        (plan.half + plan.shift(z), 0.0, z),
                        (plan.half + plan.shift(z), 0.0, z + 3.0),
                        (-plan.half + plan.shift(z), 0.0, z + 3.0),
                    ],
                    road,
                    ROAD,
                    tex=TEX["crossing"],
                    slot2=paint,
                    period=(1.1, 0.0),
                    layer=ground.layer + 1,
                    flags=GROUND,
                )
            x = plan.hand * plan.half
            ground.strip(min(0.0, x), max(0.0, x), near - 4.6, near - 4.2, paint, ROAD, tex=worn, flags=plain)


def _roadside(scene: Scene, dice: Dice, style: Style, plan: Plan) -> None:
    """Add lamps, trees, signs and lights along both kerbs."""
    kind, spacing = dice.index(3), dice.between(20.0, 34.0)
    trees = {side: dice.chance(style.street_trees) for side in (-1.0, 1.0)}
    growth, tree_gap = dice.between(5.0, 12.0), dice.between(6.0, 12.0)
    wires = dice.chance(0.35)
    for side in (-1.0, 1.0):
        kerb = side * (plan.half + 0.55)
        z = dice.between(4.0, 18.0)
        while z < 100.0:
            x = kerb + plan.shift(z)
            if not _crossed(plan, z):
                lamp(
                    scene,
                    dice,
                    x,
                    z,
                    -side * dice.between(1.2, 2.4),
                    dice.between(5.5, 8.5) if kind != 1 else 4.2,
                    kind,
                )
                if wires and side > 0:
                    pole(scene, dice, x + 0.6, z + spacing * 0.4, 8.5, 0.13, crossarm=True)
            z += spacing
        z = dice.between(5.0, 14.0)
        while trees[side] and z < 95.0:
            x = side * (plan.half + max(1.1, plan.verge[side] * 0.5)) + plan.shift(z)
            if not _crossed(plan, z, 4.0) and dice.chance(0.85):
                tree(scene, dice, style, x, z, growth * dice.between(0.8, 1.2))
            z += tree_gap * dice.between(0.8, 1.3)
        z = dice.between(7.0, 16.0)
        while z < 75.0:
            if not _crossed(plan, z):
                sign(
                    scene,
                    dice,
                    style,
                    side * (plan.half + dice.between(0.35, 0.9)) + plan.shift(z),
                    z,
                    large=dice.chance(0.15) and z > 18.0,
                )
            z += dice.between(9.0, 30.0)
        if dice.chance(0.2):
            bollards(scene, dice, side * (plan.half + 0.4), dice.between(6.0, 30.0), 3 + dice.index(5))
    for near, width in plan.crossings:
        if near < 80.0 and dice.chance(0.8):
            for side in (-1.0, 1.0):
                ours = side == plan.hand
                x, z = side * (plan.half + 0.5), near - 1.2
                signals(
                    scene,
                    dice,
                    x + plan.shift(z),
                    z,
                    -side * dice.between(2.5, 4.5) if ours and dice.chance(0.5) else 0.0,
                    1.0 if ours else -1.0,
                )
                z = near + width + 1.2
                signals(scene, dice, x + plan.shift(z), z, 0.0, 1.0 if dice.chance(0.7) else -1.0)


def _crossed(plan: Plan, z: float, margin: float = 1.5) -> bool:
    return any(near - margin < z < near + width + margin for near, width in plan.crossings)


def street(scene: Scene, dice: Dice, style: Style) -> Plan:
    """Fill a scene with one street and return its plan; the sky is not part of it."""
    plan = _plan(dice, style)
    _ground(scene, dice, style, plan)
    for side in (-1.0, 1.0):
        for a, b in _segments(plan, end=118.0):
            z = a
            while z < b - 6.0:
                length = min(dice.between(22.0, 55.0), b - z)
                if b - z - length < 9.0:
                    length = b - z
                edge = plan.edge(side)
                block(scene, dice, style, side, edge, z, z + length, (plan.shift(z), plan.shift(z + length)))
                z += length
    skyline(scene, dice, style, plan.shift(125.0), abs(plan.edge(1.0)), closed=dice.chance(0.3))
    _roadside(scene, dice, style, plan)
    fill_street(scene, dice, style, plan)
    people(scene, dice, style, plan)
    return plan
