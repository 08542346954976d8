"""Assembly of a domain's folder from archives, so that a loader finds a complete data set or none, even after a kill.

All work is done beside the target, in `.dgbench-download/<folder>/`: `archives/` holds what was transferred, `parts/` what
each archive unpacked to, with a receipt once it is complete, `tree/` the folder being assembled. The manifest is written
into it last, and the tree is renamed into place. If the folder exists already, files are added to it while a marker
(`UNFINISHED`) in it makes loaders refuse it.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dgbench import __version__, atomic
from dgbench.data.domain import UNFINISHED
from dgbench.download import archives
from dgbench.download.transfer import FULL, FullDiskError
from dgbench.errors import DataError

MANIFEST = "dgbench-manifest.json"
_HIDDEN = ".dgbench-download"
_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Receipt:
    """One archive and the files that it unpacked to: a row of the manifest."""

    name: str
    source: str  # URL or path it came from
    bytes: int
    sha256: str
    md5: str | None
    covers: tuple[str, ...]  # the archives of the source's table that it replaces
    files: dict[str, int] = field(default_factory=dict)  # path below the folder -> bytes


@dataclass(frozen=True, slots=True)
class Manifest:
    """The files that dgbench put into a folder. After a power cut some may be empty: `lost` finds them by their size."""

    domain: str
    receipts: tuple[Receipt, ...]
    revision: str | None = None  # of a Hub repository

    def lost(self, folder: Path) -> set[str]:
        """Return the archives of the table of which files are missing or have another size now."""
        sizes = sizes_below(folder)
        return {
            name for r in self.receipts for name in r.covers if any(sizes.get(path) != size for path, size in r.files.items())
        }

    def covered(self) -> set[str]:
        """Return the archives of the table that are in the folder."""
        return {name for receipt in self.receipts for name in receipt.covers}

    def totals(self) -> tuple[int, int]:
        """Return number of files and bytes."""
        return sum(len(r.files) for r in self.receipts), sum(sum(r.files.values()) for r in self.receipts)


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a folder; None if dgbench did not make it, or has not finished it."""
    return None if (folder / UNFINISHED).exists() else _stored(folder)


def _stored(folder: Path) -> Manifest | None:
    try:
        found = json.loads((folder / MANIFEST).read_text())
        if found["schema"] != _SCHEMA:
            return None
        return Manifest(found["domain"], tuple(map(_receipt, found["archives"])), found.get("revision"))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def sizes_below(folder: Path) -> dict[str, int]:
    """Return the size of every file below a folder by its relative path."""
    found: dict[str, int] = {}
    stack = [(str(folder), "")]
    while stack:
        place, prefix = stack.pop()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(place) as entries:
            for entry in entries:
                if entry.is_dir():
                    stack.append((entry.path, f"{prefix}{entry.name}/"))
                else:
                    with contextlib.suppress(FileNotFoundError):
                        found[prefix + entry.name] = entry.stat().st_size
    return found


class Stage:
    """The working folder in which one domain's folder is assembled."""

    def __init__(self, target: Path) -> None:
        self.target = target
        # beside the folder itself if the name is a link: renames are only atomic within one disk
        real = target.resolve()
        self.home = real.parent / _HIDDEN / real.name
        self._real = real
        self._lock = self.home.with_name(f"{real.name}.lock")
        self._parts = self.home / "parts"
        self._tree = self.home / "tree"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock this folder against other dgbench processes.

        Raises: DataError if one does.
        """
        from filelock import FileLock, Timeout

        root = self.home.parent.parent
        new_root = not root.exists()
        self.home.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._lock, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise DataError(f"another dgbench is downloading into {self.target}", "wait until it ends, or stop it") from None
        try:
            yield
        finally:
            lock.release()
            with contextlib.suppress(OSError):
                self._lock.unlink(missing_ok=True)
                self.home.parent.rmdir()
                if new_root:
                    root.rmdir()

    def archive(self, name: str) -> Path:
        """Return where an archive of this name is transferred to."""
        return self.home / "archives" / name

    @property
    def tree(self) -> Path:
        """The folder being assembled; made at first use."""
        self._tree.mkdir(parents=True, exist_ok=True)
        return self._tree

    def covered(self) -> set[str]:
        """Return the archives of the table that need no transfer: complete in the folder, or unpacked and waiting."""
        stored = _stored(self._real)
        in_place = stored.covered() - stored.lost(self._real) if stored else set()
        return in_place | {name for receipt in self.receipts() for name in receipt.covers}

    def receipts(self) -> list[Receipt]:
        """Return the receipts of archives that are unpacked and wait for the others."""
        found = []
        for path in sorted(self._parts.glob("*.receipt.json")):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                found.append(_receipt(json.loads(path.read_text())))
        return found

    def kept_bytes(self) -> int:
        """Return the bytes of archives from earlier tries, whole or in part."""
        return sum(path.stat().st_size for path in self.archive("x").parent.glob("*") if path.suffix != ".json")

    def unpack(
        self,
        archive: Path,
        receipt: Receipt,
        place: Callable[[str], str | None],
        advance: Callable[[int], None],
        check: Callable[[Iterable[str]], None],
    ) -> Receipt:
        """Unpack an archive beside the others; files of an interrupted try are removed first.

        Args:
            receipt: all but its files.    place, advance: as of `archives.unpack`.
            check: called with the paths; raises if they are not what the archive should hold.

        Raises: what `archives.unpack` and `check` raise; FullDiskError when the disk fills up.
        """
        half, whole = self._parts / f".{receipt.name}.unpacking", self._parts / receipt.name
        self._parts.mkdir(parents=True, exist_ok=True)
        self._receipt_path(receipt.name).unlink(missing_ok=True)
        archives.remove(half)
        archives.remove(whole)
        try:
            files = archives.unpack(archive, half, place, advance=advance)
            if ours := {MANIFEST, UNFINISHED} & {path.partition("/")[0] for path in files}:
                raise archives.ArchiveError(
                    f"{archive.name} holds `{min(ours)}`, which only dgbench writes", "get it from the data set's own site"
                )
            check(files)
        except OSError as error:
            archives.remove(half)
            if error.errno in FULL:
                raise FullDiskError(
                    f"the disk is full: {archive.name} does not fit into {self.home.parent.parent} unpacked; the archive is kept "
                    f"in {archive}",
                    "make room there, or point --root or DGBENCH_DATA at a larger disk; then run the same command again",
                ) from None
            raise
        except BaseException:
            archives.remove(half)
            raise
        half.rename(whole)
        done = replace(receipt, files=files)
        atomic.write(self._receipt_path(receipt.name), json.dumps(asdict(done)))
        return done

    def finish(self, domain: str, revision: str | None = None, extra: Iterable[Receipt] = ()) -> Manifest:
        """Put the unpacked files into place, write the manifest and remove the working folder.

        Args:
            extra: receipts of files that were put into `tree` directly.

        Raises: DataError if the folder holds other files of the same names.
        """
        new = [*self.receipts(), *extra]
        for receipt in new:
            _merge(self._parts / receipt.name, self.tree)
        before = _stored(self._real)
        old = [r for r in before.receipts if r.name not in {n.name for n in new}] if before else []
        manifest = Manifest(domain, _one_owner_each([*new, *old]), revision)
        text = json.dumps(
            {
                "schema": _SCHEMA,
                "domain": domain,
                "revision": revision,
                "dgbench": __version__,
                "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "archives": [asdict(r) for r in manifest.receipts],
            }
        )
        for folder in (self.tree, self._real):
            for left in folder.glob(f".{MANIFEST}.*.tmp"):  # left by a killed try
                left.unlink()
        if not self._real.exists() or not any(self._real.iterdir()):
            atomic.write(self.tree / MANIFEST, text)
            if self._real.exists():
                self._real.rmdir()
            self._real.parent.mkdir(parents=True, exist_ok=True)
            os.rename(self.tree, self._real)
            atomic.sync_folder(self._real.parent)
        else:
            self._check_clashes(before)
            (self._real / UNFINISHED).write_text("dgbench download is adding files to this folder; run it again to finish\n")
            _merge(self.tree, self._real, overwrite=True)
            atomic.write(self._real / MANIFEST, text)
            (self._real / UNFINISHED).unlink()
        self.clear()
        return manifest

    def clear(self) -> None:
        """Remove the working folder."""
        archives.remove(self.home)

    def sweep(self) -> None:
        """Remove the files of a try that was killed after its folder was put into place."""
        if self.home.exists() or self._lock.exists():
            with contextlib.suppress(DataError), self.locked():
                self.clear()
        with contextlib.suppress(OSError):
            self.home.parent.rmdir()

    def _receipt_path(self, name: str) -> Path:
        return self._parts / f"{name}.receipt.json"

    def _check_clashes(self, before: Manifest | None) -> None:
        ours = {path for r in before.receipts for path in r.files} if before else set()
        there = sizes_below(self._real)
        for path, size in sizes_below(self.tree).items():
            if path not in ours and there.get(path, size) != size:
                raise DataError(
                    f"{self.target / path} is there already and is not the file that was downloaded "
                    f"({there[path]:,} bytes, the official one has {size:,})",
                    f"move {self.target} away, then run the same command again: nothing needs to be transferred twice",
                )


def _one_owner_each(receipts: Iterable[Receipt]) -> tuple[Receipt, ...]:
    """Assign each file to one archive: where several hold the same README, to the first."""
    taken: set[str] = set()
    owners = []
    for receipt in receipts:
        files = {path: size for path, size in receipt.files.items() if path not in taken}
        taken |= set(files)
        owners.append(replace(receipt, files=files))
    return tuple(owners)


def _receipt(data: dict[str, Any]) -> Receipt:
    return Receipt(**{**data, "covers": tuple(data["covers"])})


def _merge(source: Path, into: Path, *, overwrite: bool = False) -> None:
    """Move everything below `source` into `into`, by a rename for each new file or folder; can be repeated after a kill.

    A file that is there already stays, or is replaced.
    """
    if not source.is_dir():
        return
    into.mkdir(parents=True, exist_ok=True)
    for entry in sorted(source.iterdir()):
        target = into / entry.name
        if entry.is_dir() and target.is_dir():
            _merge(entry, target, overwrite=overwrite)
        elif not target.exists() or (overwrite and not entry.is_dir() and not target.is_dir()):
            os.replace(entry, target)
        elif entry.is_dir() or target.is_dir():
            raise DataError(f"{target} is there already, as a {'folder' if target.is_dir() else 'file'}", f"move {into} away")
        else:
            entry.unlink()
    source.rmdir()
