"""The files of a split on the disk: its layout, pairs of image and label, and files without a counterpart.

Pairs are made by path: a label's path is derived from its image's. `index` returns a `datasets.Dataset` with the same columns
for files in folders (paths) and rows that were fetched from a Hub (bytes).
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from dgbench.data import hub_sets
from dgbench.data.domain import RENDERED, UNFINISHED, Domain, Layout, outside, replaced
from dgbench.data.files import DAMAGED, content, opened
from dgbench.data.places import data_root
from dgbench.errors import DataError

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True, slots=True)
class Found:
    """The files of a split. Paths are relative to `folder`."""

    domain: Domain
    split: str
    folder: Path
    layout: Layout
    pairs: tuple[tuple[str, str], ...] = ()  # (image, label)
    unlabelled: tuple[str, ...] = ()  # images whose label is missing
    imageless: tuple[str, ...] = ()  # labels whose image is missing
    left_out: Mapping[str, str] = field(default_factory=dict)  # image of a known bad pair -> what is wrong with it
    rows: int = 0  # of a Hub's rows; `pairs` is empty then
    rendered: bool = False  # written by `dgbench data export`: rendered scenes, not the published set

    def __len__(self) -> int:
        return self.rows or len(self.pairs)

    @property
    def expected(self) -> int:
        """Images in the complete split, without those that are known to be bad; there may be more on the disk."""
        split = self.domain.splits[self.split]
        count = self.layout.count or split.count
        if count is None:
            return len(self)
        lost = len(self.left_out) + sum(1 for image in self.unlabelled if stem(image) in split.known_bad)
        return count - lost

    @property
    def extra(self) -> int:
        """Images on the disk beyond those of the complete split."""
        return max(0, len(self) - self.expected)

    def label_files(self, count: int) -> list[Path]:
        """Return the files that hold the labels of the first `count` pairs."""
        if self.rows:
            return sorted(path for path in (self.folder / self.layout.images).rglob("*") if path.is_file())
        labels = [self.folder / label for _, label in self.pairs[:count]]
        # the file beside the folder of labels that gives each segment's category, in some encodings
        beside = {path.parent.with_suffix(".json") for path in labels}
        return [*labels, *sorted(path for path in beside if path.is_file())]

    def revision(self) -> str:
        """Return what identifies pixels and labels: the domain's revision, and how these files differ from the published ones."""
        layout = "" if self.layout.revision == "official" else self.layout.revision
        return ", ".join(filter(None, (self.domain.revision(), layout, "rendered" if self.rendered else "")))


@dataclass(frozen=True, slots=True)
class Index:
    """A split ready to be read: `rows` has the columns id (string), image and label ({"path", "bytes"})."""

    found: Found
    rows: datasets.Dataset


def index(domain: Domain, split: str, root: Path | None = None) -> Index:
    """Find a split and make a `datasets.Dataset` of it. `id` is the image's path below the domain's folder.

    Raises: DataError if the folder or every pair is missing.
    """
    found = require(domain, split, root)
    return Index(found, rows_of(found))


def require(domain: Domain, split: str, root: Path | None = None) -> Found:
    """Find a split of which there is a pair.

    Raises: DataError if the folder or every pair is missing.
    """
    found = find(domain, split, root)
    if not len(found):
        raise _no_pairs(found)
    return found


def rows_of(found: Found) -> datasets.Dataset:
    """Return the pairs of a split as rows: id (string), image and label ({"path", "bytes"})."""
    import datasets

    if found.rows:
        return hub_sets.opened(found.folder / found.layout.images)
    features = datasets.Features(
        {"id": datasets.Value("string"), "image": datasets.Image(decode=False), "label": datasets.Image(decode=False)}
    )
    if odd := next((path for pair in found.pairs for path in pair if not _is_text(str(found.folder / path))), None):
        raise DataError(
            f"{str(found.folder / odd)!r} is no name in UTF-8, in which records are written",
            "rename such files; all of a folder from Latin-1: convmv -r -f latin1 -t utf-8 --notest FOLDER",
        )
    columns = {
        "id": [image for image, _ in found.pairs],
        "image": [{"path": str(found.folder / image), "bytes": None} for image, _ in found.pairs],
        "label": [{"path": str(found.folder / label), "bytes": None} for _, label in found.pairs],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def find(domain: Domain, split: str, root: Path | None = None) -> Found:
    """Find a split's files: the layout with the most pairs, in case of a tie the first.

    Raises: DataError if there is no folder, or no image in any layout.
    """
    domain.require_split(split)
    base = data_root(root)
    best: Found | None = None
    for folder in domain.roots(base):
        if (folder / UNFINISHED).exists():
            raise DataError(
                f"files are being added to {folder}, or that was interrupted",
                f"wait until it ends, or finish it: dgbench download {domain.name}",
            )
        files = _Files(folder)
        for layout in domain.splits[split].layouts:
            here = _in_layout(domain, split, layout, files)
            if here is not None and (best is None or len(here) > len(best)):
                best = here
            if best is not None and len(best) == domain.splits[split].count:
                break
        rows = _in_hub(domain, split, folder)
        if rows is not None and (best is None or not len(best)):
            best = rows
    if best is None:
        raise _not_here(domain, split, base)
    return _complete(best)


def _complete(found: Found) -> Found:
    """Add what is only searched in the chosen layout: labels without images, and checks of known bad pairs."""
    rendered = _rendered(found)
    if found.rows:
        return replace(found, rendered=rendered)
    files = _Files(found.folder)
    split = found.domain.splits[found.split]
    bad = {
        image: problem
        for image, label in found.pairs
        if stem(image) in split.known_bad and (problem := mismatch(found.folder / image, found.folder / label))
    }
    pairs = tuple(pair for pair in found.pairs if pair[0] not in bad)
    imageless: tuple[str, ...] = ()
    labels = label_of(found.layout.images, found.layout)
    if not found.layout.only and labels != found.layout.images:
        images = [*(image for image, _ in found.pairs), *found.unlabelled]
        wanted = {label_of(image, layout) for image in images for layout in split.layouts}
        imageless = tuple(label for label in files.matching(labels) if label not in wanted)
    return replace(found, pairs=pairs, imageless=imageless, left_out=bad, rendered=rendered)


def _rendered(found: Found) -> bool:
    """Return whether a folder of its files, or one above it, was made by an export."""
    folders = {""}
    for path in (found.layout.images,) if found.rows else (path for pair in found.pairs for path in pair):
        parent = path if found.rows else path.rpartition("/")[0]
        while parent not in folders:
            folders.add(parent)
            parent = parent.rpartition("/")[0]
    return any(os.path.lexists(found.folder / folder / RENDERED) for folder in folders)


def label_of(image: str, layout: Layout) -> str:
    """Return the path of an image's label, both relative to the domain's folder.

    Raises: DataError if the replacements lead outside this folder.
    """
    label = replaced(image, layout.to_label)
    if outside(label):
        raise DataError(
            f"the label of {image} would be {label}, which is not below the domain's folder",
            "rename the file, or change `labels` of the domain's declaration",
        )
    return label


def stem(path: str) -> str:
    """Return a file's name without folders and suffix."""
    return path.rpartition("/")[2].rpartition(".")[0]


_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")


def mismatch(image: Path, label: Path) -> str | None:
    """Return what is wrong with a pair according to the files' headers; None if nothing is."""
    sizes = []
    for path in (image, label):
        try:
            with opened(path, "image") as source, Image.open(source, formats=_FORMATS) as file:
                sizes.append(file.size)
        except (DataError, *DAMAGED):
            return f"{path.name} cannot be read"
    (w, h), (label_w, label_h) = sizes
    return None if sizes[0] == sizes[1] else f"the image is {h}x{w} (H x W), its label {label_h}x{label_w}"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


class _Files:
    """A folder whose sub-folders are listed once each, since asking a file server for 25,000 single files is slow."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.listed = cache(self._listed)

    def _listed(self, relative: str) -> tuple[frozenset[str], frozenset[str]]:
        """Return the names of everything in a folder, and of the folders among them."""
        try:
            # names that start with a dot are files of other programs
            entries = [entry for entry in os.scandir(self.folder / relative) if not entry.name.startswith(".")]
        except (FileNotFoundError, NotADirectoryError):
            entries = []
        return frozenset(e.name for e in entries), frozenset(e.name for e in entries if _is_folder(e))

    def has(self, path: str) -> bool:
        parent, _, name = path.rpartition("/")
        return name in self.listed(parent)[0]

    def matching(self, pattern: str) -> list[str]:
        """Return the paths that match a glob, sorted; `*` does not cross a `/`."""
        return sorted(self._walk("", pattern.split("/")))

    def _walk(self, parent: str, parts: Sequence[str]) -> Iterator[str]:
        first, rest = parts[0], parts[1:]
        names = self.listed(parent)[1 if rest else 0]
        matched = fnmatch.filter(names, first) if any(c in first for c in "*?[") else [first] * (first in names)
        for name in matched:
            path = f"{parent}/{name}" if parent else name
            if rest:
                yield from self._walk(path, rest)
            else:
                yield path


def _in_layout(domain: Domain, split: str, layout: Layout, files: _Files) -> Found | None:
    images = files.matching(layout.images)
    if layout.only:
        listed = next((files.folder / place for place in layout.only if files.has(place)), None)
        if listed is None:
            return None
        names = set(content(listed, "list of names").decode(errors="surrogateescape").split())
        images = [image for image in images if image.rpartition("/")[2] in names or stem(image) in names]
    if not images:
        return None
    labelled = [(image, label_of(image, layout)) for image in images]
    pairs = tuple(pair for pair in labelled if files.has(pair[1]))
    unlabelled = tuple(image for image, label in labelled if not files.has(label))
    return Found(domain, split, files.folder, layout, pairs, unlabelled)


def _in_hub(domain: Domain, split: str, folder: Path) -> Found | None:
    layout = hub_sets.layout(folder, split)
    if layout is None:
        return None
    return Found(domain, split, folder, layout, rows=len(hub_sets.opened(folder / layout.images)))


def _not_here(domain: Domain, split: str, root: Path) -> DataError:
    layouts = domain.splits[split].layouts
    if not layouts:
        return DataError(f"`{domain.name}` {split} is not below {root} any more", "fetch it again: dgbench download --hub")
    first, folder = layouts[0], domain.root(root)
    if folder is None and domain.access == "own":
        return DataError(
            f"`{domain.name}` is not on this disk: no folder {root / domain.folders[0]}",
            "its declaration says `folder`: below the data root, or an absolute path",
        )
    if folder is None:
        return DataError(
            f"`{domain.name}` is not on this disk: no folder {' or '.join(f'`{f}`' for f in domain.folders)} in {root}",
            f"run: dgbench download {domain.name}, or get it from {domain.homepage} ({domain.access}) so that "
            f"`{root / domain.folders[0] / first.images}` finds its images, or point --root or "
            "DGBENCH_DATA at the folder that holds it",
        )
    others = {layout.images: None for layout in layouts[1:] if layout.images != first.images}
    also = f", nor {' nor '.join(others)}" if others else ""
    return DataError(
        f"`{domain.name}` {split}: no image matches {folder / first.images}{also}",
        f"unpack the official archives into {folder} without renaming; see {domain.homepage}"
        if domain.access != "own"
        else "its declaration says `images`: a glob below its folder, whose `*` does not cross a `/`",
    )


def _no_pairs(found: Found) -> DataError:
    images = found.unlabelled
    if not images:
        return DataError(f"`{found.domain.name}` {found.split}: every pair is known to be bad", "download the set again")
    return DataError(
        f"`{found.domain.name}` {found.split}: {len(images)} of {len(images)} images have no label; the first missing file "
        f"is {found.folder / label_of(images[0], found.layout)}",
        "unpack the label archive; `dgbench data verify` lists what is missing",
    )
