"""The pinhole camera: world faces to screen polygons, and for each face the planes that give depth and uv.

In camera axes (x right, y up, z forward) a plane n·X = d seen through pixel ray r has 1/z = (n·r)/d, which is linear
in the pixel; u/z and v/z are linear too. So a face is nine numbers, and depth and texture coordinates are exact per
pixel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dgbench.streets.dice import turn
from dgbench.streets.mesh import (
    BLUNT,
    CAPSULE,
    COUNT,
    FLAGS,
    KIND,
    PLANE,
    PU,
    PV,
    R0,
    R1,
    SPRITE,
    TWO_SIDED,
    WORLD_UV,
)

Array = NDArray[np.float64]

NEAR = 0.25  # metres
GUARD = 3.0  # polygons are clipped where |x| or |y| exceeds this many image widths, to keep fixed-point coordinates small


@dataclass(frozen=True, slots=True)
class Pose:
    """Position and orientation of the camera. `focal` is in widths of a 2:1 image; degrees, pitch down is positive."""

    x: float
    height: float
    yaw: float
    pitch: float
    roll: float
    focal: float


@dataclass(frozen=True)
class Faces:
    """Faces on screen. Rows of `planes`: 1/z, u/z, v/z, each as (per x, per y, constant) of the pixel index."""

    source: NDArray[np.int64]  # (V,) row in the scene's arrays
    polygons: NDArray[np.int32]  # (V, 10, 2) in sixteenths of a pixel
    clipped: dict[int, NDArray[np.int32]]  # face -> its polygon where clipping changed the number of corners
    box: Array  # (V, 4) x0, y0, x1, y1 in pixels
    depth: Array  # (V,) mean z
    planes: Array  # (9, V)
    normal: Array  # (V, 3) world axes, towards the viewer
    centre: Array  # (V, 3) mean corner, world


class View:
    """A pose at an image size. Wider or narrower images than 2:1 show more of the sides or less; none is distorted."""

    def __init__(self, pose: Pose, size: tuple[int, int]) -> None:
        self.rows, self.columns = size
        self.focal = pose.focal * max(self.columns, 2 * self.rows)
        self.x, self.height = pose.x, pose.height
        (cy, sy), (cp, sp), (cr, sr) = turn(pose.yaw), turn(pose.pitch), turn(pose.roll)
        right, up, ahead = (cy, 0.0, -sy), (sy * sp, cp, cy * sp), (sy * cp, -sp, cy * cp)
        self.right = tuple(cr * a + sr * b for a, b in zip(right, up, strict=True))
        self.up = tuple(cr * b - sr * a for a, b in zip(right, up, strict=True))
        self.ahead = ahead
        self.centre = (self.columns / 2.0, self.rows / 2.0)

    def to_camera(self, world: Array) -> Array:
        """Return (..., 3) world points in camera axes. Sums are written out: a matrix product may round differently."""
        x, y, z = world[..., 0] - self.x, world[..., 1] - self.height, world[..., 2]
        return np.stack([x * axis[0] + y * axis[1] + z * axis[2] for axis in (self.right, self.up, self.ahead)], axis=-1)

    def to_screen(self, points: Array) -> Array:
        """Project (..., 3) camera points with z > 0 to (..., 2) pixel indices (a pixel's centre is a whole number)."""
        scale = self.focal / points[..., 2]
        return np.stack([self.centre[0] - 0.5 + points[..., 0] * scale, self.centre[1] - 0.5 - points[..., 1] * scale], axis=-1)

    def faces(self, world: Array, attributes: Array) -> Faces:
        """Project, cull and clip all faces of a scene: world (F, 10, 3), attributes (F, 15)."""
        points = self.to_camera(world)
        depth = points[:, :, 2]
        kind = attributes[:, KIND]
        nearest, farthest = np.minimum.reduce(depth, axis=1), np.maximum.reduce(depth, axis=1)
        flat = kind == PLANE
        wanted = np.where(flat, farthest > NEAR, nearest > 1.2)
        normal, offset = _normals(points)
        two_sided = (attributes[:, FLAGS].astype(np.int64) & TWO_SIDED) > 0
        wanted &= ~flat | (offset > 1e-4) | (two_sided & (offset < -1e-4))
        keep = np.flatnonzero(wanted)
        points, attributes, kind, world = points[keep], attributes[keep], kind[keep], world[keep]
        normal, offset = normal[keep], offset[keep]

        screen = self.to_screen(np.concatenate([points[..., :2], np.maximum(points[..., 2:], NEAR)], axis=-1))
        planes = np.zeros((9, len(keep)))
        self._plane_uv(points, world, attributes, normal, offset, planes)
        self._facing_uv(points, screen, attributes, planes)
        crossing = (kind == PLANE) & (
            (nearest[keep] < NEAR) | (np.maximum.reduce(np.abs(screen).reshape(len(keep), -1), axis=1) > GUARD * self.columns)
        )
        clipped: dict[int, Array] = {}
        low, high = np.minimum.reduce(screen, axis=1), np.maximum.reduce(screen, axis=1)
        for face in np.flatnonzero(crossing):
            polygon = self._clip(points[face, : int(attributes[face, COUNT])].tolist())
            if len(polygon) >= 3:
                clipped[int(face)] = self.to_screen(np.array(polygon))
                low[face] = np.minimum.reduce(clipped[int(face)], axis=0)
                high[face] = np.maximum.reduce(clipped[int(face)], axis=0)
            else:
                low[face], high[face] = 1e9, -1e9
        extent = high - low
        shown = (
            (high[:, 0] > -0.5)
            & (high[:, 1] > -0.5)
            & (low[:, 0] < self.columns - 0.5)
            & (low[:, 1] < self.rows - 0.5)
            & (np.maximum(extent[:, 0], extent[:, 1]) > 0.4)
        )
        visible = np.flatnonzero(shown)
        place = {int(face): row for row, face in enumerate(visible) if int(face) in clipped}
        toward = np.where((offset > 0)[:, None], -1.0, 1.0) * normal
        facing = kind != PLANE
        toward[facing] = (0.0, 0.35, -0.9)
        rotated = np.stack(
            [toward[:, 0] * self.right[k] + toward[:, 1] * self.up[k] + toward[:, 2] * self.ahead[k] for k in range(3)],
            axis=-1,
        )
        return Faces(
            keep[visible],
            _fixed(screen[visible]),
            {place[face]: _fixed(clipped[face]) for face in place},
            np.concatenate([low, high], axis=1)[visible],
            (points[:, 0, 2] + points[:, 2, 2])[visible] * 0.5,
            planes[:, visible],
            rotated[visible],
            ((world[:, 0] + world[:, 2]) * 0.5)[visible],
        )

    def _linear(self, vector: Array) -> tuple[Array, Array, Array]:
        """Return vector·ray as (per column, per row, constant) of the pixel index."""
        a, b = vector[:, 0] / self.focal, -vector[:, 1] / self.focal
        return a, b, vector[:, 2] + a * (0.5 - self.centre[0]) + b * (0.5 - self.centre[1])

    def _plane_uv(self, points: Array, world: Array, attributes: Array, normal: Array, offset: Array, planes: Array) -> None:
        flat = np.flatnonzero(attributes[:, KIND] == PLANE)
        p, n, d = points[flat], normal[flat], offset[flat]
        origin = p[:, 0]
        edge = p[:, 1] - origin
        length = _length(edge)
        across = edge / length[:, None]
        # normals point away from the viewer here, so n × u points up the face
        upward = np.stack(_cross(n, across), axis=-1)
        rise = np.maximum.reduce(
            (p[:, :, 0] - origin[:, None, 0]) * upward[:, None, 0]
            + (p[:, :, 1] - origin[:, None, 1]) * upward[:, None, 1]
            + (p[:, :, 2] - origin[:, None, 2]) * upward[:, None, 2],
            axis=1,
        )
        pu, pv = attributes[flat, PU], attributes[flat, PV]
        fit_u = np.maximum(np.floor(length / np.maximum(pu, 0.01) + 0.5), 1.0) / length
        fit_v = np.maximum(np.floor(rise / np.maximum(pv, 0.01) + 0.5), 1.0) / np.maximum(rise, 1e-3)
        scale_u = np.where(pu > 0, fit_u, 1.0 / length)
        scale_v = np.where(pv > 0, fit_v, 1.0 / np.maximum(rise, 1e-3))
        ground = (attributes[flat, FLAGS].astype(np.int64) & WORLD_UV) > 0
        east, north = (
            np.array([a[0] for a in (self.right, self.up, self.ahead)]),
            np.array([a[2] for a in (self.right, self.up, self.ahead)]),
        )
        across, upward = np.where(ground[:, None], east, across), np.where(ground[:, None], north, upward)
        scale_u, scale_v = (
            np.where(ground, 1.0 / np.maximum(pu, 0.01), scale_u),
            np.where(ground, 1.0 / np.maximum(pv, 0.01), scale_v),
        )
        start_u = np.where(ground, -self.x, _dot(origin, across))
        start_v = np.where(ground, 0.0, _dot(origin, upward))
        w = self._linear(n / d[:, None])
        for row, axis, scale, start in ((3, across, scale_u, start_u), (6, upward, scale_v, start_v)):
            for k, part in enumerate(self._linear(axis)):
                planes[row + k, flat] = (part - start * w[k]) * scale
        for k in range(3):
            planes[k, flat] = w[k]

    def _facing_uv(self, points: Array, screen: Array, attributes: Array, planes: Array) -> None:
        """Project capsules and sprites: screen polygons (into `screen`), constant depth, u across and v along."""
        kind = attributes[:, KIND]
        for which in (CAPSULE, SPRITE):
            rows = np.flatnonzero(kind == which)
            if not len(rows):
                continue
            z0, z1 = points[rows, 0, 2], points[rows, 1, 2]
            start, end = screen[rows, 0], screen[rows, 1]
            r0, r1 = attributes[rows, R0] * self.focal / z0, attributes[rows, R1] * self.focal / z1
            along = end - start
            span = _length(along)
            if which == SPRITE:
                ux, uy = np.zeros_like(r0), -np.ones_like(r0)
                half = r0
                screen[rows] = start[:, None, :]
                for corner, (a, b) in enumerate(((-1.0, 1.0), (1.0, 1.0), (1.0, -1.0), (-1.0, -1.0))):
                    screen[rows, corner, 0] = start[:, 0] + a * r0
                    screen[rows, corner, 1] = start[:, 1] + b * r1
                screen[rows, 4:] = screen[rows, 3:4]
                base, per = start + np.stack([np.zeros_like(r1), r1], axis=-1), 0.5 / r1
            else:
                # a capsule seen end-on is a disc: any direction will do
                ux = np.where(span > 0.01, along[:, 0] / np.maximum(span, 0.01), 0.0)
                uy = np.where(span > 0.01, along[:, 1] / np.maximum(span, 0.01), -1.0)
                half = np.maximum(np.maximum(r0, r1), 0.4)
                blunt = (attributes[rows, FLAGS].astype(np.int64) & BLUNT) > 0
                out, side = np.where(blunt, 0.0, 0.92), np.where(blunt, 1.0, 0.4)
                base = start
                metres = _length(points[rows, 1] - points[rows, 0])
                per = metres / np.maximum(span, 0.01) / attributes[rows, PV]
                for corner, (origin, radius, a, b) in enumerate(
                    (
                        (start, r0, 1.0, 0.0),
                        (start, r0, 1.0, -1.0),
                        (start, r0, -1.0, -1.0),
                        (start, r0, -1.0, 0.0),
                        (end, r1, -1.0, 0.0),
                        (end, r1, -1.0, 1.0),
                        (end, r1, 1.0, 1.0),
                        (end, r1, 1.0, 0.0),
                    )
                ):
                    across = np.where(b != 0.0, side, 1.0) * a
                    forth = b * out
                    screen[rows, corner, 0] = origin[:, 0] + radius * (-uy * across + ux * forth)
                    screen[rows, corner, 1] = origin[:, 1] + radius * (ux * across + uy * forth)
                screen[rows, 8:] = screen[rows, 7:8]
            w = 2.0 / (z0 + z1)
            planes[2, rows] = w
            # u runs to the right of the capsule's direction on screen, v along it
            planes[3, rows], planes[4, rows] = -uy * w * 0.5 / half, ux * w * 0.5 / half
            planes[5, rows] = w * 0.5 - start[:, 0] * planes[3, rows] - start[:, 1] * planes[4, rows]
            planes[6, rows], planes[7, rows] = ux * w * per, uy * w * per
            planes[8, rows] = -base[:, 0] * planes[6, rows] - base[:, 1] * planes[7, rows]

    def _clip(self, polygon: list[list[float]]) -> list[list[float]]:
        """Clip by Sutherland and Hodgman against the near plane and a guard band around the image."""
        limit = GUARD * self.columns / self.focal
        for a, b, c, d in (
            (0.0, 0.0, 1.0, -NEAR),
            (1.0, 0.0, limit, 0.0),
            (-1.0, 0.0, limit, 0.0),
            (0.0, 1.0, limit, 0.0),
            (0.0, -1.0, limit, 0.0),
        ):
            result: list[list[float]] = []
            for k, point in enumerate(polygon):
                before = polygon[k - 1]
                here = a * point[0] + b * point[1] + c * point[2] + d
                there = a * before[0] + b * before[1] + c * before[2] + d
                if (here >= 0.0) != (there >= 0.0):
                    t = there / (there - here)
                    result.append([before[i] + (point[i] - before[i]) * t for i in range(3)])
                if here >= 0.0:
                    result.append(point)
            polygon = result
        return polygon


def _fixed(screen: Array) -> NDArray[np.int32]:
    """Return sixteenths of a pixel, rounded here so that the rasteriser only receives whole numbers."""
    return np.floor(np.clip(screen, -30000.0, 30000.0) * 16.0 + 0.5).astype(np.int32)


def _dot(a: Array, b: Array) -> Array:
    return a[..., 0] * b[..., 0] + a[..., 1] * b[..., 1] + a[..., 2] * b[..., 2]


def _cross(a: Array, b: Array) -> tuple[Array, Array, Array]:
    return (
        a[..., 1] * b[..., 2] - a[..., 2] * b[..., 1],
        a[..., 2] * b[..., 0] - a[..., 0] * b[..., 2],
        a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0],
    )


def _length(vector: Array) -> Array:
    total = vector[..., 0] * vector[..., 0] + vector[..., 1] * vector[..., 1]
    if vector.shape[-1] == 3:
        total = total + vector[..., 2] * vector[..., 2]
    return np.maximum(np.sqrt(total), 1e-9)


def _normals(points: Array) -> tuple[Array, Array]:
    """Return unit normals (F, 3) and offsets (F,) of planes through the first three corners; offset > 0 faces the camera."""
    a, b = points[:, 1] - points[:, 0], points[:, 2] - points[:, 0]
    normal = np.stack(_cross(a, b), axis=-1)
    normal = normal / _length(normal)[:, None]
    return normal, _dot(normal, points[:, 0])
