"""Objects beyond the sidewalk: rows of houses, gardens, parks, walls, towers, and the far skyline."""

from __future__ import annotations

from dgbench.streets.atlas import TEX
from dgbench.streets.buildings import building, fence, tone, wall
from dgbench.streets.dice import Dice
from dgbench.streets.furniture import bush, hedge, tree
from dgbench.streets.mesh import Scene
from dgbench.streets.style import Style

BUILDING, VEGETATION, TERRAIN = 2, 8, 9


def block(
    scene: Scene, dice: Dice, style: Style, side: float, edge: float, z0: float, z1: float, bend: tuple[float, float]
) -> None:
    """Add one stretch of frontage on `side` (-1 left, +1 right) beyond x = `edge`; `bend` is the shift at z0 and z1."""
    kind = dice.weighted(style.frontage)
    {"row": _row, "houses": _houses, "park": _park, "wall": _walled, "tower": _towers}[kind](
        scene, dice, style, side, edge, z0, z1, bend
    )


def _at(bend: tuple[float, float], z0: float, z1: float, z: float) -> float:
    return bend[0] + (bend[1] - bend[0]) * (z - z0) / (z1 - z0)


def _front(
    scene: Scene,
    dice: Dice,
    style: Style,
    side: float,
    x: float,
    z0: float,
    z1: float,
    *,
    depth: float,
    height: float,
    shop: bool,
) -> None:
    """Add a building whose front faces the street from x, spanning z0 to z1."""
    building(scene, dice, style, x, (z0 + z1) / 2, 90.0 * side, width=z1 - z0, depth=depth, height=height, shop=shop)
    middle = x + side * depth / 2
    scene.shadow(middle, (z0 + z1) / 2, depth / 2, (z1 - z0) / 2, height)


def _row(
    scene: Scene, dice: Dice, style: Style, side: float, edge: float, z0: float, z1: float, bend: tuple[float, float]
) -> None:
    shops = dice.draw()
    storeys = dice.between(*style.storeys)
    z = z0
    while z < z1 - 4.0:
        width = min(dice.between(7.0, 18.0), z1 - z)
        if z1 - z - width < 5.0:
            width = z1 - z
        height = max(1.0, storeys + dice.between(-1.2, 1.6)) * 3.2
        if z + width > 1.0:
            _front(
                scene,
                dice,
                style,
                side,
                edge + side * dice.between(0.0, 0.4) + _at(bend, z0, z1, z + width / 2),
                z,
                z + width,
                depth=dice.between(9.0, 14.0),
                height=height,
                shop=dice.chance(shops),
            )
        z += width


def _boundary(scene: Scene, dice: Dice, style: Style, x: float, z0: float, z1: float, bend: tuple[float, float]) -> None:
    """Add a fence, wall or hedge along the frontage, or nothing."""
    kind = dice.weighted({"fence": 0.5, "wall": 0.22, "hedge": 0.16, "": 0.12})
    steps = 1 if bend[0] == bend[1] else 2
    for k in range(steps):
        a, b = z0 + (z1 - z0) * k / steps, z0 + (z1 - z0) * (k + 1) / steps
        xa, xb = x + _at(bend, z0, z1, a), x + _at(bend, z0, z1, b)
        if b < 1.0:
            continue
        if kind == "fence":
            fence(scene, dice, style, xa, a, xb, b, dice.between(1.0, 2.0))
        elif kind == "wall":
            wall(scene, dice, style, xa, a, xb, b, dice.between(0.7, 2.0))
        elif kind == "hedge":
            hedge(scene, dice, style, xa + 0.4, a, xb + 0.4, b, dice.between(0.8, 1.7))


def _garden(
    scene: Scene, dice: Dice, style: Style, x0: float, x1: float, z0: float, z1: float, trees: float, bushes: float
) -> None:
    """Scatter plants over a plot, about `trees` and `bushes` of each."""
    for _ in range(int(trees + dice.draw())):
        tree(
            scene,
            dice,
            style,
            dice.between(min(x0, x1), max(x0, x1)),
            dice.between(max(z0, 3.0), max(z1, 4.0)),
            dice.between(4.0, 11.0),
        )
    for _ in range(int(bushes + dice.draw())):
        bush(
            scene,
            dice,
            style,
            dice.between(min(x0, x1), max(x0, x1)),
            dice.between(max(z0, 3.0), max(z1, 4.0)),
            dice.between(0.6, 1.9),
        )


def _houses(
    scene: Scene, dice: Dice, style: Style, side: float, edge: float, z0: float, z1: float, bend: tuple[float, float]
) -> None:
    setback = dice.between(3.0, 8.0)
    _boundary(scene, dice, style, edge + side * 0.2, z0, z1, bend)
    z = z0 + dice.between(0.0, 3.0)
    while z < z1 - 7.0:
        width = min(dice.between(8.0, 13.0), z1 - z)
        shift = _at(bend, z0, z1, z + width / 2)
        if z + width > 0.0:
            _front(
                scene,
                dice,
                style,
                side,
                edge + side * setback + shift,
                z,
                z + width,
                depth=dice.between(8.0, 11.0),
                height=dice.between(1.0, 2.6) * 3.0,
                shop=False,
            )
            _garden(
                scene,
                dice,
                style,
                edge + side * 1.5 + shift,
                edge + side * (setback - 0.8) + shift,
                z,
                z + width,
                0.6,
                1.4,
            )
        z += width + dice.between(2.0, 8.0)
    _garden(scene, dice, style, edge + side * (setback + 12.0), edge + side * (setback + 20.0), z0, z1, 2.0, 0.0)


def _park(
    scene: Scene, dice: Dice, style: Style, side: float, edge: float, z0: float, z1: float, bend: tuple[float, float]
) -> None:
    if dice.chance(0.75):
        _boundary(scene, dice, style, edge + side * 0.2, z0, z1, bend)
    middle = (bend[0] + bend[1]) / 2
    size = (z1 - z0) / 10.0
    _garden(scene, dice, style, edge + side * 2.0 + middle, edge + side * 9.0 + middle, z0, z1, size * 0.7, size * 0.7)
    _garden(scene, dice, style, edge + side * 10.0 + middle, edge + side * 24.0 + middle, z0, z1, size * 1.2, size * 0.5)
    if dice.chance(0.5):
        z = dice.between(z0, z1)
        if z > 5.0:
            _front(
                scene,
                dice,
                style,
                side,
                edge + side * dice.between(24.0, 36.0) + middle,
                z,
                z + dice.between(12.0, 25.0),
                depth=10.0,
                height=dice.between(1.5, 5.0) * 3.2,
                shop=False,
            )


def _walled(
    scene: Scene, dice: Dice, style: Style, side: float, edge: float, z0: float, z1: float, bend: tuple[float, float]
) -> None:
    height = dice.between(1.6, 3.4)
    near = max(z0, -2.0)
    wall(scene, dice, style, edge + side * 0.2 + _at(bend, z0, z1, near), near, edge + side * 0.2 + bend[1], z1, height)
    middle = (bend[0] + bend[1]) / 2
    _garden(scene, dice, style, edge + side * 2.0 + middle, edge + side * 8.0 + middle, z0, z1, (z1 - z0) / 11.0, 0.0)
    if dice.chance(0.7):
        z = z0 + dice.between(0.0, 6.0)
        if z > 3.0:
            _front(
                scene,
                dice,
                style,
                side,
                edge + side * dice.between(9.0, 14.0) + middle,
                z,
                z + dice.between(10.0, 22.0),
                depth=10.0,
                height=dice.between(2.0, 6.0) * 3.2,
                shop=False,
            )


def _towers(
    scene: Scene, dice: Dice, style: Style, side: float, edge: float, z0: float, z1: float, bend: tuple[float, float]
) -> None:
    setback = dice.between(5.0, 12.0)
    middle = (bend[0] + bend[1]) / 2
    width = min(z1 - z0, dice.between(16.0, 30.0))
    _front(
        scene,
        dice,
        style,
        side,
        edge + side * setback + middle,
        z1 - width,
        z1,
        depth=dice.between(12.0, 18.0),
        height=dice.between(24.0, 48.0),
        shop=False,
    )
    _garden(
        scene,
        dice,
        style,
        edge + side * 1.5 + middle,
        edge + side * (setback - 1.0) + middle,
        z0,
        z1,
        (z1 - z0) / 14.0,
        (z1 - z0) / 12.0,
    )
    if dice.chance(0.4):
        _boundary(scene, dice, style, edge + side * 0.2, z0, z1, bend)


def skyline(scene: Scene, dice: Dice, style: Style, shift: float, clear: float, *, closed: bool) -> None:
    """Add the far end: buildings across the view (with a gap for the street unless `closed`), trees, a ridge."""
    x = -170.0
    while x < 170.0:
        width = dice.between(12.0, 30.0)
        middle = x + width / 2
        if closed or abs(middle - shift) > clear + width / 2:
            if dice.chance(0.75):
                building(
                    scene,
                    dice,
                    style,
                    middle,
                    dice.between(150.0, 185.0),
                    0.0,
                    width=width,
                    depth=10.0,
                    height=dice.between(2.0, 9.0) * 3.2,
                    pitched=False,
                )
            else:
                tree(scene, dice, style, middle, dice.between(122.0, 140.0), dice.between(8.0, 15.0))
        x += width * dice.between(0.9, 1.3)
    if dice.chance(0.6):
        mesh = scene.start()
        wooded = dice.chance(0.65)
        slot = scene.colour(tone(dice, dice.pick(style.leaves if wooded else style.terrain)), tone(dice, dice.pick(style.leaves)))
        heights = [dice.between(6.0, 34.0) for _ in range(13)]
        for k in range(12):
            a, b = -330.0 + 55.0 * k, -275.0 + 55.0 * k
            mesh.poly(
                [(a, 0.0, 320.0), (b, 0.0, 320.0), (b, heights[k + 1], 320.0), (a, heights[k], 320.0)],
                slot,
                VEGETATION if wooded else TERRAIN,
                tex=TEX["hedge" if wooded else "grass"],
                slot2=slot + 1,
                period=(18.0, 18.0),
            )
