"""Decoding of label files: to stored values and then to train ids, by the encoding that a layout names.

Readers disagree about labels: Pillow reads SYNTHIA's 16-bit colours as zeros, OpenCV turns palette indices into colours,
torchvision misreads 4-bit palettes, all without an error. Each encoding is read by a library that reads it right; a
file of another kind is refused. `pixels` defines a pixel's value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dgbench.data import files, pixels
from dgbench.data.labels import CLASSES, IGNORE, LabelMap
from dgbench.data.palettes import IGNORED_COLORS
from dgbench.data.pixels import Stored as Stored
from dgbench.errors import DataError

_NOT_AS_EXPECTED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)  # from untrusted JSON
_UNKNOWN = 65535  # marks a colour or a segment that is not declared
_GREY_COLORS = {red for red, green, blue in (*IGNORED_COLORS, *(c.color for c in CLASSES)) if red == green == blue}


def read_label(path: Path, label_map: LabelMap, encoding: str = "ids", data: bytes | None = None) -> NDArray[np.uint8]:
    """Return (H, W) train ids of a label file.

    Args:
        path: the file; only its name is used when `data` holds its bytes.
        encoding: key of `ENCODINGS`.

    Raises: DataError naming the file and the offending values when it holds anything outside the map.
    """
    stored = read_stored(path, label_map, encoding, data)
    if stored.max() < 256 and len(label_map.table) == 256:
        # OpenCV's look-up tables: in NumPy, counting and indexing take ten times as long, more than the decoding
        import cv2

        narrow = np.ascontiguousarray(stored, np.uint8)
        if not cv2.LUT(narrow, (~label_map.known).astype(np.uint8)).any():
            return np.asarray(cv2.LUT(narrow, label_map.table))
    if strange := label_map.strangers(present(stored)):
        raise DataError(
            f"{path} holds label {'values' if len(strange) > 1 else 'value'} {', '.join(map(str, strange[:8]))}"
            f"{', ...' if len(strange) > 8 else ''}, which the label map `{label_map.name}` does not know "
            f"({_spans(label_map)})",
            "the labels are in another encoding than this map's, or damaged: unpack the official label archive again; "
            "of a domain that you declared, add the values to its `label_map`, or to `ignored`",
        )
    train_ids: NDArray[np.uint8] = label_map.table[stored]
    return train_ids


def read_stored(path: Path, label_map: LabelMap, encoding: str = "ids", data: bytes | None = None) -> Stored:
    """Return (H, W) values as the file stores them, not yet looked up in the map.

    Raises: DataError naming the file if it is missing, damaged, or of another encoding.
    """
    content = files.content(path, "label") if data is None else data
    try:
        return ENCODINGS[encoding](content, path, label_map)
    except files.DAMAGED as error:
        said, hint = files.damage(error)
        raise DataError(
            f"{path} cannot be read as a label map: {said}", hint or "the file is damaged or incomplete: download it again"
        ) from None


def present(stored: Stored) -> list[int]:
    """Return the values that occur, in ascending order."""
    return [int(value) for value in np.flatnonzero(np.bincount(stored.ravel()))]


def _spans(label_map: LabelMap) -> str:
    """Return the values that a map allows, neighbours together: `0..2, 7, 255`."""
    spans: list[tuple[int, int]] = []
    for value in np.flatnonzero(label_map.known).tolist():
        if spans and spans[-1][1] == value - 1:
            spans[-1] = (spans[-1][0], value)
        else:
            spans.append((value, value))
    shown = [str(low) if low == high else f"{low}..{high}" for low, high in spans]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:11], f"... {shown[-1]}"])


def _rgb16(content: bytes, path: Path, _: LabelMap) -> Stored:
    """Decode SYNTHIA: 16-bit colour PNG, class in red (instance in green). Pillow would keep the high bytes: zeros."""
    depth, kind = pixels.png_header(content)
    if (depth, kind) != (16, pixels.COLOR):
        what = f" but a PNG of {depth}-bit {pixels.KINDS.get(kind, 'unknown')}" if depth else ""
        raise DataError(
            f"{path} is not a 16-bit colour PNG{what}",
            "the official labels hold the class in 16 bits of red; a file saved again by another program has lost it",
        )
    import cv2

    with pixels.opened(content, path) as file:
        file.verify()  # the checksums of all chunks: OpenCV returns a part of a damaged file
    decoded = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if decoded is None:
        raise OSError("OpenCV cannot decode it")
    red: NDArray[np.uint16] = decoded[..., 2]  # OpenCV's order is BGR
    return red


def _colors(content: bytes, path: Path, label_map: LabelMap) -> Stored:
    """Convert colours of Cityscapes' palette to train ids. A grey file under this name already holds train ids."""
    if pixels.png_header(content) == (8, pixels.GREY):  # the usual case, in a third of the time
        grey = pixels.values(content, path, label_map)
        if not set(pixels.used(grey.astype(np.uint8, copy=False)).tolist()) <= _GREY_COLORS:
            return grey
    packed = pixels.colors(content, path)
    train_ids = _color_table()[packed]
    if (train_ids != _UNKNOWN).all():
        if not packed.any() and pixels.png_header(content)[1] not in (pixels.COLOR, pixels.COLOR_ALPHA):
            raise DataError(
                f"{path} is completely black: as a colour map it is unlabeled, as a map of train ids it is road",
                "move the image and its label out of the folder, or save the label as RGB",
            )
        return train_ids.astype(np.uint8)
    low = packed & np.uint32(255)
    if (packed == low * np.uint32(0x010101)).all():
        return low.astype(np.uint8)
    raise DataError(
        f"{path} holds the colour {pixels.color_of(int(packed[train_ids == _UNKNOWN][0]))}, which is none of the Cityscapes "
        "palette",
        "colour maps must not be resized or saved with loss: unpack the official label archive again",
    )


def _polygons(content: bytes, path: Path, label_map: LabelMap) -> Stored:
    """Draw IDD's and Cityscapes' JSON objects, each a label's name and a polygon, in their order."""
    try:
        scene: dict[str, Any] = json.loads(content)
        size = int(scene["imgWidth"]), int(scene["imgHeight"])
        objects = [(o["label"], [tuple(p) for p in o["polygon"]]) for o in scene["objects"] if not o.get("deleted")]
    except _NOT_AS_EXPECTED as error:
        raise DataError(
            f"{path} is not a file of polygons: {type(error).__name__} {error}",
            "it should hold imgHeight, imgWidth and objects: unpack the official label archive again",
        ) from None
    if not (0 < size[0] * size[1] <= 2 * (Image.MAX_IMAGE_PIXELS or math.inf) and min(size) > 0):
        raise DataError(f"{path} says that its image is {size[0]}x{size[1]}", "it should be the size of its image")
    image = Image.new("L", size, label_map.names.get("unlabeled", IGNORE))
    drawer = ImageDraw.Draw(image)
    for label, polygon in objects:
        # a `cargroup` is several cars that were not annotated separately
        name = label if label in label_map.names else str(label).removesuffix("group")
        if name not in label_map.names:
            raise DataError(
                f"{path} has a polygon labelled `{label}`, which the label map `{label_map.name}` does not know",
                "the labels are of another data set, or of another version of it",
            )
        if len(polygon) > 2:
            drawer.polygon(polygon, fill=label_map.names[name])
    return np.asarray(image)


def _panoptic(content: bytes, path: Path, _: LabelMap) -> Stored:
    """Decode WildDash2 and COCO: colours are segments, whose categories are in `<folder>.json` next to the folder; 0 is void."""
    table_file = path.parent.with_suffix(".json")
    if not table_file.is_file():
        raise DataError(f"no {table_file.name} beside the folder of {path}", "unpack the official label archive again")
    segments = _segments(table_file, table_file.stat().st_mtime_ns).get(path.name)
    if segments is None:
        raise DataError(f"{path} has no annotation in {table_file}", "unpack the official label archive again")
    packed = pixels.colors(content, path)
    table = np.full(1 << 24, _UNKNOWN, np.uint16)
    table[0] = 0
    for segment, category in segments.items():
        if not (0 <= segment < len(table) and 0 <= category < _UNKNOWN):
            raise DataError(
                f"{table_file} lists segment {segment} of category {category}", "unpack the official label archive again"
            )
        table[segment] = category
    categories: NDArray[np.uint16] = table[packed]
    if (categories == _UNKNOWN).any():
        raise DataError(
            f"{path} holds segment {int(packed[categories == _UNKNOWN][0])}, which its annotation does not list",
            "the PNG and the JSON are of different versions: unpack the official label archive again",
        )
    return categories


ENCODINGS: dict[str, Callable[[bytes, Path, LabelMap], Stored]] = {
    "ids": pixels.values,
    "rgb16": _rgb16,
    "colors": _colors,
    "polygons": _polygons,
    "panoptic": _panoptic,
}


@lru_cache(1)
def _color_table() -> NDArray[np.uint16]:
    table = np.full(1 << 24, _UNKNOWN, np.uint16)
    rows = [(color, IGNORE) for color in IGNORED_COLORS] + [(c.color, i) for i, c in enumerate(CLASSES)]
    for (red, green, blue), train_id in rows:
        table[red + (green << 8) + (blue << 16)] = train_id
    return table


@lru_cache(4)
def _segments(path: Path, _changed: int) -> dict[str, dict[int, int]]:
    """Map the file name of each panoptic PNG to its segments' categories."""
    try:
        annotations = json.loads(files.content(path, "table of segments"))["annotations"]
        return {a["file_name"]: {int(s["id"]): int(s["category_id"]) for s in a["segments_info"]} for a in annotations}
    except _NOT_AS_EXPECTED as error:
        raise DataError(
            f"{path} is not a file of panoptic annotations: {type(error).__name__} {error}", "unpack the label archive again"
        ) from None
