"""Visibility: objects are sorted back to front, and faces painted into a buffer of face numbers.

Objects are sorted by separating planes: A cannot hide B if a plane x = const or z = const between their boxes has A on
the far side from the camera. That is exact for disjoint boxes along the street, where sorting by distance is not.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from dgbench.streets.atlas import LEVELS, OFFSETS, PYRAMID, atlas
from dgbench.streets.camera import Faces, View
from dgbench.streets.mesh import COUNT, FLAGS, KIND, LAYER, SEE_THROUGH, SPRITE, TEX, Caster
from dgbench.streets.patterns import SIZE

Array = NDArray[np.float64]


def _object_order(faces: Faces, world: Array, owner: NDArray[np.int64], eye: float) -> NDArray[np.int64]:
    """Rank (objects,) of each object number, low = painted first; objects without a visible face rank 0."""
    ranks = np.zeros(int(owner.max()) + 1, np.int64)
    seen = owner[faces.source]
    numbers, first = np.unique(owner, return_index=True)
    # a scene lists its faces object by object, but instances and static objects are two runs: order by number first
    turned = np.argsort(owner, kind="stable")
    first = np.searchsorted(owner[turned], numbers)
    corners = world[turned]
    low = np.minimum.reduceat(np.minimum.reduce(corners, axis=1), first)
    high = np.maximum.reduceat(np.maximum.reduce(corners, axis=1), first)
    shown = np.unique(seen[seen > 0])
    at = np.searchsorted(numbers, shown)
    low, high = low[at], high[at]
    by = np.argsort(seen, kind="stable")
    begin = np.searchsorted(seen[by], shown)
    stop = np.searchsorted(seen[by], shown, side="right")
    left, right = faces.box[by, :2], faces.box[by, 2:]
    if not len(shown):
        return ranks
    count = int(stop[-1])
    box0 = np.minimum.reduceat(left[:count], begin)
    box1 = np.maximum.reduceat(right[:count], begin)

    x0, x1, z0, z1 = low[:, 0], high[:, 0], low[:, 2], high[:, 2]
    gap = 0.02
    # behind[a, b]: a lies beyond a plane that has b and the camera on its near side
    behind = z0[:, None] >= z1[None, :] - gap
    behind |= (x0[:, None] >= x1[None, :] - gap) & (x0[:, None] >= eye)
    behind |= (x1[:, None] <= x0[None, :] + gap) & (x1[:, None] <= eye)
    near = (z0 + z1) * 0.5
    before = behind & ~behind.T
    # overlapping boxes: the one whose middle is farther goes first
    before |= ~behind & ~behind.T & (near[:, None] > near[None, :])
    for axis in (0, 1):
        before &= (box0[:, None, axis] <= box1[None, :, axis]) & (box0[None, :, axis] <= box1[:, None, axis])
    np.fill_diagonal(before, False)
    parents: list[list[int]] = [[] for _ in range(len(shown))]
    for a, b in zip(*(index.tolist() for index in np.nonzero(before)), strict=True):
        parents[b].append(a)
    state, sequence = [0] * len(shown), []
    for root in np.argsort(-near, kind="stable").tolist():
        stack = [root]
        while stack:
            node = stack[-1]
            if state[node] == 0:
                state[node] = 1
                # a parent already open closes a cycle: leave that pair to the order of distance
                stack.extend(parent for parent in parents[node] if state[parent] == 0)
            else:
                stack.pop()
                if state[node] == 1:
                    state[node] = 2
                    sequence.append(node)
    ranks[shown[sequence]] = np.arange(1, len(sequence) + 1)
    return ranks


def paint(
    faces: Faces, world: Array, attributes: Array, owner: NDArray[np.int64], view: View
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return buffers (H, W) of the nearest face and of the face behind a see-through one (elsewhere undefined).

    Values are 1 + the face's row in `faces`; 0 is the sky.
    """
    rows = attributes[faces.source]
    rank = _object_order(faces, world, owner, view.x)[owner[faces.source]]
    ground = rank == 0
    depth = np.where(ground, 0.0, -faces.depth)
    sequence = np.lexsort((np.arange(len(rows)), depth, rows[:, LAYER], rank))
    front = np.zeros((view.rows, view.columns), np.int32)
    back = np.zeros_like(front)
    flags, counts, kinds = rows[:, FLAGS].astype(np.int64), rows[:, COUNT].astype(np.int64).tolist(), rows[:, KIND]
    special = ((flags & SEE_THROUGH) > 0) | (kinds == SPRITE)
    special = special.tolist()
    polygons, clipped, fill = faces.polygons, faces.clipped, cv2.fillConvexPoly
    for face in sequence.tolist():
        polygon = clipped.get(face)
        if polygon is None:
            polygon = polygons[face, : counts[face]]
        if special[face]:
            if kinds[face] == SPRITE:
                _stamp(front, polygon, face + 1, int(rows[face, TEX]))
                continue
            x0, y0, x1, y1 = (int(value) for value in np.clip(faces.box[face], -2, 1 << 15))
            window = (slice(max(y0 - 1, 0), max(y1 + 3, 0)), slice(max(x0 - 1, 0), max(x1 + 3, 0)))
            back[window] = front[window]
        fill(front, polygon, face + 1, cv2.LINE_8, 4)
    return front, back


def _stamp(front: NDArray[np.int32], polygon: NDArray[np.int32], face: int, tile: int) -> None:
    """Write `face` where the sprite's alpha is at least a half; the rectangle is in sixteenths of a pixel."""
    rows, columns = front.shape
    (left, bottom), (right, top) = polygon[0].tolist(), polygon[2].tolist()
    wide, high = max(right - left, 1), max(bottom - top, 1)
    x0, x1 = max((left + 15) >> 4, 0), min((right + 15) >> 4, columns)
    y0, y1 = max((top + 15) >> 4, 0), min((bottom + 15) >> 4, rows)
    if x0 >= x1 or y0 >= y1:
        return
    level = min(max((SIZE * 16 // max(wide, high)).bit_length() - 1, 0), LEVELS - 1)
    size = SIZE >> level
    start = tile * PYRAMID + OFFSETS[level]
    alpha = atlas().alpha[start : start + size * size].reshape(size, size)
    u = ((np.arange(x0, x1) * 16 - left) * size // wide).clip(0, size - 1)
    v = ((bottom - np.arange(y0, y1) * 16) * size // high).clip(0, size - 1)
    front[y0:y1, x0:x1][alpha[v[:, None], u[None, :]] >= 100] = face


def shadows(
    casters: list[Caster], view: View, sun: tuple[float, float, float] | None
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return masks (H, W) in 0 / 255 of sun shadow and contact shadow as they would fall on flat ground.

    `sun` points to the sun (x, y, z); None when the sky is overcast and nothing casts a sharp shadow.
    """
    cast, contact = np.zeros((view.rows, view.columns), np.uint8), np.zeros((view.rows, view.columns), np.uint8)
    corners: list[list[tuple[float, float, float]]] = []
    kinds: list[bool] = []
    for caster in casters:
        if max(z for _, z in caster.corners) < 0.5:
            continue
        low = [(x, 0.0, z) for x, z in caster.corners]
        if caster.contact:
            cx = sum(x for x, _ in caster.corners) * 0.25
            cz = sum(z for _, z in caster.corners) * 0.25
            corners.append([(cx + (x - cx) * 1.12, 0.0, cz + (z - cz) * 1.06) for x, z in caster.corners] * 2)
            kinds.append(True)
        if sun is not None:
            a, b = caster.base / sun[1], caster.height / sun[1]
            corners.append(
                [(x - sun[0] * a, 0.0, z - sun[2] * a) for x, _, z in low]
                + [(x - sun[0] * b, 0.0, z - sun[2] * b) for x, _, z in low]
            )
            kinds.append(False)
    if not corners:
        return cast, contact
    points = view.to_camera(np.array(corners))
    # points behind the camera are pulled to just in front of it: their shadow leaves the image below anyway
    points[..., 2] = np.maximum(points[..., 2], 0.4)
    screen = np.floor(np.clip(view.to_screen(points), -8000.0, 8000.0) * 16.0 + 0.5).astype(np.int32)
    for polygon, touching in zip(screen, kinds, strict=True):
        hull = polygon[:4] if touching else cv2.convexHull(polygon)
        cv2.fillConvexPoly(contact if touching else cast, hull, 255, cv2.LINE_8, 4)
    return cast, contact
