"""The 19 evaluated classes, their palette, and the label maps to them.

A label map assigns a train id to each value stored in a label file, 255 = ignored. A value that the map does not list is
an error of the file, and not ignored silently: wrong label files are a common cause of meaningless scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dgbench.errors import DataError, unknown

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
    """A map from stored values to train ids. `ignored` are values that are allowed and count as ignore."""

    name: str
    classes: Mapping[int, int]  # stored value, 0..65535 -> train id
    ignored: frozenset[int]
    names: Mapping[str, int] = field(default_factory=dict)  # name -> stored value, where files hold names (IDD's polygons)

    @cached_property
    def table(self) -> NDArray[np.uint8]:
        """(256,) uint8, or (65536,) where values exceed a byte: train id, or 255."""
        table = np.full(self._length, IGNORE, np.uint8)
        for value, train_id in self.classes.items():
            table[value] = train_id
        return table

    @cached_property
    def known(self) -> NDArray[np.bool_]:
        """Like `table`, bool: values that a label file may hold."""
        known = np.zeros(self._length, bool)
        known[[*self.classes, *self.ignored]] = True
        return known

    @property
    def _length(self) -> int:
        return 256 if max((*self.classes, *self.ignored), default=0) < 256 else 65536

    def strangers(self, values: Iterable[int]) -> list[int]:
        """Return the stored values that are not in the map."""
        return [v for v in values if v >= self._length or not self.known[v]]

    def stored(self, train_id: int) -> int:
        """Return the smallest value that maps to a train id, 255 for ignored; inverts the map for writing files.

        Raises: DataError where the map has no value for that class (SYNTHIA has no terrain).
        """
        if train_id == IGNORE:
            return min(self.ignored)
        values = [value for value, mapped in self.classes.items() if mapped == train_id]
        if not values:
            raise DataError(f"the label map `{self.name}` has no value for class {train_id}, {NAMES[train_id]}")
        return min(values)


def _map(name: str, classes: Mapping[int, int], ignored: Iterable[int] = (), names: Mapping[str, int] | None = None) -> LabelMap:
    return LabelMap(name, classes, frozenset(ignored) - set(classes) | {IGNORE}, names or {})


_TRAIN_IDS = {i: i for i in range(19)}
_LABEL_IDS = {c.label_id: i for i, c in enumerate(CLASSES)}

_SYNTHIA = {
    3: 0,
    4: 1,
    2: 2,
    21: 3,
    5: 4,
    7: 5,
    15: 6,
    9: 7,
    6: 8,
    16: 9,
    1: 10,
    10: 11,
    17: 12,
    8: 13,
    18: 14,
    19: 15,
    20: 16,
    12: 17,
    11: 18,
}

# Mapillary Vistas v1.2 ids, in the three versions in use; scores under two of them are not comparable.
_VISTAS_ROBUSTNET = {
    13: 0,
    24: 0,
    41: 0,
    2: 1,
    15: 1,
    17: 2,
    6: 3,
    3: 4,
    45: 5,
    47: 5,
    48: 6,
    50: 7,
    30: 8,
    29: 9,
    27: 10,
    19: 11,
    20: 12,
    21: 12,
    22: 12,
    55: 13,
    61: 14,
    54: 15,
    58: 16,
    57: 17,
    52: 18,
}
_VISTAS_OPENSEG = {k: v for k, v in _VISTAS_ROBUSTNET.items() if k != 41} | {
    7: 0,
    8: 0,
    10: 0,
    14: 0,
    23: 0,
    9: 1,
    11: 1,
    44: 5,
    46: 7,
    49: 7,
}
_VISTAS_WD2 = {k: v for k, v in _VISTAS_ROBUSTNET.items() if k != 58} | {
    23: 0,
    8: 0,
    7: 0,
    14: 0,
    43: 0,
    36: 0,
    12: 0,
    11: 0,
    9: 1,
    5: 3,
    46: 5,
}

# IDD's own ids are the indices in this list (AutoNUE, anue_labels.py)
_IDD_NAMES = (
    "road",
    "parking",
    "drivable fallback",
    "sidewalk",
    "rail track",
    "non-drivable fallback",
    "person",
    "animal",
    "rider",
    "motorcycle",
    "bicycle",
    "autorickshaw",
    "car",
    "truck",
    "bus",
    "caravan",
    "trailer",
    "train",
    "vehicle fallback",
    "curb",
    "wall",
    "fence",
    "guard rail",
    "billboard",
    "traffic sign",
    "traffic light",
    "pole",
    "polegroup",
    "obs-str-bar-fallback",
    "building",
    "bridge",
    "tunnel",
    "vegetation",
    "sky",
    "fallback background",
    "unlabeled",
    "ego vehicle",
    "rectification border",
    "out of roi",
    "license plate",
)
_IDD_VALUES = {name: value for value, name in enumerate(_IDD_NAMES)}
_IDD = {_IDD_VALUES[c.name]: i for i, c in enumerate(CLASSES) if c.name in _IDD_VALUES}
# 26 merged ids: animals are persons, groups of poles are poles, fallback background is sky; terrain and train cannot be told
_IDD_LEVEL3 = {
    0: 0,
    2: 1,
    22: 2,
    14: 3,
    15: 4,
    20: 5,
    19: 6,
    18: 7,
    24: 8,
    25: 10,
    4: 11,
    5: 12,
    9: 13,
    10: 14,
    11: 15,
    6: 17,
    7: 18,
}

# WildDash2's unified label policy (Zendel et al., CVPR 2022); 0..33 are Cityscapes' ids but for "on rails", 31
_WILDDASH2 = {k: v for k, v in _LABEL_IDS.items() if k != 31} | {
    38: 0,
    41: 0,
    43: 0,
    61: 0,
    64: 0,
    70: 0,
    74: 0,
    75: 0,
    76: 0,
    79: 0,
    52: 1,
    65: 1,
    77: 1,
    80: 1,
    56: 3,
    45: 5,
    46: 5,
    78: 9,
    47: 12,
    48: 12,
    49: 12,
    35: 13,
    34: 14,
    58: 17,
}

LABEL_MAPS: dict[str, LabelMap] = {
    m.name: m
    for m in (
        _map("train-ids", _TRAIN_IDS),
        _map("cityscapes-ids", _LABEL_IDS, range(34)),
        # GTA5 uses Cityscapes' ids; 34 (licence plate) occurs in some of its files
        _map("gta5-ids", _LABEL_IDS, range(35)),
        _map("synthia-ids", _SYNTHIA, range(23)),
        # train ids with more than one value for classes that are not evaluated
        _map("urbansyn-ids", _TRAIN_IDS, range(19, 256)),
        _map("mapillary-robustnet", _VISTAS_ROBUSTNET, range(66)),
        _map("mapillary-openseg", _VISTAS_OPENSEG, range(66)),
        _map("mapillary-wd2-policy", _VISTAS_WD2, range(66)),
        # AutoNUE takes non-drivable fallback for terrain, others ignore it
        _map("idd-autonue", _IDD | {5: 9}, range(40), _IDD_VALUES),
        _map("idd-no-terrain", _IDD, range(40), _IDD_VALUES),
        _map("idd-level3", _IDD_LEVEL3, range(26)),
        _map("wilddash2-policy", _WILDDASH2, range(81)),
        _map("wilddash2-on-rails", _WILDDASH2 | {31: 16}, range(81)),
    )
}


def named(name: str) -> LabelMap:
    """Return the label map of this name.

    Raises: DataError naming the nearest one.
    """
    if name not in LABEL_MAPS:
        raise DataError(*unknown("label map", name, LABEL_MAPS))
    return LABEL_MAPS[name]


def palette() -> NDArray[np.uint8]:
    """Return (256, 3) RGB by train id; ignored pixels are black."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(CLASSES)] = [c.color for c in CLASSES]
    return table
