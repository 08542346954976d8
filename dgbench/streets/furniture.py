"""Street furniture and plants: poles, lamps, traffic lights, signs, trees, bushes, hedges."""

from __future__ import annotations

from dgbench.streets.atlas import TEX
from dgbench.streets.buildings import tone
from dgbench.streets.dice import Dice, turn
from dgbench.streets.mesh import BLUNT, DARK, LAMP, SIGNAL, SNOWY, TWO_SIDED, Colour, Light, Mesh, Point, Scene
from dgbench.streets.style import Style

POLE, LIGHT, SIGN, VEGETATION = 5, 6, 7, 8
ROUND = TEX["round"]
SINGLE = ("cone", "palm", "column", "tiered")  # trees with one crown and no forks
TRUNKS = {"cone": 0.12, "palm": 0.8, "umbrella": 0.55, "column": 0.1, "tiered": 0.08, "dome": 0.3}  # share of the height
WIDTHS = {"cone": 0.42, "palm": 2.4, "umbrella": 1.1, "oval": 0.55, "column": 0.7, "tiered": 0.5, "dome": 0.95}  # of a crown
CROWNS = {"cone": 3, "palm": 2, "oval": 3, "umbrella": 2, "column": 2, "tiered": 3, "dome": 3}  # number of pictures
GREYS: tuple[Colour, ...] = (
    (0.3, 0.31, 0.32),
    (0.45, 0.45, 0.44),
    (0.12, 0.13, 0.13),
    (0.1, 0.16, 0.13),
    (0.5, 0.48, 0.42),
    (0.25, 0.2, 0.16),
)

PLATES = {  # shape of a sign -> texture
    "disc": "disc",
    "octagon": "disc",
    "triangle": "triangle",
    "diamond": "square",
    "square": "square",
    "text": "text",
    "hexagon": "emblem",
    "shield": "emblem",
    "arrow": "notice",
    "notice": "notice",
}
OUTLINES: dict[str, list[tuple[float, float]]] = {  # elsewhere a disc or an octagon
    "triangle": [(-1, -0.86), (1, -0.86), (0, 0.95)],
    "diamond": [(0, -1), (1, 0), (0, 1), (-1, 0)],
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "text": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "hexagon": [(-0.55, -1), (0.55, -1), (1, 0), (0.55, 1), (-0.55, 1), (-1, 0)],
    "shield": [(0, -1), (0.7, -0.5), (0.9, 1), (-0.9, 1), (-0.7, -0.5)],
    "arrow": [(-1, -1), (0.6, -1), (1, 0), (0.6, 1), (-1, 1)],
    "notice": [(-0.9, -1), (0.9, -1), (1, 0), (0.9, 1), (-0.9, 1), (-1, 0)],
}
WIDE = ("text", "arrow", "notice")


def lamp(scene: Scene, dice: Dice, x: float, z: float, reach: float, height: float, kind: int) -> None:
    """Add a street lamp at (x, z) whose arm reaches `reach` metres in x; kind 0 arm, 1 post top, 2 two arms."""
    mesh = scene.start()
    slot = scene.colour(tone(dice, dice.pick(GREYS)), (0.9, 0.86, 0.7))
    mesh.capsule((x, 0.0, z), (x, height, z), 0.09, slot, POLE, end_radius=0.055, tex=ROUND, flags=BLUNT)
    mesh.capsule((x, 0.0, z), (x, 0.9, z), 0.13, slot, POLE, tex=ROUND, flags=BLUNT)
    heads = (
        [(x, height + 0.2)]
        if kind == 1
        else [(x + reach, height + 0.35)]
        if kind == 0
        else [(x + reach, height + 0.3), (x - reach, height + 0.3)]
    )
    for end, y in heads:
        if kind == 1:
            mesh.capsule((x, y - 0.2, z), (x, y + 0.25, z), 0.2, slot + 1, POLE, end_radius=0.14, glow=LAMP)
        else:
            mesh.capsule((x, height - 0.1, z), (end, y, z), 0.05, slot, POLE, tex=ROUND)
            away = 0.7 if end > x else -0.7
            mesh.capsule((end - away * 0.3, y, z), (end + away, y, z), 0.09, slot, POLE, tex=ROUND)
            mesh.capsule((end, y - 0.08, z), (end + away * 0.8, y - 0.08, z), 0.05, slot + 1, POLE, glow=LAMP, layer=1)
        scene.lights.append(Light((end, y, z), dice.pick(((1.0, 0.72, 0.4), (1.0, 0.85, 0.65), (0.9, 0.95, 1.0))), 1.3, True))


def pole(scene: Scene, dice: Dice, x: float, z: float, height: float, radius: float, *, crossarm: bool = False) -> None:
    mesh = scene.start()
    slot = scene.colour(tone(dice, dice.pick(GREYS)))
    mesh.capsule(
        (x, 0.0, z),
        (x, height, z),
        radius,
        slot,
        POLE,
        end_radius=radius * 0.8,
        tex=TEX["bark"] if crossarm else ROUND,
        flags=BLUNT,
    )
    if crossarm:
        for y in (height - 0.4, height - 1.1):
            mesh.capsule((x - 1.0, y, z), (x + 1.0, y, z), 0.06, slot, POLE)


def bollards(scene: Scene, dice: Dice, x: float, z: float, count: int) -> None:
    for k in range(count):
        mesh = scene.start()
        slot = scene.colour(tone(dice, dice.pick(GREYS)), (0.85, 0.85, 0.85))
        a = z + k * 1.6
        mesh.capsule((x, 0.0, a), (x, 0.95, a), 0.07, slot, POLE, tex=ROUND)
        mesh.capsule((x, 0.72, a), (x, 0.82, a), 0.075, slot + 1, POLE, layer=1, flags=BLUNT)


def _head(mesh: Mesh, scene: Scene, dice: Dice, centre: Point, facing: float, scale: float) -> None:
    """Add a signal head around `centre`; `facing` is +1 when its lenses look to -z (at the camera), -1 away."""
    x, y, z = centre
    box = tone(dice, dice.pick(((0.04, 0.05, 0.04), (0.07, 0.07, 0.07), (0.5, 0.42, 0.1), (0.05, 0.09, 0.06))))
    state = dice.index(3)
    slot = scene.colour(box, (0.02, 0.02, 0.02))
    w, h, d = 0.17 * scale, 0.5 * scale, 0.14 * scale
    mesh.box((x - w, y - h, z - d), (x + w, y + h, z + d), slot, LIGHT, layer=1)
    colours: tuple[Colour, ...] = ((0.95, 0.08, 0.05), (0.95, 0.6, 0.05), (0.1, 0.9, 0.45))
    for k in range(3):
        on = k == state
        colour = colours[k] if on else (colours[k][0] * 0.12 + 0.03, colours[k][1] * 0.12 + 0.03, colours[k][2] * 0.12 + 0.03)
        slot = scene.colour(colour)
        cy, front = y + (0.32 - 0.32 * k) * scale, z - facing * (d + 0.01)
        points = []
        for step in range(8):
            c, s = turn(45.0 * step + 22.0)
            points.append((x + 0.13 * scale * c * facing, cy + 0.13 * scale * s, front))
        mesh.poly(points, slot, LIGHT, layer=2, glow=SIGNAL if on else DARK)
        if on and facing > 0:
            scene.lights.append(Light((x, cy, front), colours[k], 0.5, False))


def signals(scene: Scene, dice: Dice, x: float, z: float, reach: float, facing: float) -> None:
    """Add a traffic light pole at (x, z); with `reach` its arm carries a second head above the road."""
    mesh = scene.start()
    slot = scene.colour(tone(dice, dice.pick(GREYS)))
    tall = 5.6 if reach else 3.4
    mesh.capsule((x, 0.0, z), (x, tall, z), 0.075, slot, POLE, tex=ROUND, flags=BLUNT)
    _head(mesh, scene, dice, (x, 2.9, z - facing * 0.2), facing, 1.0)
    if reach:
        mesh.capsule((x, tall - 0.1, z), (x + reach, tall + 0.1, z), 0.06, slot, POLE, tex=ROUND)
        mesh = scene.start()
        _head(mesh, scene, dice, (x + reach, tall - 0.35, z - facing * 0.15), facing, 1.1)


def sign(scene: Scene, dice: Dice, style: Style, x: float, z: float, *, large: bool = False) -> None:
    """Add a traffic sign on a post: plates of the style's shapes; `large` puts a direction board on two posts."""
    mesh = scene.start()
    grey = scene.colour(tone(dice, dice.pick(GREYS)), (0.42, 0.43, 0.44))
    if large:
        width, low = dice.between(1.2, 2.2), dice.between(2.0, 4.2)
        high = low + dice.between(0.9, 1.6)
        for side in (-0.7, 0.7):
            mesh.capsule((x + side * width, 0.0, z), (x + side * width, high, z), 0.06, grey, POLE, tex=ROUND, flags=BLUNT)
        _plate(mesh, scene, dice, style, style.board, x, z - 0.08, low, high, width)
        return
    height = dice.between(2.2, 2.9)
    mesh.capsule((x, 0.0, z), (x, height + 0.4, z), 0.04, grey, POLE, tex=ROUND, flags=BLUNT)
    for _ in range(1 + dice.index(2)):
        shape = dice.pick(style.signs)
        half = dice.between(0.3, 0.42)
        rise = half * 0.45 if shape in WIDE else half
        _plate(mesh, scene, dice, style, shape, x, z - 0.06, height - rise, height + rise, half)
        height -= 2 * rise + 0.08


def _plate(
    mesh: Mesh,
    scene: Scene,
    dice: Dice,
    style: Style,
    shape: str,
    x: float,
    z: float,
    low: float,
    high: float,
    half: float,
) -> None:
    field, border = dice.pick(style.sign_colours)
    slot = scene.colour(field, border, (0.4, 0.41, 0.42))
    y, rise = (low + high) / 2, (high - low) / 2
    tex = PLATES[shape]
    if shape in OUTLINES:
        outline = OUTLINES[shape]
    else:
        outline = []
        for step in range(10 if shape == "disc" else 8):
            c, s = turn((36.0 * step - 108.0) if shape == "disc" else (45.0 * step - 112.5))
            outline.append((c, s))
    front = [(x + a * half, y + b * rise, z) for a, b in outline]
    if shape in ("disc", "octagon"):
        mesh.poly(front, slot + 1, SIGN, layer=1)
        mesh.poly([(x + a * half * 0.8, y + b * rise * 0.8, z - 0.005) for a, b in outline], slot, SIGN, layer=2)
        g = half * 0.5
        mesh.poly(
            [(x - g, y - g, z - 0.01), (x + g, y - g, z - 0.01), (x + g, y + g, z - 0.01), (x - g, y + g, z - 0.01)],
            slot,
            SIGN,
            slot2=slot + 1,
            tex=TEX["square0"] if dice.chance(0.5) else TEX["text0"],
            layer=3,
        )
    else:
        mesh.poly(front, slot, SIGN, slot2=slot + 1, tex=TEX[f"{tex}{dice.index(2)}"], layer=1)
    mesh.poly([(a, b, c + 0.02) for a, b, c in front[::-1]], slot + 2, SIGN, layer=1)


def tree(scene: Scene, dice: Dice, style: Style, x: float, z: float, height: float) -> None:
    """Add a tree: bark, a fork or two, and one to three overlapping crowns; trunk and crown are one class."""
    kind = dice.weighted(style.trees)
    if kind == "bare" and z < 14.0:
        # twigs are too coarse in the atlas to be looked at from nearby
        kind = "oval"
    mesh = scene.start()
    leaf = tone(dice, dice.pick(style.leaves), 0.25)
    dark = (leaf[0] * dice.between(0.45, 0.9), leaf[1] * dice.between(0.5, 0.85), leaf[2] * dice.between(0.5, 1.0))
    bark = tone(dice, dice.pick(((0.2, 0.15, 0.1), (0.28, 0.25, 0.21), (0.14, 0.11, 0.09), (0.4, 0.38, 0.34))))
    slot = scene.colour(leaf, dark, bark)
    lean = dice.between(-0.25, 0.25)
    radius = 0.035 * height * dice.between(0.6, 1.0)
    if kind == "bare":
        mesh.sprite(
            (x, height * 0.5, z),
            height * 0.5,
            height * 0.5,
            slot + 2,
            slot + 2,
            VEGETATION,
            tex=TEX[f"bare{dice.index(3)}"],
            layer=1,
        )
        return
    share = TRUNKS.get(kind, dice.between(0.22, 0.4))
    top = height * (share + 0.15)
    mesh.capsule(
        (x, 0.0, z),
        (x + lean, top, z),
        radius,
        slot + 2,
        VEGETATION,
        end_radius=radius * 0.65,
        tex=TEX["bark"],
        flags=BLUNT,
        period=1.5,
    )
    crown, wide = height * (1.0 - share), WIDTHS.get(kind, dice.between(0.62, 0.8))
    if kind not in SINGLE:
        for side in (-1.0, 1.0):
            mesh.capsule(
                (x + lean * 0.8, top * 0.8, z),
                (x + side * crown * 0.22, top + crown * 0.25, z),
                radius * 0.5,
                slot + 2,
                VEGETATION,
                end_radius=radius * 0.25,
                tex=TEX["bark"],
            )
    count = CROWNS.get(kind, 4)
    middle = height * share + crown * 0.5
    parts = 1 if kind in SINGLE else 1 + dice.index(3)
    for part in range(parts):
        scale = 1.0 if part == 0 else dice.between(0.55, 0.75)
        aside = 0.0 if part == 0 else dice.between(-0.35, 0.35) * crown
        drop = 0.0 if part == 0 else dice.between(-0.3, 0.15) * crown
        mesh.sprite(
            (x + lean + aside, middle + drop, z - 0.3 * part),
            crown * 0.5 * wide * scale * 1.25,
            crown * 0.56 * scale,
            slot,
            slot + 1,
            VEGETATION,
            tex=TEX[f"{kind}{dice.index(count)}"],
            layer=1 + part,
            flags=SNOWY,
        )
    scene.shadow(x + lean, z, crown * wide * 0.4, crown * wide * 0.4, height * 0.9, base=height * share, contact=False)
    scene.shadow(x, z, radius * 2, radius * 2, height * share)


def bush(scene: Scene, dice: Dice, style: Style, x: float, z: float, size: float) -> None:
    mesh = scene.start()
    leaf = tone(dice, dice.pick(style.leaves), 0.25)
    slot = scene.colour(leaf, (leaf[0] * 0.6, leaf[1] * 0.7, leaf[2] * 0.7))
    wide = size * dice.between(0.9, 1.7)
    mesh.sprite(
        (x, size * 0.5, z),
        wide * 0.6,
        size * 0.62,
        slot,
        slot + 1,
        VEGETATION,
        tex=TEX[f"{style.shrub}{dice.index(3)}"],
        flags=SNOWY,
    )
    scene.shadow(x, z, wide * 0.5, wide * 0.3, size * 0.5)


def hedge(scene: Scene, dice: Dice, style: Style, x0: float, z0: float, x1: float, z1: float, height: float) -> None:
    """Add a clipped hedge along the street, 0.8 m thick, with a ragged top of small bushes."""
    mesh = scene.start()
    leaf = tone(dice, dice.pick(style.leaves), 0.25)
    slot = scene.colour(leaf, (leaf[0] * 0.55, leaf[1] * 0.65, leaf[2] * 0.6))
    mesh.box(
        (min(x0, x1) - 0.4, 0.0, min(z0, z1)),
        (max(x0, x1) + 0.4, height, max(z0, z1)),
        slot,
        VEGETATION,
        slot2=slot + 1,
        tex=TEX["hedge"],
        period=(1.8, 1.8),
        flags=TWO_SIDED | SNOWY,
    )
    steps = max(2, int((abs(z1 - z0) + abs(x1 - x0)) / 1.6))
    for k in range(steps):
        a = (k + 0.5) / steps
        mesh.sprite(
            (x0 + (x1 - x0) * a, height, z0 + (z1 - z0) * a),
            1.1,
            0.35 * dice.between(0.6, 1.3),
            slot,
            slot + 1,
            VEGETATION,
            tex=TEX[f"{style.shrub}{dice.index(3)}"],
            layer=1,
            flags=SNOWY,
        )
