"""What a camera sees of a scene: kinds of objects with their numbers and places in the image or a part of it.

Visibility is the renderer's own: an object counts if it is the nearest one on enough pixels at `SIZE`. No mask leaves this
module, only counts and rough places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dgbench.streets.mesh import CLASS
from dgbench.streets.render import Painted

SIZE = (128, 256)  # (H, W) at which pixels are counted, whatever size is rendered
Box = tuple[float, float, float, float]  # top, left, height, width, as fractions of the image
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)

_SKY, _RIDER, _TRUCK, _TRAIN, _MOTORCYCLE, _BICYCLE = 10, 12, 14, 16, 17, 18
_STUFF = {0: "road", 1: "sidewalk", 8: "vegetation", 9: "terrain", 10: "sky"}
_THINGS = {
    2: "building",
    3: "wall",
    4: "fence",
    5: "pole",
    6: "traffic light",
    7: "traffic sign",
    11: "person",
    12: "rider",
    13: "car",
    14: "truck",
    15: "bus",
    16: "train",
    17: "motorcycle",
    18: "bicycle",
}
_PIXELS = {0: 48, 1: 40, 2: 24, 5: 8, 6: 6, 7: 6, 8: 40, 9: 40, 10: 48, 11: 10, 12: 8, 17: 10, 18: 10}  # from which it is seen
_USUAL = 14


@dataclass(frozen=True, slots=True)
class Seen:
    """One kind of thing in a part of the image."""

    kind: str  # a class's name, or "cyclist" or "motorcyclist" for riders whose machine is seen too
    count: int  # of objects; 1 for road, sidewalk, terrain, vegetation and sky
    share: float  # of the part's pixels, 0..1
    left: float  # share of its pixels in the left third of the part
    right: float
    depth: float  # metres to the nearest one


@dataclass(frozen=True)
class Sight:
    """Which object and class each pixel shows, at `SIZE`."""

    units: NDArray[np.int64]  # (H, W) row of the columns below
    kinds: NDArray[np.int64]  # class
    owners: NDArray[np.int64]  # object
    depths: NDArray[np.float64]  # metres to its nearest face
    ridden: Mapping[int, str]  # two-wheelers with a rider: "cyclist" or "motorcyclist"

    def within(self, box: Box = WHOLE) -> list[Seen]:
        """Return what is seen in a part of the image, the largest first; there is always something."""
        top, left, bottom, right = pixels_of(box)
        part = self.units[top:bottom, left:right]
        size, number, wide = part.size, len(self.kinds), part.shape[1]
        counts = np.bincount(part.reshape(-1), minlength=number)
        third = wide // 3
        lefts = np.bincount(part[:, :third].reshape(-1), minlength=number)
        rights = np.bincount(part[:, wide - third :].reshape(-1), minlength=number)
        found: dict[str, list[float]] = {}
        objects: dict[str, set[int]] = {}
        shown = np.flatnonzero(counts).tolist()
        stuff: dict[int, int] = {}
        for unit in shown:
            stuff[int(self.kinds[unit])] = stuff.get(int(self.kinds[unit]), 0) + int(counts[unit])

        def enough(unit: int) -> bool:
            # many bushes make vegetation, so that stuff is measured as a whole
            at = int(self.kinds[unit])
            pixels = stuff[at] if at in _STUFF else int(counts[unit])
            return pixels >= min(_PIXELS.get(at, _USUAL), max(4, size // 25))

        shown = [unit for unit in shown if enough(unit)] or [max(shown, key=lambda unit: int(counts[unit]))]
        machines = {int(self.owners[unit]) for unit in shown if self.kinds[unit] in (_MOTORCYCLE, _BICYCLE)}
        for unit in shown:
            at, owner = int(self.kinds[unit]), int(self.owners[unit])
            kind = _STUFF.get(at) or _THINGS[at]
            if at == _RIDER and owner in machines:
                kind = self.ridden[owner]
            row = found.setdefault(kind, [0.0, 0.0, 0.0, 1e9])
            for k, count in enumerate((counts[unit], lefts[unit], rights[unit])):
                row[k] += float(count)
            row[3] = min(row[3], float(self.depths[unit]))
            objects.setdefault(kind, set()).add(0 if at in _STUFF else owner)
        seen = [
            Seen(kind, len(objects[kind]), pixels / size, left / pixels, right / pixels, depth)
            for kind, (pixels, left, right, depth) in found.items()
        ]
        return sorted(seen, key=lambda one: (-one.share, one.kind))


def pixels_of(box: Box) -> tuple[int, int, int, int]:
    """Return (top, left, bottom, right) of a part of the image in pixels at `SIZE`, at least one wide and high.

    Raises: ValueError for a box that is empty or reaches out of the image.
    """
    top, left, height, width = box
    # sums of single-precision numbers may exceed 1 by their last bit
    inside = min(top, left) >= 0.0 and min(height, width) > 0.0 and max(top + height, left + width) <= 1.0 + 1e-6
    if not inside:
        raise ValueError(f"box must be (top, left, height, width) in fractions of the image, within 0..1, got {box}")
    rows, columns = SIZE
    y, x = min(round(top * rows), rows - 1), min(round(left * columns), columns - 1)
    return y, x, max(y + 1, min(round((top + height) * rows), rows)), max(x + 1, min(round((left + width) * columns), columns))


def sight(seen: Painted) -> Sight:
    """Return the sight of a scene that was painted at `SIZE`."""
    classes = seen.attributes[:, CLASS].astype(np.int64)
    owner = _whole_vehicles(seen.owner, classes)
    source = seen.faces.source
    code = owner[source] * 32 + classes[source]
    codes, unit = np.unique(code, return_inverse=True)
    depths = np.full(len(codes), 1e9)
    np.minimum.at(depths, unit, seen.faces.depth)
    table = np.concatenate([[len(codes)], unit])  # the sky comes last
    return Sight(
        table[seen.front],
        np.concatenate([codes % 32, [_SKY]]),
        np.concatenate([codes // 32, [-1]]),
        np.concatenate([depths, [1e9]]),
        _ridden(owner, classes),
    )


def _whole_vehicles(owner: NDArray[np.int64], classes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return object numbers in which a truck's two parts, and the sections of a tram, are one object."""
    merged = owner.copy()
    trucks = np.unique(owner[classes == _TRUCK])
    for load, cab in zip(trucks[::2].tolist(), trucks[1::2].tolist(), strict=True):
        merged[owner == cab] = load
    if len(trams := owner[classes == _TRAIN]):
        merged[classes == _TRAIN] = trams.min()
    return merged


def _ridden(owner: NDArray[np.int64], classes: NDArray[np.int64]) -> dict[int, str]:
    riders = np.unique(owner[classes == _RIDER])
    bicycles = set(np.unique(owner[classes == _BICYCLE]).tolist())
    return {one: "cyclist" if one in bicycles else "motorcyclist" for one in riders.tolist()}
