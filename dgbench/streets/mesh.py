"""Faces and scenes: the geometry of objects before projection.

World and object axes: x right, y up, z forward (away from the camera), metres. A face is one of three kinds: a planar
convex polygon, a capsule (a thick 3-D segment that always faces the camera) or a sprite (an upright cut-out of the
atlas). Polygons list their corners counter-clockwise as seen from outside, starting bottom left; the first edge is the
u axis of the texture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dgbench.streets.dice import turn

Point = tuple[float, float, float]
Colour = tuple[float, float, float]

CORNERS = 10  # of the largest polygon; smaller ones repeat their last corner
PLANE, CAPSULE, SPRITE = 0, 1, 2

# Bits of a face's flags.
TWO_SIDED, SEE_THROUGH, WORLD_UV, GROUND, BLUNT, SNOWY = 1, 2, 4, 8, 16, 32

# What a face emits; the strength depends on the weather.
DARK, HEADLIGHT, TAILLIGHT, WINDOW, LAMP, SIGNAL = 0, 1, 2, 3, 4, 5

KIND, COUNT, R0, R1, LAYER, SLOT, SLOT2, TEX, DETAIL, PU, PV, PD, CLASS, FLAGS, GLOW = range(15)


@dataclass(frozen=True)
class Template:
    """A finished mesh: corners (F, CORNERS, 3) and attributes (F, 15), columns `KIND` … `GLOW`."""

    corners: NDArray[np.float64]
    attributes: NDArray[np.float64]


class Mesh:
    """Faces under construction, as plain lists: cheap for the few hundred faces that are made for each scene."""

    def __init__(self) -> None:
        self.corners: list[list[Point]] = []
        self.attributes: list[tuple[float, ...]] = []

    def poly(
        self,
        points: Sequence[Point],
        slot: int,
        kind: int,
        *,
        tex: int = 0,
        slot2: int | None = None,
        detail: int = 0,
        period: tuple[float, float] = (0.0, 0.0),
        grain: float = 1.5,
        layer: int = 0,
        flags: int = 0,
        glow: int = DARK,
    ) -> None:
        """Add a planar convex polygon of class `kind`.

        `period` is metres per texture tile, rounded so that whole tiles fit the first edge; 0 = one tile fits the face.
        `slot`, `slot2`: colours that the texture mixes. `grain`: metres per tile of the fine `detail` texture.
        """
        corners = list(points)
        count = len(corners)
        corners.extend([corners[-1]] * (CORNERS - count))
        self.corners.append(corners)
        self.attributes.append(
            (
                PLANE,
                count,
                0.0,
                0.0,
                layer,
                slot,
                slot if slot2 is None else slot2,
                tex,
                detail,
                period[0],
                period[1],
                grain,
                kind,
                flags,
                glow,
            )
        )

    def capsule(
        self,
        start: Point,
        end: Point,
        radius: float,
        slot: int,
        kind: int,
        *,
        end_radius: float | None = None,
        tex: int = 0,
        slot2: int | None = None,
        period: float = 1.0,
        layer: int = 0,
        flags: int = 0,
        glow: int = DARK,
    ) -> None:
        """Add a thick segment; `flags=BLUNT` cuts its ends straight."""
        self.corners.append([start] + [end] * (CORNERS - 1))
        self.attributes.append(
            (
                CAPSULE,
                8,
                radius,
                radius if end_radius is None else end_radius,
                layer,
                slot,
                slot if slot2 is None else slot2,
                tex,
                0,
                1.0,
                period,
                1.0,
                kind,
                flags,
                glow,
            )
        )

    def sprite(
        self,
        centre: Point,
        half_width: float,
        half_height: float,
        slot: int,
        slot2: int,
        kind: int,
        *,
        tex: int,
        layer: int = 0,
        flags: int = 0,
    ) -> None:
        """Add an upright cut-out that faces the camera; its shape is the alpha of atlas tile `tex`."""
        self.corners.append([centre] * CORNERS)
        self.attributes.append((SPRITE, 4, half_width, half_height, layer, slot, slot2, tex, 0, 1.0, 1.0, 1.0, kind, flags, DARK))

    def box(
        self,
        low: Point,
        high: Point,
        slot: int,
        kind: int,
        *,
        sides: str = "rflxt",
        tex: int = 0,
        slot2: int | None = None,
        detail: int = 0,
        period: tuple[float, float] = (0.0, 0.0),
        layer: int = 0,
        flags: int = 0,
        glow: int = DARK,
    ) -> None:
        """Add an axis-aligned box. `sides`: r(ear, at low z) f(ront) l(eft) x (right) t(op) b(ottom)."""
        (x0, y0, z0), (x1, y1, z1) = low, high
        for side in sides:
            self.poly(
                {
                    "r": ((x0, y0, z0), (x1, y0, z0), (x1, y1, z0), (x0, y1, z0)),
                    "f": ((x1, y0, z1), (x0, y0, z1), (x0, y1, z1), (x1, y1, z1)),
                    "l": ((x0, y0, z1), (x0, y0, z0), (x0, y1, z0), (x0, y1, z1)),
                    "x": ((x1, y0, z0), (x1, y0, z1), (x1, y1, z1), (x1, y1, z0)),
                    "t": ((x0, y1, z0), (x1, y1, z0), (x1, y1, z1), (x0, y1, z1)),
                    "b": ((x0, y0, z1), (x1, y0, z1), (x1, y0, z0), (x0, y0, z0)),
                }[side],
                slot,
                kind,
                tex=tex,
                slot2=slot2,
                detail=detail,
                period=period,
                layer=layer,
                flags=flags,
                glow=glow,
            )

    def template(self) -> Template:
        return Template(
            np.array(self.corners, np.float64).reshape(-1, CORNERS, 3),
            np.array(self.attributes, np.float64).reshape(-1, 15),
        )


@dataclass(frozen=True, slots=True)
class Caster:
    """Something that darkens the ground: four footprint corners (x, z), its height, and how dark its contact is."""

    corners: tuple[tuple[float, float], ...]
    base: float
    height: float
    contact: bool


@dataclass(frozen=True, slots=True)
class Light:
    """A lamp of the night: position, colour, halo radius in metres, and whether it lights the ground below."""

    position: Point
    colour: Colour
    halo: float
    pool: bool


@dataclass
class Scene:
    """All objects of one image. Object 0 is the ground, painted first in the order of its layers."""

    static: Mesh = field(default_factory=Mesh)
    static_owner: list[int] = field(default_factory=list)
    palette: list[Colour] = field(default_factory=list)
    placed: list[tuple[Template, int]] = field(default_factory=list)
    poses: list[tuple[float, ...]] = field(default_factory=list)
    casters: list[Caster] = field(default_factory=list)
    lights: list[Light] = field(default_factory=list)
    objects: int = 1

    def colour(self, *colours: Colour) -> int:
        """Register colours (linear reflectance, 0..1) and return the slot of the first."""
        self.palette.extend(colours)
        return len(self.palette) - len(colours)

    def start(self) -> Mesh:
        """End the previous static object; faces added to the returned mesh from now on belong to a new one."""
        self.flush()
        self.objects += 1
        return self.static

    def flush(self) -> None:
        self.static_owner.extend([self.objects - 1] * (len(self.static.corners) - len(self.static_owner)))

    def place(
        self,
        template: Template,
        x: float,
        z: float,
        colours: Sequence[Colour],
        *,
        y: float = 0.0,
        heading: float = 0.0,
        scale: tuple[float, float, float] = (1.0, 1.0, 1.0),
    ) -> None:
        """Put an instance at (x, y, z), turned right by `heading` degrees; its slots are `colours`."""
        self.flush()
        cosine, sine = turn(heading)
        self.placed.append((template, self.objects))
        self.poses.append((x, y, z, cosine, sine, *scale, self.colour(*colours)))
        self.objects += 1

    def shadow(
        self,
        x: float,
        z: float,
        half_width: float,
        half_length: float,
        height: float,
        *,
        heading: float = 0.0,
        base: float = 0.0,
        contact: bool = True,
    ) -> None:
        """Register a rectangular footprint as a shadow caster."""
        c, s = turn(heading)
        corners = tuple(
            (x + a * half_width * c + b * half_length * s, z - a * half_width * s + b * half_length * c)
            for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))
        )
        self.casters.append(Caster(corners, base, height, contact))

    def arrays(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
        """Return world corners (F, CORNERS, 3), attributes (F, 15) with slots into `palette`, and owner (F,) of all faces."""
        self.flush()
        static = self.static.template()
        if not self.placed:
            return static.corners, static.attributes, np.array(self.static_owner, np.int64)
        counts = np.array([len(template.attributes) for template, _ in self.placed], np.int64)
        pose = np.repeat(np.array(self.poses, np.float64), counts, axis=0)
        local = np.concatenate([template.corners for template, _ in self.placed])
        attributes = np.concatenate([template.attributes for template, _ in self.placed])
        owner = np.repeat(np.array([owner for _, owner in self.placed], np.int64), counts)
        x, y, z, c, s, sx, sy, sz, slot = (column[:, None] for column in pose.T)
        a, b, d = local[..., 0] * sx, local[..., 1] * sy, local[..., 2] * sz
        world = np.stack([a * c + d * s + x, b + y, d * c - a * s + z], axis=-1)
        attributes[:, R0] *= pose[:, 5]
        attributes[:, R1] *= np.where(attributes[:, KIND] == SPRITE, pose[:, 6], pose[:, 5])
        attributes[:, SLOT] += slot[:, 0]
        attributes[:, SLOT2] += slot[:, 0]
        return (
            np.concatenate([static.corners, world]),
            np.concatenate([static.attributes, attributes]),
            np.concatenate([np.array(self.static_owner, np.int64), owner]),
        )
