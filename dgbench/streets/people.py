"""People, bicycles, motorcycles and their riders as capsules on a skeleton, which look right from any side.

Palette slots of a person: 0 skin, 1 hair or helmet, 2 top, 3 trousers, 4 shoes, 5 bag. Of a two-wheeler: 0 frame,
1 tyre, 2 metal, 3 headlight, 4 tail light. z is the way they face; the origin is on the ground.
"""

from __future__ import annotations

import functools

from dgbench.streets.atlas import TEX
from dgbench.streets.dice import turn
from dgbench.streets.mesh import HEADLIGHT, SEE_THROUGH, TAILLIGHT, TWO_SIDED, Mesh, Point, Template

PERSON, RIDER, MOTORCYCLE, BICYCLE = 11, 12, 17, 18
SKIN, HAIR, TOP, LEGS, SHOES, BAG = range(6)
ROUND, CLOTH = TEX["round"], TEX["cloth"]


def _limb(mesh: Mesh, joints: list[Point], radii: list[float], slot: int, kind: int, tex: int) -> None:
    for start, end, thick, thin in zip(joints[:-1], joints[1:], radii[:-1], radii[1:], strict=True):
        mesh.capsule(start, end, thick, slot, kind, end_radius=thin, tex=tex, period=0.8)


def _figure(
    kind: int,
    hip: Point,
    lean: float,
    legs: list[list[Point]],
    arms: list[list[Point]],
    *,
    coat: float = 0.0,
    skirt: bool = False,
    bag: str = "",
    short: bool = False,
) -> Mesh:
    """Return a figure from its hip (y of the pelvis), the lean of its trunk in metres of z, and joint positions of limbs."""
    mesh = Mesh()
    x, y, z = hip
    neck = (x, y + 0.5, z + lean)
    for leg in legs:
        _limb(mesh, leg, [0.095, 0.07, 0.05], SKIN if skirt else LEGS, kind, CLOTH if not skirt else ROUND)
        foot = leg[-1]
        mesh.capsule(
            (foot[0], foot[1] + 0.02, foot[2] - 0.03),
            (foot[0], foot[1] - 0.01, foot[2] + 0.15),
            0.05,
            SHOES,
            kind,
            tex=ROUND,
        )
    if skirt:
        mesh.capsule((x, y + 0.05, z), (x, y - 0.42, z), 0.14, LEGS, kind, end_radius=0.24, tex=CLOTH)
    mesh.capsule((x, y + 0.02, z), (x, y + 0.4, z + lean * 0.8), 0.15, TOP, kind, end_radius=0.19, tex=CLOTH)
    if coat:
        mesh.capsule((x, y + 0.1, z), (x, y - coat, z), 0.17, TOP, kind, end_radius=0.21, tex=CLOTH)
    mesh.capsule((x - 0.15, neck[1] - 0.03, neck[2]), (x + 0.15, neck[1] - 0.03, neck[2]), 0.075, TOP, kind, tex=CLOTH)
    for arm in arms:
        _limb(mesh, arm[:2], [0.065, 0.055], TOP, kind, CLOTH)
        _limb(mesh, arm[1:], [0.052, 0.042], SKIN if short else TOP, kind, ROUND if short else CLOTH)
        mesh.capsule(arm[-1], (arm[-1][0], arm[-1][1] - 0.05, arm[-1][2]), 0.045, SKIN, kind, tex=ROUND)
    mesh.capsule(neck, (x, neck[1] + 0.1, neck[2] + 0.01), 0.055, SKIN, kind, tex=ROUND)
    mesh.capsule((x, neck[1] + 0.16, neck[2] + 0.03), (x, neck[1] + 0.23, neck[2] + 0.025), 0.095, SKIN, kind, tex=ROUND)
    mesh.capsule((x, neck[1] + 0.19, neck[2] - 0.035), (x, neck[1] + 0.27, neck[2] + 0.0), 0.1, HAIR, kind, tex=CLOTH)
    if bag == "back":
        mesh.capsule((x, y + 0.15, z - 0.2), (x, y + 0.42, z - 0.18 + lean), 0.15, BAG, kind, tex=CLOTH)
    elif bag == "hand":
        mesh.capsule((x + 0.3, y - 0.15, z), (x + 0.3, y - 0.32, z), 0.11, BAG, kind, end_radius=0.14, tex=CLOTH)
    return mesh


def _walker(stride: float, swing: float, **options: bool | float | str) -> Template:
    hip = 0.9
    legs: list[list[Point]] = []
    arms: list[list[Point]] = []
    for side, phase in ((-1.0, 1.0), (1.0, -1.0)):
        step, lift = stride * phase, 0.1 * stride if phase < 0 else 0.0
        legs.append([(side * 0.09, hip, 0.0), (side * 0.1, 0.48 + lift, step * 0.5 + 0.06), (side * 0.1, 0.08 + lift, step)])
        arms.append(
            [
                (side * 0.23, 1.36, 0.0),
                (side * 0.28, 1.08, -swing * phase * 0.5),
                (side * 0.27, 0.86, -swing * phase + 0.1),
            ]
        )
    return _figure(PERSON, (0.0, hip, 0.0), 0.02, legs, arms, **options).template()  # type: ignore[arg-type]


@functools.cache
def walkers() -> tuple[Template, ...]:
    """Return people on foot, 1.75 m tall: striding, strolling, standing, in coats and skirts, with bags."""
    return (
        _walker(0.34, 0.26),
        _walker(0.22, 0.18, bag="back"),
        _walker(-0.3, -0.22, coat=0.35),
        _walker(0.04, 0.05),
        _walker(0.2, 0.12, skirt=True, bag="hand"),
        _walker(-0.16, -0.1, short=True),
        _walker(0.06, -0.08, bag="hand"),
        _walker(0.28, 0.2, coat=0.5, bag="back"),
        _walker(0.1, 0.3, short=True, bag="back"),
    )


def _tyre(mesh: Mesh, z: float, radius: float, width: float, kind: int, spokes: bool) -> None:
    """Add a wheel in the plane x = 0: a ring of capsules round a disc, see-through between spokes."""
    ring = [turn(36.0 * step) for step in range(10)]
    points: list[Point] = [(0.0, radius + radius * s, z + radius * c) for c, s in ring]
    mesh.poly(
        [points[k] for k in (7, 8, 9, 0, 1, 2, 3, 4, 5, 6)],
        2,
        kind,
        tex=TEX["wheel"],
        flags=TWO_SIDED | (SEE_THROUGH if spokes else 0),
        layer=-1,
    )
    for k in range(10):
        mesh.capsule(points[k], points[(k + 1) % 10], width, 1, kind)


def _bicycle(mesh: Mesh) -> None:
    for z in (-0.52, 0.52):
        _tyre(mesh, z, 0.34, 0.022, BICYCLE, True)
    pedal, saddle, head, rear, front = (
        (0.0, 0.3, -0.08),
        (0.0, 0.9, -0.22),
        (0.0, 0.88, 0.34),
        (0.0, 0.34, -0.52),
        (0.0, 0.34, 0.52),
    )
    for start, end, radius, slot in (
        (pedal, saddle, 0.022, 0),
        (pedal, (0.0, 0.74, 0.38), 0.026, 0),
        ((0.0, 0.76, -0.18), (0.0, 0.78, 0.36), 0.022, 0),
        (rear, pedal, 0.018, 0),
        (rear, (0.0, 0.76, -0.18), 0.016, 0),
        (front, head, 0.022, 0),
        (head, (0.0, 1.02, 0.32), 0.02, 2),
        ((-0.26, 1.02, 0.26), (0.26, 1.02, 0.26), 0.02, 1),
        ((0.0, 0.93, -0.34), (0.0, 0.93, -0.12), 0.055, 1),
        ((-0.14, 0.3, -0.08), (0.14, 0.3, -0.08), 0.03, 1),
    ):
        mesh.capsule(start, end, radius, slot, BICYCLE)
    mesh.capsule((0.0, 0.7, -0.62), (0.0, 0.74, -0.64), 0.03, 4, BICYCLE, glow=TAILLIGHT)


def _motorcycle(mesh: Mesh) -> None:
    for z in (-0.68, 0.7):
        _tyre(mesh, z, 0.31, 0.065, MOTORCYCLE, False)
    for start, end, radius, slot in (
        ((0.0, 0.42, -0.25), (0.0, 0.45, 0.25), 0.19, 2),
        ((0.0, 0.78, -0.05), (0.0, 0.8, 0.3), 0.17, 0),
        ((0.0, 0.8, -0.7), (0.0, 0.78, -0.1), 0.1, 1),
        ((0.0, 0.72, -0.55), (0.0, 0.82, -0.9), 0.08, 0),
        ((-0.1, 0.31, 0.7), (-0.1, 0.95, 0.45), 0.035, 2),
        ((0.1, 0.31, 0.7), (0.1, 0.95, 0.45), 0.035, 2),
        ((-0.36, 1.02, 0.32), (0.36, 1.02, 0.32), 0.03, 1),
        ((0.16, 0.34, 0.1), (0.18, 0.4, -0.75), 0.06, 2),
        ((0.0, 0.55, -0.4), (0.0, 0.31, -0.68), 0.05, 1),
        ((0.0, 0.64, 0.66), (0.0, 0.64, 0.82), 0.09, 0),
        ((0.0, 0.95, 0.5), (0.0, 1.18, 0.42), 0.12, 0),
    ):
        mesh.capsule(start, end, radius, slot, MOTORCYCLE, tex=ROUND)
    mesh.capsule((0.0, 0.92, 0.58), (0.0, 0.94, 0.6), 0.09, 3, MOTORCYCLE, glow=HEADLIGHT)
    mesh.capsule((-0.05, 0.84, -0.96), (0.05, 0.84, -0.96), 0.045, 4, MOTORCYCLE, glow=TAILLIGHT)
    for side in (-1.0, 1.0):
        mesh.capsule((side * 0.3, 1.06, 0.34), (side * 0.33, 1.2, 0.36), 0.045, 1, MOTORCYCLE)


def _scooter(mesh: Mesh) -> None:
    for z in (-0.55, 0.6):
        _tyre(mesh, z, 0.23, 0.06, MOTORCYCLE, False)
    for start, end, radius, slot in (
        ((0.0, 0.5, -0.62), (0.0, 0.55, -0.2), 0.2, 0),
        ((0.0, 0.78, -0.6), (0.0, 0.76, -0.1), 0.1, 1),
        ((0.0, 0.24, -0.15), (0.0, 0.24, 0.35), 0.13, 0),
        ((0.0, 0.3, 0.45), (0.0, 0.98, 0.34), 0.16, 0),
        ((-0.32, 1.04, 0.28), (0.32, 1.04, 0.28), 0.03, 1),
        ((0.0, 0.46, 0.62), (0.0, 0.42, 0.7), 0.13, 0),
        ((0.0, 1.0, 0.34), (0.0, 1.04, 0.36), 0.11, 0),
    ):
        mesh.capsule(start, end, radius, slot, MOTORCYCLE, tex=ROUND)
    mesh.capsule((0.0, 1.02, 0.45), (0.0, 1.03, 0.47), 0.07, 3, MOTORCYCLE, glow=HEADLIGHT)
    mesh.capsule((-0.06, 0.62, -0.82), (0.06, 0.62, -0.82), 0.05, 4, MOTORCYCLE, glow=TAILLIGHT)


def _seated(
    hip: Point,
    lean: float,
    pedals: tuple[tuple[float, float], tuple[float, float]],
    width: float,
    grip: Point,
    bag: str,
) -> Mesh:
    """Return a rider: hips on the saddle, feet on pedals (y, z), hands on the grips."""
    legs: list[list[Point]] = []
    arms: list[list[Point]] = []
    for side, (y, z) in zip((-1.0, 1.0), pedals, strict=True):
        legs.append(
            [
                (side * 0.1, hip[1], hip[2]),
                (side * width, (hip[1] + y) / 2 + 0.16, (hip[2] + z) / 2 + 0.24),
                (side * width, y, z),
            ]
        )
        arms.append(
            [
                (side * 0.2, hip[1] + 0.45, hip[2] + lean),
                (side * 0.28, hip[1] + 0.24, hip[2] + lean + 0.12),
                (side * grip[0], grip[1], grip[2]),
            ]
        )
    return _figure(RIDER, hip, lean, legs, arms, bag=bag)


@functools.cache
def machines() -> dict[str, Template]:
    """Return two-wheelers without riders: bicycle, motorcycle, scooter."""
    built = {}
    for name, make in (("bicycle", _bicycle), ("motorcycle", _motorcycle), ("scooter", _scooter)):
        mesh = Mesh()
        make(mesh)
        built[name] = mesh.template()
    return built


@functools.cache
def ridden() -> dict[str, tuple[Template, ...]]:
    """Return two-wheelers with their riders as one object; the rider's palette slots start at 5."""
    built: dict[str, tuple[Template, ...]] = {}
    for name, make, hip, width, grip in (
        ("bicycle", _bicycle, (0.0, 0.95, -0.24), 0.12, (0.24, 1.04, 0.22)),
        ("motorcycle", _motorcycle, (0.0, 0.92, -0.32), 0.24, (0.34, 1.04, 0.28)),
        ("scooter", _scooter, (0.0, 0.88, -0.35), 0.17, (0.3, 1.06, 0.24)),
    ):
        kinds = []
        for lean, phase, bag in ((0.12, 0.12, ""), (0.24, -0.12, "back"), (0.06, 0.05, "")):
            mesh = Mesh()
            make(mesh)
            pedals = ((0.3 + phase, -0.05), (0.3 - phase, -0.1)) if name == "bicycle" else ((0.3, 0.1), (0.3, 0.1))
            body = _seated(hip, lean, pedals, width, grip, bag)
            mesh.corners.extend(body.corners)
            # the rider's slots come after the machine's five
            mesh.attributes.extend((*row[:5], row[5] + 5, row[6] + 5, *row[7:]) for row in body.attributes)
            kinds.append(mesh.template())
        built[name] = tuple(kinds)
    return built
