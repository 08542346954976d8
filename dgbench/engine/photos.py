"""Which photographs are meant, and what the files that are made of them are called."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dgbench.data.dataset import read_photo
from dgbench.data.images import SUFFIXES
from dgbench.errors import DataError

# what is made of a photograph, by the end of its file's name
KINDS = ("overlay", "color", "train-ids", "label-ids", "side-by-side")


def listed(given: Sequence[Path]) -> list[Path]:
    """Return the files, with the images of folders in their place, each once.

    Raises: DataError for a folder without images.
    """
    found: dict[Path, Path] = {}
    for path in given:
        files = [path]
        if path.is_dir():
            files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and not p.is_dir() and p.name[0] != ".")
            photographs = {p.stem for p in files}
            made = {f"{stem}-{kind}" for stem in photographs for kind in KINDS}  # written beside their photographs
            files = [p for p in files if p.stem not in made]
            if not files:
                raise DataError(f"no image in {path}", _elsewhere(path))
        for file in files:
            found.setdefault(place(file), file)
    return list(found.values())


def _elsewhere(folder: Path) -> str:
    """Return what to do where a folder itself holds no image."""
    below = next((p.parent for p in sorted(folder.rglob("*")) if p.suffix.lower() in SUFFIXES and p.is_file()), None)
    if below is not None:
        return f"subfolders are not searched: give those that hold images, as {below}"
    return f"images end in {', '.join(SUFFIXES)}"


def place(path: Path) -> Path:
    """Where a file lies, however its path is written."""
    return path.resolve()


def file_names(photos: Sequence[Path]) -> list[str]:
    """How the names of each photograph's files begin: as its own; where that is not enough, with its folders and suffix, too."""
    stems = Counter(photo.stem.casefold() for photo in photos)
    names = [photo.stem if stems[photo.stem.casefold()] == 1 else _long_name(photo, photos) for photo in photos]
    if len({name.casefold() for name in names}) < len(names):
        names = [f"{n:0{len(str(len(photos)))}d}-{photo.stem}" for n, photo in enumerate(photos, 1)]
    return names


def _long_name(photo: Path, photos: Sequence[Path]) -> str:
    alike = [place(p) for p in photos if p.stem.casefold() == photo.stem.casefold()]
    parts = place(photo).relative_to(os.path.commonpath([p.parent for p in alike])).parts
    same_folder = sum(p.parent == place(photo).parent for p in alike) > 1
    return "-".join([*parts[:-1], photo.name.replace(".", "-") if same_folder else photo.stem])


def refuse_unreadable(photos: Sequence[Path]) -> None:
    """Read every photograph: a bad file then costs no model time.

    Raises: DataError naming every one that cannot be read.
    """
    problems = []
    for photo in photos:
        try:
            read_photo(photo)
        except DataError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        lines = "".join(f"\n  {error.message}" for error in problems)
        raise DataError(f"{len(problems)} of {len(photos)} photographs cannot be read:{lines}", "leave them out, or repair them")


def refuse_replaced(photos: Sequence[Path], targets: Sequence[Path], kind: str) -> None:
    """Raise a DataError if what is written would replace a photograph."""
    places = {place(photo) for photo in photos}
    if over := next((target for target in targets if place(target) in places), None):
        raise DataError(f"{over} is one of the photographs: its {kind} would replace it", "give another --out")
