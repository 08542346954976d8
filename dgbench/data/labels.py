"""The 19 evaluated classes, their palette, and the label maps that lead to them.

A label map is a look-up table of 256 bytes from the value stored in a label file to a train id, 255 = ignored. A value
that the map does not list is an error of the file, never silently "ignored": wrong label files are the field's most
common cause of meaningless scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

IGNORE = 255


@dataclass(frozen=True, slots=True)
class SegClass:
    name: str
    label_id: int  # Cityscapes labelId (cityscapesScripts, labels.py)
    color: tuple[int, int, int]  # RGB


CLASSES: tuple[SegClass, ...] = (
    SegClass("road", 7, (128, 64, 128)),
    SegClass("sidewalk", 8, (244, 35, 232)),
    SegClass("building", 11, (70, 70, 70)),
    SegClass("wall", 12, (102, 102, 156)),
    SegClass("fence", 13, (190, 153, 153)),
    SegClass("pole", 17, (153, 153, 153)),
    SegClass("traffic light", 19, (250, 170, 30)),
    SegClass("traffic sign", 20, (220, 220, 0)),
    SegClass("vegetation", 21, (107, 142, 35)),
    SegClass("terrain", 22, (152, 251, 152)),
    SegClass("sky", 23, (70, 130, 180)),
    SegClass("person", 24, (220, 20, 60)),
    SegClass("rider", 25, (255, 0, 0)),
    SegClass("car", 26, (0, 0, 142)),
    SegClass("truck", 27, (0, 0, 70)),
    SegClass("bus", 28, (0, 60, 100)),
    SegClass("train", 31, (0, 80, 100)),
    SegClass("motorcycle", 32, (0, 0, 230)),
    SegClass("bicycle", 33, (119, 11, 32)),
)
NAMES: tuple[str, ...] = tuple(c.name for c in CLASSES)


@dataclass(frozen=True)
class LabelMap:
    """From stored values to train ids. `ignored` are values that are allowed and count as ignore."""

    name: str
    classes: dict[int, int]  # stored value -> train id
    ignored: frozenset[int]

    @cached_property
    def table(self) -> NDArray[np.uint8]:
        """(256,) uint8: train id, or 255."""
        table = np.full(256, IGNORE, np.uint8)
        for value, train_id in self.classes.items():
            table[value] = train_id
        return table

    @cached_property
    def known(self) -> NDArray[np.bool_]:
        """(256,) bool: values a label file may hold."""
        known = np.zeros(256, bool)
        known[[*self.classes, *self.ignored]] = True
        return known


def _map(name: str, classes: dict[int, int], ignored: range | set[int]) -> LabelMap:
    return LabelMap(name, classes, frozenset(ignored) - set(classes) | {IGNORE})


# Mapillary Vistas v1.2 ids, in the three versions in use; scores under two of them do not compare.
_VISTAS_ROBUSTNET = {
    13: 0, 24: 0, 41: 0, 2: 1, 15: 1, 17: 2, 6: 3, 3: 4, 45: 5, 47: 5, 48: 6, 50: 7, 30: 8, 29: 9, 27: 10, 19: 11,
    20: 12, 21: 12, 22: 12, 55: 13, 61: 14, 54: 15, 58: 16, 57: 17, 52: 18,
}  # fmt: skip
_VISTAS_OPENSEG = {k: v for k, v in _VISTAS_ROBUSTNET.items() if k != 41} | {
    7: 0, 8: 0, 10: 0, 14: 0, 23: 0, 9: 1, 11: 1, 44: 5, 46: 7, 49: 7,
}  # fmt: skip

_VISTAS_WD2 = {k: v for k, v in _VISTAS_ROBUSTNET.items() if k != 58} | {
    23: 0, 8: 0, 7: 0, 14: 0, 43: 0, 36: 0, 12: 0, 11: 0, 9: 1, 5: 3, 46: 5,
}  # fmt: skip

LABEL_MAPS: dict[str, LabelMap] = {
    m.name: m
    for m in (
        _map("train-ids", {i: i for i in range(19)}, set()),
        _map("cityscapes-ids", {c.label_id: i for i, c in enumerate(CLASSES)}, range(34)),
        # GTA5 uses Cityscapes' ids; 34 (licence plate) occurs in some of its files
        _map("gta5-ids", {c.label_id: i for i, c in enumerate(CLASSES)}, range(35)),
        _map("mapillary-robustnet", _VISTAS_ROBUSTNET, range(66)),
        _map("mapillary-openseg", _VISTAS_OPENSEG, range(66)),
        _map("mapillary-wd2-policy", _VISTAS_WD2, range(66)),
    )
}


def palette() -> NDArray[np.uint8]:
    """(256, 3) RGB by train id; ignored pixels are black."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(CLASSES)] = [c.color for c in CLASSES]
    return table
