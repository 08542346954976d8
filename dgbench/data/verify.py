"""Verification of every file of a split: pairs, sizes, readability, and label values."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from dgbench.data import native_stderr
from dgbench.data.catalog import lookup
from dgbench.data.index import Found, find, rows_of, stem
from dgbench.data.labels import IGNORE, NAMES, LabelMap
from dgbench.errors import DataError
from dgbench.progress import Progress, Silent
from dgbench.resources import usable_cores

if TYPE_CHECKING:
    from dgbench.data.domain import Domain

Kind = Literal["no label", "no image", "unreadable", "damaged", "turned", "sizes differ", "unknown values", "nothing labelled"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One file, or pair of files, that cannot be used."""

    kind: Kind
    file: str  # relative to the domain's folder
    detail: str


@dataclass(frozen=True, slots=True)
class Value:
    """A value that occurs in label files."""

    value: int
    meaning: str  # class, "ignored", "unknown", or the data set's own name for it where it has no map to the classes
    pixels: int
    images: int


@dataclass(frozen=True, slots=True)
class Report:
    """The result of verifying a split."""

    domain: str
    split: str
    folder: Path
    layout: str
    note: str  # what differs from the published files
    label_map: str | None  # by which the files are read; None: their values have no agreed map to the classes
    n_pairs: int
    n_missing: int  # pairs that the complete split has beyond these
    n_extra: int  # pairs that are here beyond the complete split
    rendered: bool  # by `dgbench data export`: not the published set
    problems: tuple[Problem, ...]
    known_bad: dict[str, str]  # file -> what is said about it; left out by every reader
    one_color: tuple[str, ...]  # images of a single colour: readable, but nothing can be learnt from them
    turned: tuple[str, ...]  # images with an EXIF rotation; if their labels do not have it, also a problem
    sizes: dict[str, int]  # W x H of images -> how many
    values: tuple[Value, ...]
    shares: dict[str, float]  # class -> share of the labelled pixels, 0..1; empty without a label map
    n_images: dict[str, int]  # class -> images in which it occurs

    @property
    def ok(self) -> bool:
        """Whether there is a pair and no file has a problem; a split may be incomplete all the same."""
        return self.n_pairs > 0 and not self.problems


def splits_to_verify(name: str, root: Path | None = None) -> list[str]:
    """Return those of train and val (or of all splits, if it has neither) of which files exist.

    Raises: DataError if that is none of them.
    """
    domain = lookup(name, root)
    _refuse_rendered(domain)
    usual = [split for split in ("train", "val") if split in domain.splits] or list(domain.splits)
    here, error = [], None
    for split in usual:
        try:
            find(domain, split, root)
            here.append(split)
        except DataError as missing:
            error = error or missing
    if not here and error is not None:
        raise error
    return here


def verify(
    name: str, split: str, root: Path | None = None, *, label_map: str | None = None, progress: Progress | None = None
) -> Report:
    """Read and check every file of a split, on all cores.

    Args:
        label_map: read the labels by this map instead of the domain's own.

    Raises: DataError if the domain or split is unknown, or nothing of it is on the disk.
    """
    domain = lookup(name, root)
    _refuse_rendered(domain)
    found = find(domain, split, root)
    read_by = _map_of(found, label_map)
    progress = progress or Silent()
    tally = _Tally(found, read_by)
    progress.start(f"verifying {domain.name} {split}", len(found), "pairs")
    try:
        # decoders write their warnings to the terminal, without a name
        with native_stderr.captured() as told:
            for looked in _look_at_all(found, read_by, told):
                tally.add(looked)
                progress.advance()
    finally:
        progress.stop()
    tally.ask_again()
    return tally.report()


def _refuse_rendered(domain: Domain) -> None:
    if domain.procedural:
        raise DataError(f"`{domain.name}` is rendered here: there are no files to verify", f"dgbench data show {domain.base}")


def _map_of(found: Found, asked: str | None) -> LabelMap | None:
    name = found.layout.label_map or asked or found.domain.label_map
    return found.domain.read_by(name) if name else None


@dataclass(frozen=True, slots=True)
class _Looked:
    image: str
    size: tuple[int, int] | None = None  # (H, W)
    one_color: bool = False
    turned: bool = False
    suspect: dict[str, Any] | None = None  # its row, if a decoder warned about this image or one that was read meanwhile
    counts: NDArray[np.int64] | None = None  # pixels of each stored value
    problems: tuple[Problem, ...] = ()


def _look_at_all(found: Found, label_map: LabelMap | None, told: native_stderr.Captured) -> Iterator[_Looked]:
    # threads: decoding and counting run outside the interpreter's lock
    with ThreadPoolExecutor(min(usable_cores(), 32)) as pool:
        try:
            yield from pool.map(lambda row: _look(found, label_map, told, row), rows_of(found))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _look(found: Found, label_map: LabelMap | None, told: native_stderr.Captured, row: dict[str, Any]) -> _Looked:
    from dgbench.data.dataset import decoded, image_bytes, label_path, turned_apart
    from dgbench.data.decode import read_stored
    from dgbench.data.images import orientation

    image, path = str(row["id"]), label_path(row)
    label = path.relative_to(found.folder).as_posix() if path.is_relative_to(found.folder) else str(path)
    problems: list[Problem] = []
    size, label_size, counts, one_color, turned = None, None, None, False, False
    before = told.size()
    try:
        data = image_bytes(row)
        pixels = decoded(row, data)
        size, one_color, turned = pixels.shape[:2], _of_one_color(pixels), orientation(data) != 1
        if problem := turned_apart(row, data):
            problems.append(Problem("turned", image, problem))
    except DataError as error:
        problems.append(Problem("unreadable", image, error.message.removeprefix(f"{row['image']['path'] or image} ")))
    suspect = row if size is not None and told.size() > before else None
    try:
        any_map = label_map or LabelMap("", {}, frozenset())
        stored = read_stored(path, any_map, found.layout.encoding, row["label"]["bytes"])
        label_size, counts = stored.shape, np.bincount(stored.ravel())
    except DataError as error:
        problems.append(Problem("unreadable", label, error.message.removeprefix(f"{path} ")))
    if size is not None and label_size is not None and size != label_size:
        detail = f"the image is {size[1]}x{size[0]}, its label {label} {label_size[1]}x{label_size[0]}"
        problems.append(Problem("sizes differ", image, detail))
    if counts is not None and label_map is not None and (strange := label_map.strangers(np.flatnonzero(counts).tolist())):
        listed = ", ".join(map(str, strange[:8])) + (", ..." if len(strange) > 8 else "")
        problems.append(Problem("unknown values", label, f"{listed} not in the label map `{label_map.name}`"))
    return _Looked(image, size, one_color, turned, suspect, counts, tuple(problems))


def _of_one_color(pixels: NDArray[np.uint8]) -> bool:
    first = pixels[0, 0]
    # a few pixels are enough for nearly every image
    return bool((pixels[::32, ::32] == first).all() and (pixels == first).all())


class _Tally:
    """Sum of the checks of pairs."""

    def __init__(self, found: Found, label_map: LabelMap | None) -> None:
        self.found, self.label_map = found, label_map
        self.problems: list[Problem] = []
        self.one_color: list[str] = []
        self.turned: list[str] = []
        self.suspects: dict[str, dict[str, Any]] = {}
        self.sizes: Counter[str] = Counter()
        self.pixels: Counter[int] = Counter()
        self.images: Counter[int] = Counter()
        self.class_images: Counter[int] = Counter()

    def add(self, looked: _Looked) -> None:
        self.problems += looked.problems
        if looked.size is not None:
            self.sizes[f"{looked.size[1]}x{looked.size[0]}"] += 1
        if looked.one_color:
            self.one_color.append(looked.image)
        if looked.turned:
            self.turned.append(looked.image)
        if looked.suspect is not None:
            self.suspects[looked.image] = looked.suspect
        if looked.counts is None:
            return
        present = np.flatnonzero(looked.counts).tolist()
        self.pixels.update({value: int(looked.counts[value]) for value in present})
        self.images.update(present)
        if self.label_map is not None:
            self.class_images.update({self.label_map.classes[value] for value in present if value in self.label_map.classes})

    def ask_again(self) -> None:
        """Decode one by one the images of which a decoder may have warned."""
        from dgbench.data.dataset import image_bytes
        from dgbench.data.images import decoder_warning

        for image, row in self.suspects.items():
            if warning := decoder_warning(image_bytes(row)):
                self.problems.append(Problem("damaged", image, f"the decoder says: {warning}"))

    def report(self) -> Report:
        found, layout = self.found, self.found.layout
        known = found.domain.splits[found.split].known_bad
        bad = {image: f"{problem}; {known[stem(image)]}" for image, problem in found.left_out.items()}
        bad |= {path: known[stem(path)] for path in (*found.unlabelled, *found.imageless) if stem(path) in known}
        lost = [Problem("no label", path, "its label is not on this disk") for path in found.unlabelled]
        lost += [Problem("no image", path, "its image is not on this disk") for path in found.imageless]
        self.problems += [problem for problem in lost if problem.file not in bad]
        class_pixels = self._class_pixels()
        if self.label_map is not None and self.pixels and not class_pixels:
            held = ", ".join(map(str, sorted(self.pixels)[:8]))
            detail = f"the labels only hold {held}, and no pixel has a class of the label map `{self.label_map.name}`"
            self.problems.append(Problem("nothing labelled", "all labels", detail))
        labelled = max(sum(class_pixels.values()), 1)
        classes = list(enumerate(NAMES)) if self.label_map is not None else []
        return Report(
            domain=found.domain.name,
            split=found.split,
            folder=found.folder,
            layout=layout.name,
            note=layout.note,
            label_map=self.label_map.name if self.label_map else None,
            n_pairs=len(found),
            n_missing=max(0, found.expected - len(found)),
            n_extra=found.extra,
            rendered=found.rendered,
            problems=tuple(self.problems),
            known_bad=bad,
            one_color=tuple(self.one_color),
            turned=tuple(self.turned),
            sizes=dict(self.sizes.most_common()),
            values=self._values(),
            shares={name: class_pixels[i] / labelled for i, name in classes},
            n_images={name: self.class_images[i] for i, name in classes},
        )

    def _class_pixels(self) -> Counter[int]:
        totals: Counter[int] = Counter()
        for value, n in self.pixels.items():
            if self.label_map is not None and value in self.label_map.classes:
                totals[self.label_map.classes[value]] += n
        return totals

    def _values(self) -> tuple[Value, ...]:
        names = _legend(self.found) if self.label_map is None else {}
        return tuple(
            Value(
                value,
                names.get(value, "unknown") if self.label_map is None else _meaning(value, self.label_map),
                self.pixels[value],
                self.images[value],
            )
            for value in sorted(self.pixels)
        )


def _meaning(value: int, label_map: LabelMap) -> str:
    if value in label_map.classes:
        return NAMES[label_map.classes[value]]
    return "ignored" if value in label_map.ignored or value == IGNORE else "unknown"


def _legend(found: Found) -> dict[int, str]:
    """Return the data set's own names for its values, from the JSON that it comes with (Mapillary's form)."""
    path = found.folder / found.domain.legend
    if not found.domain.legend or not path.is_file():
        return {}
    try:
        return {value: str(label["readable"]) for value, label in enumerate(json.loads(path.read_bytes())["labels"])}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} does not name the labels: {error}", "unpack it again from the official archive") from None
