"""Vehicles on the carriageway and at the kerb, two-wheelers, and people on foot."""

from __future__ import annotations

from collections.abc import Sequence

from dgbench.streets.buildings import tone
from dgbench.streets.dice import Dice
from dgbench.streets.fleet import FLEETS
from dgbench.streets.mesh import Colour, Light, Scene
from dgbench.streets.people import machines, ridden, walkers
from dgbench.streets.plan import Plan
from dgbench.streets.style import Style

SKIN: tuple[Colour, ...] = (
    (0.62, 0.42, 0.32),
    (0.5, 0.32, 0.22),
    (0.3, 0.18, 0.11),
    (0.14, 0.08, 0.05),
    (0.68, 0.5, 0.4),
)
HAIR: tuple[Colour, ...] = (
    (0.03, 0.025, 0.02),
    (0.1, 0.06, 0.03),
    (0.3, 0.2, 0.1),
    (0.35, 0.34, 0.33),
    (0.2, 0.08, 0.03),
)


def _livery(dice: Dice, style: Style) -> list[Colour]:
    """Return a vehicle's palette: body, second colour, glass, tyre, metal, head and tail lights, plate."""
    glass = dice.pick(((0.05, 0.06, 0.07), (0.1, 0.12, 0.14), (0.18, 0.21, 0.24), (0.03, 0.03, 0.03)))
    return [
        tone(dice, dice.pick(style.cars)),
        tone(dice, dice.pick(style.cars + style.accents)),
        glass,
        (0.03, 0.03, 0.032),
        (0.38, 0.38, 0.39),
        (0.8, 0.8, 0.76),
        (0.45, 0.03, 0.03),
        dice.pick(((0.75, 0.75, 0.73), (0.75, 0.6, 0.1))),
    ]


def _lit(scene: Scene, x: float, z: float, heading: float, half: float, length: float, height: float) -> None:
    """Add head or tail lights of a moving vehicle, whichever the camera sees."""
    away = -90.0 < heading < 90.0
    for side in (-1.0, 1.0):
        scene.lights.append(
            Light(
                (x + side * (half - 0.22), height, z - length),
                (1.0, 0.12, 0.06) if away else (1.0, 0.95, 0.8),
                0.45 if away else 1.0,
                False,
            )
        )


def car(scene: Scene, dice: Dice, style: Style, x: float, z: float, heading: float, *, lit: bool) -> float:
    """Place a car and return half its length."""
    template, half, length, height = dice.pick(FLEETS[style.fleet].cars())
    scale = dice.between(0.95, 1.06)
    scene.place(template, x, z, _livery(dice, style), heading=heading, scale=(scale, scale, scale))
    scene.shadow(x, z, half * scale, length * scale, height, heading=heading)
    if lit:
        _lit(scene, x, z, heading, half, length, 0.75)
    return length * scale


def truck(scene: Scene, dice: Dice, style: Style, x: float, z: float, heading: float, *, lit: bool) -> float:
    parts, half, length, height = dice.pick(FLEETS[style.fleet].trucks())
    colours = _livery(dice, style)
    for part in parts:
        scene.place(part, x, z, colours, heading=heading)
    scene.shadow(x, z, half, length, height, heading=heading)
    if lit:
        _lit(scene, x, z, heading, half, length, 0.8)
    return length


def bus(scene: Scene, dice: Dice, style: Style, x: float, z: float, heading: float, *, lit: bool) -> float:
    template, half, length, height = dice.pick(FLEETS[style.fleet].buses())
    scene.place(template, x, z, _livery(dice, style), heading=heading)
    scene.shadow(x, z, half, length, height, heading=heading)
    if lit:
        _lit(scene, x, z, heading, half, length, 0.9)
    return length


def tram(scene: Scene, dice: Dice, style: Style, x: float, z: float, heading: float, sections: int) -> float:
    """Add a tram whose nearest section starts at z, and return half its length."""
    template, colours = dice.pick(FLEETS[style.fleet].tram_sections()), _livery(dice, style)
    for k in range(sections):
        scene.place(template, x, z + 4.5 + 9.3 * k, colours, heading=heading)
    half = 4.65 * sections
    scene.shadow(x, z + half, 1.22, half, 3.4)
    _lit(scene, x, z + half, heading, 1.22, half, 0.75)
    return half


def _person_colours(dice: Dice, style: Style) -> list[Colour]:
    return [
        tone(dice, dice.pick(SKIN)),
        tone(dice, dice.pick(HAIR)),
        tone(dice, dice.pick(style.clothes), 0.3),
        tone(dice, dice.pick(style.clothes), 0.3),
        dice.pick(((0.03, 0.03, 0.03), (0.6, 0.6, 0.58), (0.2, 0.12, 0.07))),
        tone(dice, dice.pick(style.clothes), 0.3),
    ]


def two_wheeler(scene: Scene, dice: Dice, style: Style, kind: str, x: float, z: float, heading: float, *, rider: bool) -> None:
    """Add a bicycle, motorcycle or scooter, with its rider or parked."""
    paint = [
        tone(dice, dice.pick(style.cars + style.accents)),
        (0.03, 0.03, 0.03),
        (0.3, 0.3, 0.31),
        (0.85, 0.85, 0.8),
        (0.5, 0.03, 0.03),
    ]
    if rider:
        body = _person_colours(dice, style)
        if kind != "bicycle" or dice.chance(0.5):
            body[1] = tone(dice, dice.pick(style.cars))
        scene.place(dice.pick(ridden()[kind]), x, z, paint + body, heading=heading)
        scene.lights.append(Light((x, 0.8, z - 0.8), (1.0, 0.15, 0.08) if -90 < heading < 90 else (1.0, 0.95, 0.8), 0.35, False))
    else:
        scene.place(machines()[kind], x, z, paint, heading=heading)
    scene.shadow(x, z, 0.25, 0.85, 1.0, heading=heading)


def walker(
    scene: Scene, dice: Dice, style: Style, x: float, z: float, heading: float, *, y: float = 0.0, child: bool = False
) -> None:
    scale = dice.between(0.6, 0.75) if child else dice.between(0.93, 1.08)
    wide = scale * dice.between(0.92, 1.12)
    scene.place(dice.pick(walkers()), x, z, _person_colours(dice, style), y=y, heading=heading, scale=(wide, scale, wide))
    scene.shadow(x, z, 0.22, 0.22, 1.7 * scale)


def _clear(taken: Sequence[tuple[float, float]], z: float, half: float) -> bool:
    return all(z + half < a or z - half > b for a, b in taken)


def fill_street(scene: Scene, dice: Dice, style: Style, plan: Plan) -> None:
    """Drive and park vehicles. Every lane keeps a list of what is taken; the camera's own starts free."""
    density, parked = dice.between(*style.traffic), dice.between(*style.parked)
    ride = {"car": 0.77, "truck": 0.035, "bus": 0.03, "motorcycle": 0.05, "scooter": 0.035, "bicycle": 0.08}
    lanes: dict[tuple[float, int], list[tuple[float, float]]] = {
        (side, lane): [] for side in (-1.0, 1.0) for lane in range(plan.lanes)
    }
    own = (plan.hand, plan.lanes - 1 if dice.chance(0.5) else 0)
    lanes[own].append((-20.0, dice.between(6.0, 14.0)))

    def centre(side: float, lane: int, z: float) -> float:
        return side * (lane + 0.5) * plan.lane_width + plan.shift(z)

    def drive(kind: str, side: float, lane: int, z: float) -> float | None:
        """Put a vehicle with its rear at z and return where its lane is free again; None if there is no space."""
        heading = dice.between(-1.5, 1.5) + (0.0 if side == plan.hand else 180.0)
        reach = {"car": 2.3, "truck": 5.3, "bus": 5.8, "tram": 14.0}.get(kind, 1.0)
        if not _clear(lanes[side, lane], z + reach, reach + 1.0):
            return None
        aside = dice.between(-0.25, 0.25)
        x = centre(side, lane, z + reach) + aside
        if kind == "tram":
            reach = tram(
                scene,
                dice,
                style,
                centre(side, lane, z + reach),
                z,
                0.0 if side == plan.hand else 180.0,
                2 + dice.index(2),
            )
        elif kind in ("motorcycle", "scooter", "bicycle"):
            edge = side * plan.lane_width * dice.between(0.0, 0.3)
            two_wheeler(scene, dice, style, kind, x + edge, z + reach, heading, rider=True)
        else:
            place = {"car": car, "truck": truck, "bus": bus}[kind]
            place(scene, dice, style, x, z + reach, heading, lit=True)
        lanes[side, lane].append((z - 1.0, z + 2 * reach + 1.0))
        return z + 2 * reach

    outer = plan.lanes - 1
    # rare classes are drawn on their own, near enough to be seen, or a hundred images could miss one
    for kind, chance, lane in (
        ("tram", 0.75 if plan.tram else 0.0, 0),
        ("bus", 0.17, outer),
        ("truck", 0.11, outer),
        ("motorcycle", 0.24, outer),
        ("scooter", 0.16, outer),
        ("bicycle", 0.32, outer),
    ):
        if dice.chance(chance):
            side = dice.pick((-1.0, 1.0))
            reach = (9.0, 30.0) if kind not in ("tram", "bus", "truck") else (10.0, 42.0)
            for _ in range(3):
                if drive(kind, side, lane, dice.between(*reach)) is not None:
                    break
                side = -side
    for side, lane in lanes:
        z = dice.between(5.0, 30.0)
        while z < 110.0:
            free = drive(dice.weighted(ride), side, lane, z)
            z = (z + 4.0 if free is None else free) + dice.between(3.0, 40.0) / density
    _parking(scene, dice, style, plan, parked)
    for near, width in plan.crossings:
        if dice.chance(0.4 * density + 0.1):
            side = dice.pick((-1.0, 1.0))
            x, z = (
                side * (plan.half + dice.between(3.0, 14.0)) + plan.shift(near),
                near + width * dice.pick((0.28, 0.72)),
            )
            (truck if dice.chance(0.12) else bus if dice.chance(0.1) else car)(
                scene, dice, style, x, z, dice.pick((90.0, -90.0)), lit=False
            )


def _parking(scene: Scene, dice: Dice, style: Style, plan: Plan, parked: float) -> None:
    for side in (-1.0, 1.0):
        z = dice.between(1.0, 8.0)
        x = side * (plan.half - 1.05)
        while plan.parking[side] and z < 95.0:
            if any(near - 6.0 < z + 2.2 < near + width + 5.0 for near, width in plan.crossings):
                z += 4.0
                continue
            if dice.chance(parked):
                kind = dice.weighted({"car": 0.925, "truck": 0.015, "motorcycle": 0.06})
                at = x + plan.shift(z + 2.3) + dice.between(-0.12, 0.12)
                heading = dice.between(-1.5, 1.5) + (0.0 if side == plan.hand or dice.chance(0.2) else 180.0)
                if kind == "motorcycle":
                    two_wheeler(
                        scene,
                        dice,
                        style,
                        dice.pick(("motorcycle", "scooter")),
                        at,
                        z + 1.2,
                        dice.between(40.0, 140.0),
                        rider=False,
                    )
                    z += 2.0
                elif kind == "truck":
                    z += 2 * truck(scene, dice, style, at, z + 5.2, heading, lit=False)
                else:
                    z += 2 * car(scene, dice, style, at, z + 2.3, heading, lit=False)
            else:
                z += 5.0
            z += dice.between(0.5, 1.4)
        if dice.chance(0.45):
            z = dice.between(6.0, 26.0)
            for _ in range(1 + dice.index(4)):
                two_wheeler(
                    scene,
                    dice,
                    style,
                    dice.weighted({"bicycle": 0.7, "motorcycle": 0.16, "scooter": 0.14}),
                    side * (plan.half + dice.between(0.6, 1.3)) + plan.shift(z),
                    z,
                    dice.pick((90.0, 75.0, -80.0, 0.0, 180.0)) + dice.between(-12, 12),
                    rider=False,
                )
                z += dice.between(0.6, 1.4)


def people(scene: Scene, dice: Dice, style: Style, plan: Plan) -> None:
    """Add walkers on both sidewalks, alone or in groups, and some who cross the road."""
    crowd = dice.between(*style.crowd)
    for side in (-1.0, 1.0):
        for _ in range(int(crowd * 9.0 + dice.draw())):
            z = 4.5 + 55.0 * dice.draw() * dice.between(0.35, 1.0)
            for member in range(dice.weighted({1: 0.65, 2: 0.25, 3: 0.1})):
                x = side * (plan.half + plan.verge[side] + dice.between(0.3, max(plan.sidewalk[side] - 0.4, 0.5)))
                walker(
                    scene,
                    dice,
                    style,
                    x + plan.shift(z),
                    z + 0.5 * member,
                    dice.pick((0.0, 180.0)) + dice.between(-25.0, 25.0),
                    y=0.1,
                    child=dice.chance(0.1),
                )
    if dice.chance(0.3 * crowd + 0.1):
        z = dice.between(12.0, 34.0) if not plan.crossings or dice.chance(0.3) else plan.crossings[0][0] - 2.0
        for _ in range(1 + dice.index(4)):
            walker(
                scene,
                dice,
                style,
                dice.between(-plan.half, plan.half) + plan.shift(z),
                z + dice.between(-1.2, 1.2),
                dice.pick((90.0, -90.0)) + dice.between(-15.0, 15.0),
            )
