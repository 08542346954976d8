"""Files that a user already has (`--from`): archives, recognised by name or content, or an unpacked tree."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dgbench.data.domain import Domain
from dgbench.download import archives
from dgbench.download.sources import Archive, Source, matches
from dgbench.errors import DataError

_LOOK = 5000  # members of a tar that are checked, since it has no table of contents


@dataclass(frozen=True, slots=True)
class Given:
    """An archive of the user's, and the archives of the table that it replaces."""

    path: Path
    covers: tuple[str, ...]


def check(paths: Sequence[Path]) -> None:
    """Check that all given paths exist. Raises: DataError naming the first one that does not."""
    for path in paths:
        if not path.exists():
            raise DataError(
                f"no such file or folder: {path}",
                "--from takes an archive, a folder of archives, an unpacked tree, or a tower's file of weights",
            )


def archives_for(source: Source, paths: Sequence[Path]) -> list[Given]:
    """Return the archives in or below the given folders (one deep) that belong to a source; each of its table at most once.

    Raises: DataError for an archive that has an official name and other content.
    """
    found: list[Given] = []
    taken: set[str] = set()
    files = [*_files(paths)]
    wanted = {archive.name for archive in source.archives}
    for by_name in (True, False):
        if wanted <= taken:
            break
        for path in files:
            names = _named(source, path) if by_name else _recognised(source, path)
            if names and not taken & set(names) and path not in {given.path for given in found}:
                found.append(Given(path, names))
                taken |= set(names)
    return found


def trees(row: Domain, paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Return folders that may hold a domain unpacked: the given ones and those just below with its name, inner ones first."""
    folders = [path for path in paths if path.is_dir()]
    named = [child for path in folders for child in sorted(path.iterdir()) if child.is_dir() and child.name in row.folders]
    # bdd100k/bdd100k: some archives repeat the name
    inner = [child / child.name for child in [*named, *folders] if (child / child.name).is_dir()]
    return folders, [*inner, *named]


def holds_all(folder: Path, source: Source) -> bool:
    """Return whether a folder holds the content of all archives of a source."""
    needed = [archive for archive in source.archives if archive.needed]
    return bool(needed) and all(holds(folder, archive) for archive in needed)


def holds(folder: Path, archive: Archive) -> bool:
    """Return whether a folder holds an archive's content: at least one file for each glob."""
    return all(any(next(folder.glob(one), None) for one in glob.split("|")) for glob in archive.gives)


def lacks(archive: Archive, files: Iterable[str]) -> str | None:
    """Return the first glob of an archive that none of the paths matches."""
    paths = list(files)
    return next((glob for glob in archive.gives if not any(matches(path, glob) for path in paths)), None)


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_file():
            yield path
        else:
            folders = [path, *(child for child in sorted(path.iterdir()) if child.is_dir())]
            yield from (file for folder in folders for file in sorted(folder.iterdir()) if archives.is_archive(file))


def official_name(path: Path) -> str:
    """Return an archive's name without a browser's suffix for a second download: `set (1).zip`."""
    return re.sub(r" ?\(\d+\)(?=\.)", "", path.name)


def _named(source: Source, path: Path) -> tuple[str, ...]:
    name = official_name(path)
    archive = next((a for a in source.archives if name == a.name or name in a.other_names), None)
    if archive is None:
        return ()
    if path.name.lower().endswith(".zip") and (glob := lacks(archive, map(source.place, archives.members(path)))):
        raise DataError(
            f"{path} has the name of an archive of `{source.domain}`, but holds no `{glob}`",
            "it is another file of that name, or damaged: move it away, or download it again",
        )
    return (archive.name,)


def _recognised(source: Source, path: Path) -> tuple[str, ...]:
    gives = [archive.gives for archive in source.archives]
    # archives with the same kind of files (parts) are only distinguished by name
    candidates = [archive for archive in source.archives if gives.count(archive.gives) == 1]
    if not candidates:
        return ()
    tar = not path.name.lower().endswith(".zip")
    try:
        files = [source.place(member) for member in archives.members(path, _LOOK if tar else None)]
    except DataError:
        return ()  # a folder of downloads may hold other archives
    if tar:
        return tuple(a.name for a in candidates if any(matches(file, glob) for glob in a.gives for file in files))
    return tuple(a.name for a in candidates if lacks(a, files) is None)
