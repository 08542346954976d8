"""Draw what models see in photographs or in images of domains: overlays, colours, ids, side by side, a paper's figure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dgbench.data.dataset import read_photo
from dgbench.data.index import stem
from dgbench.data.labels import IGNORE
from dgbench.data.sheet import check_ending, color_map, label_ids, overlay, save_image
from dgbench.engine import photos
from dgbench.engine.beside import Beside
from dgbench.engine.predict import segment, shares, with_legend
from dgbench.engine.scenes import Scene
from dgbench.engine.tested import Tested
from dgbench.errors import DataError
from dgbench.progress import Progress
from dgbench.render.panels import Row, panels

Pixels = NDArray[np.uint8]

_SIDE = 1024  # pixels, the width of a picture that stands beside others
_CELL = 640  # of a figure
_LOSSY = (".jpg", ".jpeg", ".webp", ".jfif", ".jpe")


@dataclass(frozen=True, slots=True)
class Style:
    """What is drawn, and how."""

    kinds: tuple[str, ...] = ("overlay",)  # of `photos.KINDS`, the last one apart
    opacity: float = 0.6
    contours: bool = False

    def draw(self, image: Pixels, label: Pixels, kind: str) -> Pixels:
        """(H, W, 3) RGB of the kinds that are looked at."""
        return color_map(label) if kind == "color" else overlay(image, label, self.opacity, contours=self.contours)


@dataclass(frozen=True, slots=True)
class Picture:
    """A file that was written."""

    image: str  # a photograph, or a domain and its image's id; of a figure, how many there are
    content: str  # one of `photos.KINDS`, or "figure"
    path: Path
    models: tuple[str, ...]
    shares: dict[str, float]  # class name -> share of the pixels, largest first; empty for several models
    redistributable: bool | None  # the images' licences let everybody pass pictures on; None: the user's own photographs


@dataclass(frozen=True, slots=True)
class Subject:
    """One image, ready to be segmented."""

    name: str  # as the table shows it
    stem: str  # how its files' names begin
    load: Callable[[], tuple[Pixels, Pixels | None]]  # image and truth
    segment: Callable[[Tested, Pixels], Pixels]
    file: Path | None = None  # a photograph's, which nothing may replace
    redistributable: bool | None = None


def of_photos(given: Sequence[Path]) -> list[Subject]:
    """Photographs, in files or folders.

    Raises: DataError naming every file that cannot be read.
    """
    files = photos.listed(given)
    photos.refuse_unreadable(files)
    return [
        Subject(
            str(file),
            name,
            lambda file=file: (read_photo(file), None),  # type: ignore[misc]
            lambda model, image: segment(model.model, image, model.device, model.size[0] if model.size else None),
            file,
        )
        for file, name in zip(files, photos.file_names(files), strict=True)
    ]


def of_scenes(found: Sequence[Scene]) -> list[Subject]:
    """Images of domains."""
    short = [f"{one.domain.name}-{stem(one.id) or one.id}" for one in found]
    seen = Counter(short)
    whole = [f"{one.domain.name}-{one.id.rpartition('.')[0].replace('/', '-')}" for one in found]
    return [
        Subject(
            f"{one.domain.name} {one.id}",
            near if seen[near] == 1 else far,
            one.load,
            lambda model, _, one=one: one.segment(model),  # type: ignore[misc]
            redistributable=one.redistributable,
        )
        for one, near, far in zip(found, short, whole, strict=True)
    ]


def draw_each(
    subjects: Sequence[Subject], models: Sequence[Tested], out: Path, style: Style, *, progress: Progress
) -> list[Picture]:
    """Write each kind of picture of each image and model.

    Args:
        out: the file, where there is to be only one; else a folder, in which each of several models has its own.

    Raises: DataError if one file is to hold several pictures, or ids are to be written into a format that changes pixels.
    """
    single = _single(out, len(subjects) * len(models) * len(style.kinds))
    if single and out.suffix.lower() in _LOSSY and style.kinds[0].endswith("-ids"):
        raise DataError(f"{out} would not keep the ids of the classes: its format changes pixels", "write them to a .png")
    folders = _folders(out, models)
    kept = [subject.file for subject in subjects if subject.file is not None]
    for kind in style.kinds:
        targets = [out] if single else [folder / f"{one.stem}-{kind}.png" for one in subjects for folder in folders]
        photos.refuse_replaced(kept, targets, kind)
    progress.start("segmenting", len(subjects) * len(models), "images")

    def drawn(subject: Subject, model: Tested, folder: Path, image: Pixels, label: Pixels) -> list[Picture]:
        pictures = []
        for kind in style.kinds:
            path = out if single else folder / f"{subject.stem}-{kind}.png"
            save_image(_picture(image, label, kind, style), path)
            pictures.append(Picture(subject.name, kind, path, (model.title,), shares(label), subject.redistributable))
        return pictures

    try:
        with Beside[list[Picture]](progress.advance) as writing:
            for subject in subjects:
                image, _ = subject.load()
                for model, folder in zip(models, folders, strict=True):
                    writing.put(partial(drawn, subject, model, folder, image, subject.segment(model, image)))
            return [picture for pictures in writing.results() for picture in pictures]
    finally:
        progress.stop()


def draw_side_by_side(
    subjects: Sequence[Subject], models: Sequence[Tested], out: Path, style: Style, *, progress: Progress
) -> list[Picture]:
    """Write a picture for each image: itself, the truth where it is known, and what each model sees.

    Args:
        out: the file for one image, or a folder.

    Raises: DataError if one file is to hold several pictures.
    """
    single = _single(out, len(subjects))
    titles = tuple(model.title for model in models)
    targets = [out] if single else [out / f"{one.stem}-side-by-side.png" for one in subjects]
    photos.refuse_replaced([one.file for one in subjects if one.file is not None], targets, "picture")
    written = []
    progress.start("segmenting", len(subjects), "images")
    try:
        for subject, path in zip(subjects, targets, strict=True):
            row, classes, found = _row("", subject, models, style)
            heads = ("image", "truth") if len(row.cells) > 1 + len(models) else ("image",)
            cell = min(_SIDE, row.cells[0].shape[1])
            save_image(panels([row], (*heads, *titles), classes, cell), path)
            only = found[0] if len(found) == 1 else {}
            written.append(Picture(subject.name, "side-by-side", path, titles, only, subject.redistributable))
            progress.advance()
    finally:
        progress.stop()
    return written


def draw_figure(found: Sequence[Scene], models: Sequence[Tested], out: Path, style: Style, *, progress: Progress) -> Picture:
    """Write one picture of all: a row for each image, with columns for itself, the truth and each model."""
    rows, classes = [], set()
    titles = tuple(model.title for model in models)
    subjects = of_scenes(found)
    progress.start("segmenting", len(subjects), "images")
    try:
        for scene, subject in zip(found, subjects, strict=True):
            row, its_classes, _ = _row(_title(scene), subject, models, style)
            # smaller at once: a figure of large images takes gigabytes
            rows.append(Row(row.title, tuple(_shrunk(cell) for cell in row.cells)))
            classes |= set(its_classes)
            progress.advance()
    finally:
        progress.stop()
    save_image(panels(rows, ("Image", "Ground truth", *titles), sorted(classes), _CELL), out)
    return Picture(
        f"{len(rows)} image{'s' * (len(rows) > 1)}", "figure", out, titles, {}, all(one.redistributable for one in found)
    )


def _row(title: str, subject: Subject, models: Sequence[Tested], style: Style) -> tuple[Row, list[int], list[dict[str, float]]]:
    """Return the cells of one image, the classes that are to be seen in them, and their shares by each model."""
    image, truth = subject.load()
    labels = [subject.segment(model, image) for model in models]
    shown = labels if truth is None else [truth, *labels]
    classes = sorted({int(value) for label in shown for value in np.unique(label)} - {IGNORE})
    cells = [style.draw(image, label, style.kinds[0]) for label in shown]
    return Row(title, (image, *cells)), classes, [shares(label) for label in labels]


def _picture(image: Pixels, label: Pixels, kind: str, style: Style) -> Image.Image:
    if kind == "train-ids":
        return Image.fromarray(label)
    if kind == "label-ids":
        return Image.fromarray(label_ids(label))
    drawn = style.draw(image, label, kind)
    return with_legend(drawn, label) if kind == "overlay" else Image.fromarray(drawn)


def _title(scene: Scene) -> str:
    row = scene.domain
    return row.name if row.procedural else row.title.partition(" (")[0]


def _shrunk(cell: Pixels) -> Pixels:
    height, width = cell.shape[:2]
    if width <= 2 * _CELL:
        return cell
    size = (2 * _CELL, max(1, round(2 * _CELL * height / width)))
    return np.asarray(Image.fromarray(cell).resize(size, Image.Resampling.LANCZOS))


def _single(out: Path, pictures: int) -> bool:
    """Whether `out` is the file of the only picture, not a folder."""
    if out.is_dir() or not out.suffix:
        return False
    if pictures > 1:
        raise DataError(f"{pictures} pictures cannot all be written to {out}", "give a folder with --out")
    check_ending(out)
    return True


def _folders(out: Path, models: Sequence[Tested]) -> list[Path]:
    """Return the folder of each model's pictures: `out`, or of several models one in it that is called as the model is."""
    if len(models) == 1:
        return [out]
    names = [re.sub(r"[^A-Za-z0-9._-]+", "-", model.title).strip("-.") or "model" for model in models]
    if len({name.casefold() for name in names}) < len(names):
        names = [f"{number}-{name}" for number, name in enumerate(names, 1)]
    return [out / name for name in names]
