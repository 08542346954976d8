"""Cars, trucks, buses and trams: convex hulls in layers (body, cabin, details), built once and then placed many times.

Object axes: z is the way the vehicle faces, the origin is on the ground below its centre. Palette slots of all
vehicles: 0 body, 1 second body colour, 2 glass, 3 tyre and trim, 4 metal, 5 headlight, 6 tail light, 7 plate.
"""

from __future__ import annotations

import functools
import itertools

from dgbench.streets.atlas import TEX
from dgbench.streets.dice import turn
from dgbench.streets.mesh import HEADLIGHT, LAMP, SNOWY, TAILLIGHT, WINDOW, Mesh, Point, Template

CAR, TRUCK, BUS, TRAIN = 13, 14, 15, 16
BODY, SECOND, GLASS, TYRE, METAL, HEAD, TAIL, PLATE = range(8)

USUAL_TRUCKS = ((7.0, 3.4, "corrugated"), (5.0, 2.9, "poster"), (8.5, 3.7, "plaster"), (6.0, 1.6, "planks"))
USUAL_BUSES = ((11.5, 3.0, 2), (10.0, 3.4, 1), (10.0, 4.3, 2))  # a city bus, a coach, a double-decker
USUAL_TRAMS = ((0.35, 2, 3.35), (0.1, 1, 3.35))

Vehicle = tuple[Template, float, float, float]  # with half width, half length and height
Truck = tuple[tuple[Template, Template], float, float, float]  # (load, cab)
Profile = tuple[tuple[float, float], ...]  # (z, y) corners, counter-clockwise seen from the right (+z is to the right)


def extrude(
    mesh: Mesh,
    profile: Profile,
    half: float,
    slot: int,
    kind: int,
    *,
    top_half: float | None = None,
    layer: int = 0,
    tex: int = 0,
    detail: int = 0,
) -> None:
    """Add the solid between two side profiles; above its lowest corners it narrows to `top_half`."""
    bottom = min(y for _, y in profile)
    height = max(y for _, y in profile) - bottom
    narrow = half if top_half is None else top_half

    def width(y: float) -> float:
        return half + (narrow - half) * (y - bottom) / height

    right = [(width(y), y, z) for z, y in profile]
    left = [(-width(y), y, z) for z, y in profile]
    mesh.poly(right, slot, kind, layer=layer, tex=tex, detail=detail)
    mesh.poly(left[::-1], slot, kind, layer=layer, tex=tex, detail=detail)
    for k in range(len(profile)):
        follow = (k + 1) % len(profile)
        up = profile[k][0] > profile[follow][0]
        mesh.poly(
            [right[k], left[k], left[follow], right[follow]],
            slot,
            kind,
            layer=layer,
            detail=detail,
            flags=SNOWY if up else 0,
        )


def disc(
    mesh: Mesh,
    x: float,
    y: float,
    z: float,
    radius: float,
    slot: int,
    kind: int,
    layer: int,
    *,
    outward: float,
    tex: int = 0,
) -> None:
    """Add a wheel face in the plane x = const that looks to the side of sign `outward`."""
    points: list[Point] = []
    for step in range(10):
        c, s = turn(36.0 * step + 18.0)
        points.append((x, y + radius * s, z + radius * c * outward))
    mesh.poly(points, slot, kind, layer=layer, tex=tex)


def wheels(mesh: Mesh, half: float, radius: float, places: tuple[float, ...], kind: int) -> None:
    for z in places:
        for side in (-1.0, 1.0):
            x = side * (half + 0.01)
            disc(mesh, x, radius * 1.02, z, radius * 1.16, TYRE, kind, 2, outward=side)
            disc(mesh, x + side * 0.01, radius, z, radius, TYRE, kind, 3, outward=side)
            disc(mesh, x + side * 0.02, radius, z, radius * 0.62, METAL, kind, 4, outward=side, tex=TEX["wheel"])
            inner = side * (half - 0.24)
            low, high = min(x, inner), max(x, inner)
            mesh.box((low, 0.0, z - radius * 0.8), (high, radius * 1.3, z + radius * 0.8), TYRE, kind, sides="rf", layer=-1)


def lamps(mesh: Mesh, half: float, rear: float, front: float, low: float, high: float, kind: int, *, wide: float = 0.34) -> None:
    """Add head and tail lights, plates and a grille, just outside the front and rear faces."""
    for side in (-1.0, 1.0):
        a, b = side * (half - 0.05), side * (half - 0.05 - wide)
        x0, x1 = min(a, b), max(a, b)
        mesh.box((x0, low, rear - 0.02), (x1, high, rear), TAIL, kind, sides="r", layer=3, glow=TAILLIGHT)
        mesh.box((x0, low, front), (x1, high, front + 0.02), HEAD, kind, sides="f", layer=3, glow=HEADLIGHT)
    mesh.box((-0.26, low - 0.2, rear - 0.03), (0.26, low - 0.08, rear), PLATE, kind, sides="r", layer=3)
    mesh.box((-0.26, low - 0.22, front), (0.26, low - 0.1, front + 0.03), PLATE, kind, sides="f", layer=3)
    mesh.box((-half * 0.5, low, front), (half * 0.5, high - 0.05, front + 0.02), TYRE, kind, sides="f", layer=3)


def _windows(mesh: Mesh, base: Profile, half: float, top_half: float, posts: tuple[float, ...], kind: int) -> None:
    """Add glass on a cabin of profile (rear base, front base, front roof, rear roof): side panes, both screens."""
    (zr, y0), (zf, _), (zt, y1), (zb, _) = base

    def at(t: float, s: float, side: float) -> Point:
        low, high = zr + (zf - zr) * t, zb + (zt - zb) * t
        return (side * (half + (top_half - half) * s + 0.008), y0 + (y1 - y0) * s, low + (high - low) * s)

    for left, right in itertools.pairwise(posts):
        a, b = left + 0.025, right - 0.025
        mesh.poly([at(a, 0.08, 1), at(b, 0.08, 1), at(b, 0.86, 1), at(a, 0.86, 1)], GLASS, kind, layer=2, detail=TEX["cloud"])
        mesh.poly(
            [at(b, 0.08, -1), at(a, 0.08, -1), at(a, 0.86, -1), at(b, 0.86, -1)],
            GLASS,
            kind,
            layer=2,
            detail=TEX["cloud"],
        )
    for z0, z1, shift, sign in ((zr, zb, -0.01, 1.0), (zf, zt, 0.01, -1.0)):
        points = []
        for side, s in ((-1, 0.1), (1, 0.1), (1, 0.9), (-1, 0.9)):
            x = (half + (top_half - half) * s - 0.07) * side * sign
            points.append((x, y0 + (y1 - y0) * s, z0 + (z1 - z0) * s + shift))
        mesh.poly(points, GLASS, kind, layer=2, detail=TEX["cloud"])


def car_of(
    lower: Profile,
    cabin: Profile,
    half: float,
    top_half: float,
    axles: tuple[float, float],
    radius: float,
    posts: tuple[float, ...],
    light: tuple[float, float],
) -> Template:
    mesh = Mesh()
    extrude(mesh, lower, half, BODY, CAR)
    extrude(mesh, cabin, half - 0.06, BODY, CAR, top_half=top_half, layer=1)
    _windows(mesh, cabin, half - 0.06, top_half, posts, CAR)
    wheels(mesh, half, radius, axles, CAR)
    rear, front = min(z for z, _ in lower), max(z for z, _ in lower)
    lamps(mesh, half, rear, front, *light, CAR)
    for side in (-1.0, 1.0):
        x = side * (half + 0.012)
        mesh.poly(
            [
                (x, 0.22, axles[0] + 0.4),
                (x, 0.22, axles[1] - 0.4),
                (x, 0.32, axles[1] - 0.4),
                (x, 0.32, axles[0] + 0.4),
            ][:: int(side)],
            TYRE,
            CAR,
            layer=2,
        )
        mirror = cabin[1][0] - 0.25
        low, high = min(x, x + side * 0.16), max(x, x + side * 0.16)
        mesh.box((low, cabin[0][1] + 0.02, mirror - 0.08), (high, cabin[0][1] + 0.17, mirror), BODY, CAR, sides="rft")
    mesh.box((-half + 0.02, 0.28, rear - 0.01), (half - 0.02, 0.46, rear), TYRE, CAR, sides="r", layer=2)
    mesh.box((-half + 0.02, 0.22, front), (half - 0.02, 0.36, front + 0.01), TYRE, CAR, sides="f", layer=2)
    return mesh.template()


@functools.cache
def cars() -> tuple[Vehicle, ...]:
    """Return (template, half width, half length, height): hatchback, saloon, estate, off-roader, van, small car, coupé."""
    wedge: Profile = ((-1.95, 0.24), (1.95, 0.24), (2.0, 0.5), (1.9, 0.72), (0.95, 0.93), (-1.9, 0.95), (-2.0, 0.6))
    return (
        (
            car_of(
                wedge,
                ((-1.88, 0.93), (1.0, 0.93), (0.2, 1.46), (-1.45, 1.46)),
                0.88,
                0.62,
                (-1.25, 1.28),
                0.32,
                (0.1, 0.42, 0.68, 0.94),
                (0.62, 0.82),
            ),
            0.88,
            2.0,
            1.46,
        ),
        (
            car_of(
                ((-2.2, 0.24), (2.25, 0.24), (2.3, 0.5), (2.2, 0.7), (1.1, 0.9), (-2.15, 0.96), (-2.3, 0.62)),
                ((-1.75, 0.92), (1.1, 0.9), (0.3, 1.42), (-1.05, 1.42)),
                0.9,
                0.63,
                (-1.35, 1.45),
                0.33,
                (0.12, 0.46, 0.7, 0.94),
                (0.66, 0.86),
            ),
            0.9,
            2.3,
            1.42,
        ),
        (
            car_of(
                ((-2.25, 0.24), (2.2, 0.24), (2.25, 0.5), (2.15, 0.72), (1.1, 0.94), (-2.2, 0.97), (-2.28, 0.6)),
                ((-2.18, 0.95), (1.1, 0.93), (0.3, 1.47), (-1.95, 1.47)),
                0.9,
                0.66,
                (-1.35, 1.42),
                0.33,
                (0.05, 0.3, 0.55, 0.76, 0.95),
                (0.7, 0.95),
            ),
            0.9,
            2.25,
            1.47,
        ),
        (
            car_of(
                ((-2.15, 0.34), (2.15, 0.34), (2.25, 0.6), (2.15, 0.95), (1.1, 1.1), (-2.15, 1.12), (-2.25, 0.8)),
                ((-2.1, 1.1), (1.15, 1.08), (0.5, 1.72), (-1.85, 1.74)),
                0.95,
                0.72,
                (-1.3, 1.38),
                0.39,
                (0.08, 0.36, 0.6, 0.94),
                (0.8, 1.05),
            ),
            0.95,
            2.25,
            1.74,
        ),
        (
            car_of(
                ((-2.4, 0.28), (2.4, 0.28), (2.5, 0.6), (2.4, 0.95), (1.95, 1.15), (-2.45, 1.15), (-2.48, 0.7)),
                ((-2.44, 1.13), (1.95, 1.12), (1.05, 1.95), (-2.38, 1.97)),
                0.98,
                0.84,
                (-1.5, 1.6),
                0.35,
                (0.52, 0.74, 0.94),
                (0.75, 1.05),
            ),
            0.98,
            2.5,
            1.97,
        ),
        (
            car_of(
                ((-1.6, 0.24), (1.65, 0.24), (1.72, 0.5), (1.62, 0.75), (1.0, 0.95), (-1.65, 0.97), (-1.7, 0.6)),
                ((-1.63, 0.95), (1.02, 0.94), (0.35, 1.5), (-1.4, 1.5)),
                0.8,
                0.6,
                (-1.05, 1.12),
                0.3,
                (0.14, 0.5, 0.92),
                (0.65, 0.86),
            ),
            0.8,
            1.7,
            1.5,
        ),
        (
            car_of(
                ((-2.1, 0.2), (2.2, 0.2), (2.25, 0.42), (2.1, 0.6), (1.0, 0.8), (-2.05, 0.9), (-2.2, 0.55)),
                ((-1.7, 0.85), (0.95, 0.8), (0.05, 1.26), (-0.85, 1.26)),
                0.92,
                0.6,
                (-1.3, 1.38),
                0.34,
                (0.2, 0.62, 0.92),
                (0.6, 0.78),
            ),
            0.92,
            2.2,
            1.26,
        ),
    )


@functools.cache
def trucks(specs: tuple[tuple[float, float, str], ...] = USUAL_TRUCKS) -> tuple[Truck, ...]:
    """Return trucks of (length of the load, height, texture); two objects each, so that each hides the other correctly."""
    kinds = []
    for length, height, tex in specs:
        load, cab = Mesh(), Mesh()
        half, rear = 1.22, -length / 2 - 1.0
        front = rear + length
        load.box(
            (-half, 0.95, rear),
            (half, height, front),
            SECOND,
            TRUCK,
            tex=TEX[tex],
            slot2=BODY,
            period=(2.6, 2.6),
            flags=0,
        )
        load.box((-half + 0.1, 0.55, rear + 0.1), (half - 0.1, 0.95, front), TYRE, TRUCK, sides="rflx", layer=-1)
        load.box((-half, 0.5, rear - 0.02), (half, 0.62, rear), METAL, TRUCK, sides="r", layer=3)
        wheels(load, half - 0.05, 0.48, (rear + 1.0, rear + 2.1), TRUCK)
        for side in (-1.0, 1.0):
            low, high = (0.8, 1.15) if side > 0 else (-1.15, -0.8)
            load.box((low, 0.66, rear - 0.03), (high, 0.84, rear), TAIL, TRUCK, sides="r", layer=4, glow=TAILLIGHT)
        load.box((-0.02, 1.0, rear - 0.02), (0.02, height - 0.05, rear), TYRE, TRUCK, sides="r", layer=3)
        nose = front + 2.0
        extrude(
            cab,
            ((front + 0.1, 0.5), (nose, 0.5), (nose, 1.6), (nose - 0.25, 2.6), (front + 0.1, 2.7)),
            1.15,
            BODY,
            TRUCK,
        )
        cab.poly(
            [(1.0, 1.65, nose), (-1.0, 1.65, nose), (-0.95, 2.45, nose - 0.2), (0.95, 2.45, nose - 0.2)],
            GLASS,
            TRUCK,
            layer=1,
            detail=TEX["cloud"],
        )
        for side in (-1.0, 1.0):
            x = side * 1.16
            pane = [(x, 1.6, front + 0.9), (x, 1.6, nose - 0.2), (x, 2.4, nose - 0.4), (x, 2.4, front + 0.9)]
            cab.poly(pane[:: int(side)], GLASS, TRUCK, layer=1, detail=TEX["cloud"])
            low, high = (0.7, 1.08) if side > 0 else (-1.08, -0.7)
            cab.box((low, 0.7, nose), (high, 0.95, nose + 0.02), HEAD, TRUCK, sides="f", layer=3, glow=HEADLIGHT)
        cab.box((-0.65, 0.75, nose), (0.65, 1.4, nose + 0.02), TYRE, TRUCK, sides="f", layer=3)
        wheels(cab, 1.13, 0.48, (front + 1.0,), TRUCK)
        kinds.append(((load.template(), cab.template()), half, length / 2 + 1.0, height))
    return tuple(kinds)


def coach_of(kind: int, half: float, length: float, height: float, base: float, *, doors: int, nose: float) -> Mesh:
    """Return the hull of a bus or of one section of a tram: lower panels, a band of windows, a roof, both ends."""
    mesh = Mesh()
    rear, front = -length / 2, length / 2
    extrude(
        mesh,
        (
            (rear, base),
            (front, base),
            (front, height * 0.45),
            (front - nose, height),
            (rear + nose, height),
            (rear, height * 0.45),
        ),
        half,
        BODY,
        kind,
        detail=TEX["flat"],
    )
    low, high = base + (height - base) * 0.36, base + (height - base) * 0.82
    x = half + 0.01
    mesh.box(
        (-x, low, rear + 0.35),
        (x, high, front - 0.45),
        TYRE,
        kind,
        sides="lx",
        slot2=GLASS,
        tex=TEX["glazing"],
        period=(2.8, 0.0),
        layer=1,
        glow=WINDOW,
    )
    mesh.box((-x, base, rear + 0.02), (x, base + (low - base) * 0.45, front - 0.02), SECOND, kind, sides="lx", layer=1)
    for number in range(doors):
        z = rear + length * (number + 0.8) / (doors + 0.4)
        mesh.box(
            (-x - 0.01, base + 0.1, z - 0.6),
            (x + 0.01, high, z + 0.6),
            TYRE,
            kind,
            sides="lx",
            slot2=GLASS,
            tex=TEX["glazing"],
            layer=2,
            glow=WINDOW,
        )
    for z, sign in ((rear, 1.0), (front, -1.0)):
        shift = -0.01 * sign
        points = []
        for side, t in ((-1.0, 0.02), (1.0, 0.02), (1.0, 0.7), (-1.0, 0.7)):
            y = height * 0.45 + height * 0.55 * t
            points.append((side * sign * (half - 0.12), y, z + sign * nose * t + shift))
        mesh.poly(points, GLASS, kind, layer=1, detail=TEX["cloud"])
        y = height * 0.45 + height * 0.55 * 0.76
        board = [
            (side * sign * half * 0.6, y + rise, z + sign * nose * (0.76 + rise / height) + shift)
            for side, rise in ((-1, 0.0), (1, 0.0), (1, 0.28), (-1, 0.28))
        ]
        mesh.poly(board, TYRE, kind, slot2=HEAD, tex=TEX["text0"], layer=2, glow=LAMP)
    lamps(mesh, half, rear, front, base + 0.35, base + 0.6, kind)
    return mesh


@functools.cache
def buses(specs: tuple[tuple[float, float, int], ...] = USUAL_BUSES) -> tuple[Vehicle, ...]:
    """Return buses of (length, height, number of doors); those higher than 4 m are double-deckers."""
    kinds = []
    for length, height, doors in specs:
        mesh = coach_of(BUS, 1.25, length, height if height < 4 else 2.7, 0.3, doors=doors, nose=0.16)
        if height > 4:
            mesh.box((-1.25, 2.7, -length / 2 + 0.08), (1.25, height, length / 2 - 0.12), BODY, BUS, layer=1)
            mesh.box(
                (-1.26, 3.0, -length / 2 + 0.05),
                (1.26, 3.9, length / 2 - 0.1),
                TYRE,
                BUS,
                sides="lxrf",
                slot2=GLASS,
                tex=TEX["glazing"],
                period=(2.4, 0.0),
                layer=2,
                glow=WINDOW,
            )
        wheels(mesh, 1.24, 0.48, (-length * 0.3, length * 0.3), BUS)
        kinds.append((mesh.template(), 1.25, length / 2, height))
    return tuple(kinds)


@functools.cache
def tram_sections(specs: tuple[tuple[float, int, float], ...] = USUAL_TRAMS) -> tuple[Template, ...]:
    """Return tram sections of (nose, number of doors, height), 9 m long; a tram is several of them in a row."""
    sections = []
    for nose, doors, height in specs:
        mesh = coach_of(TRAIN, 1.22, 9.0, height, 0.28, doors=doors, nose=nose)
        mesh.box((-0.8, height, -2.6), (0.8, height + 0.27, 2.0), METAL, TRAIN, layer=3)
        mesh.capsule((0.0, 3.6, 0.4), (0.0, 4.3, -0.7), 0.035, TYRE, TRAIN, layer=4)
        mesh.capsule((0.0, 4.3, -0.7), (0.0, 4.9, 0.3), 0.035, TYRE, TRAIN, layer=4)
        mesh.capsule((-0.8, 4.9, 0.3), (0.8, 4.9, 0.3), 0.03, TYRE, TRAIN, layer=4)
        mesh.box((-1.2, 0.05, -3.4), (1.2, 0.3, 3.4), TYRE, TRAIN, sides="lxrf", layer=-1)
        sections.append(mesh.template())
    return tuple(sections)
