"""Small data sets in any layout of the table, written by code that shares nothing with what reads them."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dgbench.data.domain import Domain, Layout
from dgbench.data.index import label_of
from dgbench.data.labels import CLASSES, LabelMap

SIZE = (32, 64)  # (H, W)
BLOCK = 8  # labels are made of squares, so that polygons can draw them


def blocks(values: list[int], seed: int) -> NDArray[np.uint8]:
    """(H, W) of random squares."""
    rng = np.random.default_rng(seed)
    small = rng.choice(values, size=(SIZE[0] // BLOCK, SIZE[1] // BLOCK))
    return small.repeat(BLOCK, 0).repeat(BLOCK, 1).astype(np.uint8)


def classes_of(label_map: LabelMap) -> list[int]:
    """The train ids that a map leads to, and 255."""
    return [*sorted(set(label_map.classes.values())), 255]


def stored(train_ids: NDArray[np.uint8], label_map: LabelMap) -> NDArray[np.uint16]:
    """The largest value that stands for each train id: where a map has several, not the one that is first in its table."""
    out = np.zeros(train_ids.shape, np.uint16)
    for train_id in np.unique(train_ids):
        values = (
            label_map.ignored - {255} or {255}
            if train_id == 255
            else {v for v, mapped in label_map.classes.items() if mapped == train_id}
        )
        out[train_ids == train_id] = max(values)
    return out


def path_in(glob: str, i: int) -> str:
    """The `i`-th path that a glob of images matches."""
    *folders, name = glob.split("/")
    return "/".join([*(folder.replace("*", "a") for folder in folders), name.replace("*", f"{i:05d}")])


def write_image(path: Path, seed: int, size: tuple[int, int] = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(256, size=(*size, 3), dtype=np.uint8)).save(path)


def write_label(path: Path, train_ids: NDArray[np.uint8], label_map: LabelMap, encoding: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = stored(train_ids, label_map)
    if encoding == "ids":
        image = Image.fromarray(values.astype(np.uint8), mode="P")
        image.putpalette([value for c in range(256) for value in (255 - c, c, 7)])
        image.save(path)
    elif encoding == "rgb16":
        cv2.imwrite(str(path), np.stack([0 * values, 0 * values + 9, values], -1))  # OpenCV writes blue, green, red
    elif encoding == "colors":
        palette = dict(enumerate(c.color for c in CLASSES)) | {255: (0, 0, 0)}
        Image.fromarray(np.array([[palette[int(t)] for t in row] for row in train_ids], np.uint8)).save(path)
    elif encoding == "polygons":
        path.write_text(json.dumps(polygons(values, {value: name for name, value in label_map.names.items()})))
    elif encoding == "panoptic":
        # a segment a square, numbered beyond what one colour channel holds
        numbers = np.arange(values.size // BLOCK**2).reshape(SIZE[0] // BLOCK, -1) * 1117 + 70000
        segments = numbers.repeat(BLOCK, 0).repeat(BLOCK, 1)
        Image.fromarray(np.stack([segments & 255, segments >> 8 & 255, segments >> 16], -1).astype(np.uint8)).save(path)
        table = path.parent.with_suffix(".json")
        content = json.loads(table.read_text()) if table.exists() else {"annotations": []}
        info = [{"id": int(s), "category_id": int(values[segments == s][0])} for s in np.unique(segments)]
        content["annotations"].append({"file_name": path.name, "segments_info": info})
        table.write_text(json.dumps(content))


def polygons(values: NDArray[np.uint16], names: dict[int, str]) -> dict[str, object]:
    """A scene in the form of Cityscapes and IDD: one square over the other, after a background that they cover."""
    height, width = values.shape
    objects = [{"label": names[0], "polygon": [[0, 0], [width, 0], [width, height], [0, height]]}]
    for y in range(0, height, BLOCK):
        for x in range(0, width, BLOCK):
            corner = [[x, y], [x + BLOCK - 1, y], [x + BLOCK - 1, y + BLOCK - 1], [x, y + BLOCK - 1]]
            objects.append({"label": names[int(values[y, x])], "polygon": corner})
    return {"imgHeight": height, "imgWidth": width, "objects": objects}


def write_split(root: Path, domain: Domain, layout: Layout, n: int = 3, folder: str = "") -> list[NDArray[np.uint8]]:
    """Write `n` pairs below a data root; return their train ids in the order of their names."""
    label_map = domain.read_by(layout.label_map)
    place = root / (folder or domain.folders[0])
    labels = [blocks(classes_of(label_map), seed) for seed in range(n)]
    for i, label in enumerate(labels):
        image = path_in(layout.images, i)
        write_image(place / image, i)
        write_label(place / label_of(image, layout), label, label_map, layout.encoding)
    for text in layout.only[:1]:
        (place / text).write_text("\n".join(path_in(layout.images, i).rpartition("/")[2] for i in range(n)))
    return labels
