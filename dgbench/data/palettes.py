"""Palettes of label files: the label of each entry.

A palette PNG stores indices and a colour for each. The label depends on who made the file: a data set that publishes
palette PNGs stores the label in the index and shows it by the colour; a program that saves a grey map in fewer bytes
(oxipng, optipng, pngquant, an editor) renumbers the grey values that occur, and keeps the label in the colour.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dgbench.data.labels import CLASSES, IGNORE, LabelMap
from dgbench.errors import DataError

Color = tuple[int, int, int]

BLACK: Color = (0, 0, 0)
# colours of Cityscapes' classes that are not evaluated (cityscapesScripts, labels.py); black is "unlabeled"
IGNORED_COLORS: tuple[Color, ...] = (
    BLACK,
    (111, 74, 0),
    (81, 0, 81),
    (250, 170, 160),
    (230, 150, 140),
    (180, 165, 180),
    (150, 100, 100),
    (150, 120, 90),
    (0, 0, 90),
    (0, 0, 110),
)

# Playing for Data, initLabels.m: Cityscapes' label ids, and 34 for licence plates. "static", black in cityscapesScripts, is
# (20, 20, 20) here.
_GTA5: tuple[Color, ...] = (
    BLACK,
    BLACK,
    BLACK,
    BLACK,
    (20, 20, 20),
    (111, 74, 0),
    (81, 0, 81),
    (128, 64, 128),
    (244, 35, 232),
    (250, 170, 160),
    (230, 150, 140),
    (70, 70, 70),
    (102, 102, 156),
    (190, 153, 153),
    (180, 165, 180),
    (150, 100, 100),
    (150, 120, 90),
    (153, 153, 153),
    (153, 153, 153),
    (250, 170, 30),
    (220, 220, 0),
    (107, 142, 35),
    (152, 251, 152),
    (70, 130, 180),
    (220, 20, 60),
    (255, 0, 0),
    (0, 0, 142),
    (0, 0, 70),
    (0, 60, 100),
    (0, 0, 90),
    (0, 0, 110),
    (0, 80, 100),
    (0, 0, 230),
    (119, 11, 32),
    (0, 0, 142),
)

# Mapillary Vistas v1.2, config.json
_VISTAS: tuple[Color, ...] = (
    (165, 42, 42),
    (0, 192, 0),
    (196, 196, 196),
    (190, 153, 153),
    (180, 165, 180),
    (90, 120, 150),
    (102, 102, 156),
    (128, 64, 255),
    (140, 140, 200),
    (170, 170, 170),
    (250, 170, 160),
    (96, 96, 96),
    (230, 150, 140),
    (128, 64, 128),
    (110, 110, 110),
    (244, 35, 232),
    (150, 100, 100),
    (70, 70, 70),
    (150, 120, 90),
    (220, 20, 60),
    (255, 0, 0),
    (255, 0, 100),
    (255, 0, 200),
    (200, 128, 128),
    (255, 255, 255),
    (64, 170, 64),
    (230, 160, 50),
    (70, 130, 180),
    (190, 255, 255),
    (152, 251, 152),
    (107, 142, 35),
    (0, 170, 30),
    (255, 255, 128),
    (250, 0, 30),
    (100, 140, 180),
    (220, 220, 220),
    (220, 128, 128),
    (222, 40, 40),
    (100, 170, 30),
    (40, 40, 40),
    (33, 33, 33),
    (100, 128, 160),
    (142, 0, 0),
    (70, 100, 150),
    (210, 170, 100),
    (153, 153, 153),
    (128, 128, 128),
    (0, 0, 80),
    (250, 170, 30),
    (192, 192, 192),
    (220, 220, 0),
    (140, 140, 20),
    (119, 11, 32),
    (150, 0, 255),
    (0, 60, 100),
    (0, 0, 142),
    (0, 0, 90),
    (0, 0, 230),
    (0, 80, 100),
    (128, 64, 64),
    (0, 0, 110),
    (0, 0, 70),
    (0, 0, 192),
    (32, 32, 32),
    (120, 10, 10),
    BLACK,
)

# By label map: the colours that a set publishes for its values. GTA5 and Vistas publish palette PNGs; of the others' values
# it is known how they are shown (BDD100K's and Cityscapes' colour maps), and their label files are grey.
_PUBLISHED: Mapping[str, tuple[Color, ...]] = {
    "gta5-ids": _GTA5,
    "mapillary-robustnet": _VISTAS,
    "mapillary-openseg": _VISTAS,
    "mapillary-wd2-policy": _VISTAS,
    "cityscapes-ids": _GTA5[:34],
    "train-ids": tuple(c.color for c in CLASSES),
}
_PALETTE_FILES = ("gta5-ids", "mapillary-robustnet", "mapillary-openseg", "mapillary-wd2-policy")


def values_of(used: NDArray[np.int64], stored: NDArray[np.int16], label_map: LabelMap, path: Path) -> NDArray[np.uint8] | None:
    """Return the label of each index of a palette image, (256,), or None if the indices are the labels.

    Args:
        used: the indices that occur, in ascending order.
        stored: (256, 3) the palette; -1 beyond its end.

    Raises: DataError naming file and entry if the palette was renumbered in an unknown way.
    """
    colors: list[Color] = [tuple(row) for row in stored[used].tolist()]
    if _shows(used, colors, label_map):
        return None
    grey = _is_grey(stored)
    values: NDArray[np.uint8] = stored[:, 0].clip(0).astype(np.uint8)
    if not grey[used].all():
        _refuse_reordered(used, colors, label_map, path)
        return None
    if np.array_equal(values[used], used):
        return None
    if label_map.name in _PALETTE_FILES and not set(colors) - set(_PUBLISHED[label_map.name]):
        # the data set has grey colours, too: a palette of these may be its own in another order, or that of a grey map
        _refuse_reordered(used, colors, label_map, path)
    if grey[(stored >= 0).all(1)].all():
        return values
    # Grey is only what occurs, out of a palette with colours: a colour map, as long as its indices are labels.
    if not values[used].any() or label_map.strangers(np.unique(values[used]).tolist()):
        return None
    if label_map.strangers(used.tolist()):
        return values
    raise DataError(
        f"{path} has a palette whose entry {used[0]} is {colors[0]}, and both {used[0]} and {values[used[0]]} are labels of "
        f"`{label_map.name}`",
        "save the labels as 8-bit grey, one value a class",
    )


def _is_grey(stored: NDArray[np.int16]) -> NDArray[np.bool_]:
    grey: NDArray[np.bool_] = (stored[:, 0] == stored[:, 1]) & (stored[:, 0] == stored[:, 2]) & (stored[:, 0] >= 0)
    return grey


def _shows(used: NDArray[np.int64], colors: list[Color], label_map: LabelMap) -> bool:
    """Return whether the palette is a known one in its published order: the data set's, or that of the 19 classes."""
    published = _PUBLISHED.get(label_map.name, ())
    if all(i < len(published) and color == published[i] for i, color in zip(used, colors, strict=True)):
        return True
    classes = _class_of_color()
    return any(color != BLACK for color in colors) and all(
        classes.get(color) == label_map.classes.get(int(i), IGNORE) for i, color in zip(used, colors, strict=True)
    )


def _refuse_reordered(used: NDArray[np.int64], colors: list[Color], label_map: LabelMap, path: Path) -> None:
    published = _PUBLISHED.get(label_map.name, ())
    for i, color in zip(used.tolist(), colors, strict=True):
        own = [value for value, other in enumerate(published) if other == color]
        # programs fill palettes with black
        if own and i not in own and color != BLACK:
            raise DataError(
                f"{path} has a palette whose entry {i} is {color}, which is published as the colour of "
                f"{' and '.join(map(str, own))} in `{label_map.name}`",
                "the palette was put into another order when the file was saved again: unpack the official label archive "
                "again, or write the labels as 8-bit grey",
            )


@lru_cache(1)
def _class_of_color() -> dict[Color, int]:
    """Train id of each colour of Cityscapes' palette."""
    return dict.fromkeys(IGNORED_COLORS, IGNORE) | {c.color: i for i, c in enumerate(CLASSES)}
