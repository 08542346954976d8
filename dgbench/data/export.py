"""Export of procedural streets in the form of a published data set: its folders, file names and label encoding.

Code that reads Cityscapes, for example, can be tested on an export as Cityscapes, where every label is
known. How labels are written follows from the domain's row (globs, encoding, label map); only file names are listed here.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dgbench import atomic, temporaries
from dgbench.data.catalog import lookup
from dgbench.data.dataset import SegDataset
from dgbench.data.decode import Stored
from dgbench.data.domain import RENDERED, Domain, Layout
from dgbench.data.index import label_of
from dgbench.data.labels import IGNORE, NAMES, LabelMap, palette
from dgbench.errors import DataError, unknown
from dgbench.progress import Progress, Silent

# By the domain's first folder: the values for the `*` of a glob, from the last to the first. `i` counts from 0, `n` from 1 over
# all splits; `a` and `b` are hexadecimal digits. Of domains that are not listed, files are numbered.
_STARS: Mapping[str, tuple[str, ...]] = {
    "gta5": ("{n:05d}",),
    "synthia": ("{i:07d}",),
    "urbansyn": ("{n:04d}",),
    "cityscapes": ("{streets}_000000_{i:06d}", "{streets}"),
    "bdd100k": ("{i:08x}-{a}",),
    "mapillary": ("{i:06d}{a}{b}",),
    "acdc": ("GOPR0475_frame_{i:06d}", "GOPR0475", "{condition}"),
    "dark-zurich": ("GOPR0356_frame_{i:06d}", "GOPR0356"),
    "idd": ("{i:06d}", "0"),
    "wilddash2": ("aa{i:04d}_100000",),
}
_CONDITIONS = ("fog", "night", "rain", "snow")

# by domain: classes that its label map has a value for, but no published file holds
_NEVER_USED: Mapping[str, tuple[str, ...]] = {"synthia": ("terrain", "truck", "train")}

# label maps of sets whose label files are palette images; the others are grey
_IN_COLOR = ("gta5-ids", "mapillary-robustnet", "mapillary-openseg", "mapillary-wd2-policy")

_SMALLEST = 32  # height and width that can be rendered
_THINGS = range(NAMES.index("person"), len(NAMES))  # classes whose objects can be counted


@dataclass(frozen=True, slots=True)
class Exported:
    """One split that was written."""

    streets: str  # what was rendered
    domain: str
    split: str
    folder: Path  # the domain's, below the data root
    layout: str
    label_map: str
    n_images: int
    size: tuple[int, int]  # (H, W)
    ignored: dict[str, int]  # class that the labels cannot express -> its pixels, which became ignored


def export(
    streets: str,
    domain: str,
    out: Path,
    *,
    n: int | None = None,
    splits: Sequence[str] = (),
    size: tuple[int, int] | None = None,
    layout: str | None = None,
    label_map: str | None = None,
    progress: Progress | None = None,
) -> list[Exported]:
    """Render scenes and write them below the data root `out` as the files of `domain`; the folder appears when complete.

    Args:
        streets: a rendered domain, with or without a severity.
        n: maximum number of images per split; by default all that `streets` has.
        splits: of `domain`; by default those of train and val that it has. `val` is rendered from the validation scenes,
            like every split whose name ends in `val`, and the others from the training scenes.
        size: (H, W), by default 256x512.
        layout: name of one of the split's layouts; by default the published one.
        label_map: the map by which labels are written, if the domain has several.

    Raises: DataError if there is no such domain, split, layout or map, or the domain has a folder below `out` already.
    """
    source, row = lookup(streets), lookup(domain, out)
    if not source.procedural:
        raise DataError(f"`{source.name}` is not a rendered domain: only these can be exported", "streets-city, for example")
    if row.procedural:
        raise DataError(f"`{row.name}` is rendered and has no files", "name a published domain, `cityscapes` for example")
    if size is not None and min(size) < _SMALLEST:
        raise DataError(f"scenes cannot be {size[0]} x {size[1]}", f"height and width must be at least {_SMALLEST}")
    folder = _new_folder(row, out)
    plans = [_plan(row, split, layout, label_map) for split in dict.fromkeys(splits or _usual(row))]
    progress = progress or Silent()
    temporaries.clear(folder.parent, of=folder.name)
    stage = temporaries.beside(folder)
    done: list[Exported] = []
    try:
        stage.mkdir(parents=True)
        writer = _Writer(row, source.name, stage)
        for plan in plans:
            scenes = "val" if plan.split.endswith("val") else "train"
            available = source.splits[scenes].count or 0
            dataset = SegDataset(source, scenes, size=size, limit=min(n or available, available))
            dataset.prepare(progress)
            progress.start(f"writing {row.name} {plan.split}", len(dataset), "images")
            try:
                ignored = writer.write(dataset, plan, progress)
            finally:
                progress.stop()
            assert dataset.size is not None
            done.append(
                Exported(
                    source.name,
                    row.name,
                    plan.split,
                    folder,
                    plan.layout.name,
                    plan.label_map.name,
                    len(dataset),
                    dataset.size,
                    ignored,
                )
            )
        writer.finish()
        os.rename(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    atomic.sync_folder(folder.parent)
    return done


@dataclass(frozen=True)
class _Plan:
    """Settings for writing one split."""

    split: str
    layout: Layout
    label_map: LabelMap
    stored: Stored  # (256,) train id -> stored value
    inexpressible: tuple[int, ...]  # train ids that become ignored


def _usual(row: Domain) -> list[str]:
    return [split for split in ("train", "val") if split in row.splits] or list(row.splits)[:1]


def _plan(row: Domain, split: str, layout_name: str | None, label_map_name: str | None) -> _Plan:
    row.require_split(split)
    layouts = row.splits[split].layouts
    chosen = next((layout for layout in layouts if layout_name in (None, layout.name)), None)
    if chosen is None:
        raise DataError(*unknown(f"layout of {row.name} {split}", layout_name or "", [layout.name for layout in layouts]))
    choices = [name for name in dict.fromkeys((row.label_map, *row.label_maps)) if name]
    if label_map_name and label_map_name not in choices:
        raise DataError(f"`{row.name}` is not read by the label map `{label_map_name}`", f"it is by {' or '.join(choices)}")
    if "*" not in chosen.images or set("?[") & set(chosen.images):
        raise DataError(
            f"files of `{row.name}` cannot be named after {chosen.images}", "its glob needs `*` and no other wildcard"
        )
    label_map = row.read_by(chosen.label_map or label_map_name)
    return _Plan(split, chosen, label_map, *_inverse(label_map, _NEVER_USED.get(row.name, ())))


def _inverse(label_map: LabelMap, never: Sequence[str]) -> tuple[Stored, tuple[int, ...]]:
    """Return the stored value of each train id, and which train ids have none."""
    table = np.full(256, label_map.stored(IGNORE), np.uint16)
    has = set(label_map.classes.values())
    inexpressible = tuple(i for i, name in enumerate(NAMES) if i not in has or name in never)
    for train_id in range(len(NAMES)):
        if train_id not in inexpressible:
            table[train_id] = label_map.stored(train_id)
    return table, inexpressible


def _new_folder(row: Domain, out: Path) -> Path:
    if any(Path(name).is_absolute() for name in row.folders):
        raise DataError(
            f"`{row.name}` lies in {row.folders[0]}, not below a data root",
            "give its declaration a `folder` without a leading slash, or none",
        )
    if taken := next((out / name for name in row.folders if (out / name).exists()), None):
        raise DataError(f"{taken} exists: an export never adds to existing files", "give another --out")
    return out / row.folders[0]


class _Writer:
    """Writer of splits into a folder, which uses no path twice."""

    def __init__(self, row: Domain, streets: str, folder: Path) -> None:
        self.row, self.streets, self.folder = row, streets, folder
        self._given = 0
        self._segments: dict[Path, list[_Annotation]] = {}  # JSON of panoptic labels -> what goes into it

    def write(self, dataset: SegDataset, plan: _Plan, progress: Progress) -> dict[str, int]:
        """Write a split's images and labels; return the number of pixels of each class that became ignored."""
        counts = np.zeros(256, np.int64)
        names = []
        for i in range(len(dataset)):
            sample = dataset[i]
            image = self._path(plan, i, len(dataset))
            label = self.folder / label_of(image, plan.layout)
            names.append(image.rpartition("/")[2])
            _write_image(self.folder / image, sample.image)
            counts += np.bincount(sample.label.ravel(), minlength=256)
            train_ids = np.where(np.isin(sample.label, plan.inexpressible), np.uint8(IGNORE), sample.label)
            label.parent.mkdir(parents=True, exist_ok=True)
            if annotation := _WRITERS[plan.layout.encoding](label, train_ids, plan):
                self._segments.setdefault(label.parent.with_suffix(".json"), []).append(annotation)
            progress.advance()
        for text in plan.layout.only[:1]:
            place = self.folder / text
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        return {NAMES[i]: int(counts[i]) for i in plan.inexpressible if counts[i]}

    def finish(self) -> None:
        """Write the files that need all images."""
        for path, listed in self._segments.items():
            used = {segment["category_id"] for annotation in listed for segment in annotation["segments_info"]}
            content = {
                "images": [{"id": a["image_id"], "file_name": a["file_name"]} for a in listed],
                "annotations": listed,
                "categories": [{"id": category, "name": str(category)} for category in sorted(used)],
            }
            path.write_text(json.dumps(content), encoding="utf-8")
        note = f"Scenes of {self.streets}, rendered by dgbench as files of {self.row.name}: not the published set.\n"
        for place, _, _ in os.walk(self.folder):
            Path(place, RENDERED).write_text(note, encoding="utf-8")

    def _path(self, plan: _Plan, i: int, count: int) -> str:
        """Return the next path that the glob of images matches, in an order that sorting keeps."""
        digest = hashlib.sha256(f"{self.streets} {plan.split} {i}".encode()).hexdigest()
        values: dict[str, Any] = {
            "i": self._given,
            "n": self._given + 1,
            "a": digest[:8],
            "b": digest[8:16],
            "streets": self.streets.replace("@", "-"),
            "condition": _CONDITIONS[i * len(_CONDITIONS) // count],
        }
        self._given += 1
        first, *parts = plan.layout.images.split("*")
        stars = _STARS.get(self.row.folders[0], ("{i:06d}",))
        fills = [*stars[: len(parts)], *[plan.split] * (len(parts) - len(stars))]
        return first + "".join(fill.format(**values) + part for fill, part in zip(reversed(fills), parts, strict=True))


def _write_image(path: Path, image: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() in (".jpg", ".jpeg"):
        Image.fromarray(image).save(path, "JPEG", quality=95)
    else:
        Image.fromarray(image).save(path, "PNG", compress_level=1)


def _write_ids(path: Path, train_ids: NDArray[np.uint8], plan: _Plan) -> None:
    values = plan.stored[train_ids]
    if plan.stored.max() > 255:
        Image.fromarray(values).save(path, "PNG")
        return
    image = Image.fromarray(values.astype(np.uint8))
    if plan.label_map.name in _IN_COLOR:
        image.putpalette(palette()[plan.label_map.table].tobytes())
    image.save(path, "PNG")


def _write_rgb16(path: Path, train_ids: NDArray[np.uint8], plan: _Plan) -> None:
    """Write the class in red and the number of the object in green."""
    import cv2

    objects, given = np.zeros(train_ids.shape, np.uint16), 0
    for train_id in _THINGS:
        found, parts = cv2.connectedComponents((train_ids == train_id).astype(np.uint8))
        objects = np.where(parts > 0, parts + given, objects).astype(np.uint16)
        given += found - 1
    pixels = np.stack([np.zeros_like(objects), objects, plan.stored[train_ids]], -1)  # OpenCV's order is BGR
    atomic.write(path, cv2.imencode(".png", pixels)[1].tobytes())


def _write_colors(path: Path, train_ids: NDArray[np.uint8], _: _Plan) -> None:
    Image.fromarray(palette()[train_ids]).save(path, "PNG")


def _write_polygons(path: Path, train_ids: NDArray[np.uint8], plan: _Plan) -> None:
    """Write a rectangle for each block of rows in which a run of pixels is the same; ignored pixels have no polygon."""
    names = {value: name for name, value in plan.label_map.names.items()}
    objects = [
        {"label": names[int(plan.stored[train_id])], "polygon": [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]}
        for train_id, x0, y0, x1, y1 in _rectangles(train_ids)
        if train_id != IGNORE
    ]
    height, width = train_ids.shape
    path.write_text(json.dumps({"imgHeight": height, "imgWidth": width, "objects": objects}), encoding="utf-8")


def _rectangles(labels: NDArray[np.uint8]) -> list[tuple[int, int, int, int, int]]:
    """Return rectangles that cover a label map: value, and the first and last column and row as x0, y0, x1, y1."""
    done, growing = [], dict[tuple[int, int, int], int]()  # (value, x0, x1) -> the row in which it began
    for y, row in enumerate(labels):
        edges = np.flatnonzero(np.diff(row)) + 1
        starts, ends = [0, *edges.tolist()], [*(edges - 1).tolist(), len(row) - 1]
        runs = {(int(row[x0]), x0, x1) for x0, x1 in zip(starts, ends, strict=True)}
        done += [(value, x0, growing.pop((value, x0, x1)), x1, y - 1) for value, x0, x1 in set(growing) - runs]
        growing |= dict.fromkeys(runs - set(growing), y)
    return sorted([*done, *((value, x0, y0, x1, len(labels) - 1) for (value, x0, x1), y0 in growing.items())])


def _write_panoptic(path: Path, train_ids: NDArray[np.uint8], plan: _Plan) -> _Annotation:
    """Write a segment for each class, with ids greater than one colour channel holds."""
    values = plan.stored[train_ids].astype(np.uint32)
    numbers = 256 * values + 1
    Image.fromarray(np.stack([numbers & 255, numbers >> 8 & 255, numbers >> 16], -1).astype(np.uint8)).save(path, "PNG")
    segments = [
        {"id": 256 * int(value) + 1, "category_id": int(value), "area": int(area), "iscrowd": 0}
        for value, area in zip(*np.unique(values, return_counts=True), strict=True)
    ]
    return {"file_name": path.name, "image_id": path.stem, "segments_info": segments}


_Annotation = dict[str, Any]
_WRITERS: Mapping[str, Callable[[Path, NDArray[np.uint8], _Plan], _Annotation | None]] = {
    "ids": _write_ids,
    "rgb16": _write_rgb16,
    "colors": _write_colors,
    "polygons": _write_polygons,
    "panoptic": _write_panoptic,
}
