"""Listing and safe unpacking of untrusted archives: nothing is written outside the folder.

zip (also split into volumes), tar (plain, gz, bz2, xz) and rar, recognised by their first bytes. Every member's path is
normalised and checked; links, devices and pipes are refused; what is written is counted against what was declared, the
archive's own size and the space on the disk. The target folder must be a new one, so that it contains no
links. There is no free reader of rar in Python: `bsdtar` converts it to a tar stream, or `unrar` unpacks it into its own folder.
A flipped bit is detected except in two cases: a plain tar, which only has checksums of its headers, and a rar that bsdtar
reads (libarchive 3.6 does not check what is stored uncompressed).
"""

from __future__ import annotations

import contextlib
import errno
import lzma
import os
import re
import shutil
import stat
import struct
import subprocess
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

from dgbench.download.tars import TooMuchError, is_tar, open_tar, tar_entries
from dgbench.download.volumes import open_zip, volumes
from dgbench.errors import DataError

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".rar")
_BLOCK = 1 << 20
# the last two are raised by Python's readers for unexpected numbers, names and nesting
_DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    struct.error,
    ValueError,
    RecursionError,
)
_SHOWN = 200  # characters of a member's name in a message


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_TAR_HEADERS = 1 << 30  # of a tar stream, beside its files: 2 kB for each


class ArchiveError(DataError):
    """An archive is damaged, of an unknown kind, or not safe to unpack; nothing of it is used."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits that archives of data sets stay below, and that a zip bomb exceeds."""

    ratio: float = 100.0  # unpacked bytes over packed ones ...
    always: int = 1 << 30  # ... where they are more than this
    files: int = 500_000  # and folders


@dataclass(frozen=True, slots=True)
class Member:
    """One file or folder of an archive."""

    path: str  # normalised: relative, forward slashes
    size: int  # as declared
    folder: bool
    open: Callable[[], IO[bytes]]


def is_archive(path: Path) -> bool:
    """Return whether a file has the name of an archive; the volumes before a split zip's last do not count."""
    return path.name.lower().endswith(SUFFIXES) and path.is_file()


def packed_size(path: Path) -> int:
    """Return the bytes of the archive with all its volumes."""
    return sum(volume.stat().st_size for volume in volumes(path))


def members(path: Path, limit: int | None = None) -> list[str]:
    """Return the paths of an archive's files, at most the first `limit`; none for a rar, which needs a program to be listed.

    Raises: ArchiveError as `unpack` does.
    """
    if _kind(path) == "rar":
        return []
    found = []
    limits = Limits()
    with _reading(path), _opened(path, _allowed(path, limits), path) as entries:
        for count, member in enumerate(entries):
            _check_count(path, count, limits)
            if not member.folder:
                found.append(member.path)
            if limit is not None and len(found) >= limit:
                break
    return found


def unpack(
    path: Path,
    into: Path,
    place: Callable[[str], str | None] = lambda name: name,
    *,
    limits: Limits | None = None,
    advance: Callable[[int], None] = lambda _n: None,
) -> dict[str, int]:
    """Unpack an archive into a folder that does not exist yet; return the size of each file by its path there.

    Args:
        place: returns the path below `into` of a member with the given path, or None to skip it.
        advance: called with the number of bytes written; may raise an exception to stop.

    Raises: ArchiveError for damage, a member that would leave the folder, a link or a device, a path given twice, or more
        bytes or files than `limits` allow; DataError if the disk has too little space; OSError if it fills up.
    """
    limits = limits or Limits()
    allowed = _allowed(path, limits)
    into.mkdir(parents=True)
    _check_declared(path, into, allowed)
    written: dict[str, int] = {}
    total = 0
    with _reading(path), _opened(path, allowed, into) as entries:
        for number, member in enumerate(entries):
            _check_count(path, number, limits)
            target = None if member.folder or _clutter(member.path) else place(member.path)
            if target is None:
                continue
            if target in written:
                raise _unsafe(path, f"it holds `{_shown(target)}` twice")
            count = 0
            with member.open() as source, _created(path, into / target) as file:
                while block := source.read(_BLOCK):
                    count += len(block)
                    total += len(block)
                    if count > member.size or total > allowed:
                        raise _unsafe(
                            path,
                            _bomb(total, allowed) if total > allowed else f"`{_shown(member.path)}` is longer than declared",
                        )
                    file.write(block)
                    advance(len(block))
            if count != member.size:
                raise _damaged(path, f"`{_shown(member.path)}` ends after {count:,} of {member.size:,} bytes")
            written[target] = count
    return written


def safe_path(name: str) -> str | None:
    """Return a member's path with forward slashes, or None if it could leave the folder.

    Backslashes separate folders in archives packed on Windows (SYNTHIA's is one); a drive letter, a leading slash or `..`
    would leave it.
    """
    path = name.replace("\\", "/")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if path.startswith("/") or re.match(r"[A-Za-z]:", path) or ".." in parts or _CONTROL.search(path):
        return None
    return "/".join(parts)


def _kind(path: Path) -> str:
    with path.open("rb") as file:
        first = file.read(8)
    if first.startswith(b"Rar!\x1a\x07"):
        return "rar"
    # the last volume of a split zip begins in the middle of a file
    if first.startswith(b"PK") or len(volumes(path)) > 1 or zipfile.is_zipfile(path):
        return "zip"
    with _reading(path):
        if is_tar(path):
            return "tar"
    web = first.lstrip().lower().startswith((b"<!doc", b"<html", b"<?xml"))
    raise ArchiveError(
        f"{path} is {'a web page' if web else 'not an archive, or the beginning of it is damaged'}",
        "zip, tar (.gz, .bz2, .xz) and rar are read: download it again, or unpack it yourself and give the folder with --from",
    )


def _allowed(path: Path, limits: Limits) -> int:
    return max(limits.always, int(limits.ratio * packed_size(path)))


def _check_count(path: Path, before: int, limits: Limits) -> None:
    if before >= limits.files:
        raise _unsafe(path, f"it holds more than {limits.files:,} files")


@contextmanager
def _opened(path: Path, allowed: int, into: Path) -> Iterator[Iterator[Member]]:
    most = allowed + _TAR_HEADERS
    kind = _kind(path)
    if kind == "zip":
        with open_zip(path) as archive:
            yield _zip_members(path, archive)
    elif kind == "tar":
        with open_tar(path, most) as entries:
            yield _tar_members(path, entries)
    else:
        with _rar(path, most, into.with_name(f"{into.name}.unrar")) as members:
            yield members


def _zip_members(path: Path, archive: zipfile.ZipFile) -> Iterator[Member]:
    for info in archive.infolist():
        mode = info.external_attr >> 16
        if stat.S_ISLNK(mode) or (stat.S_IFMT(mode) and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)):
            raise _unsafe(path, f"`{_shown(info.filename)}` is a link or a device")
        if info.flag_bits & 1:
            raise ArchiveError(f"{path.name} is locked by a password", _BY_HAND.format(path=path))
        # orig_filename: zipfile cuts a name at a zero byte and turns the system's separators
        name = _checked(path, info.orig_filename)
        yield Member(name, info.file_size, info.is_dir() or info.orig_filename.endswith("\\"), lambda i=info: archive.open(i))  # type: ignore[misc]


def _tar_members(path: Path, entries: Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]) -> Iterator[Member]:
    for info, content in entries:
        if not info.isdir() and (content is None or info.issparse()):
            raise _unsafe(path, f"`{_shown(info.name)}` is a link or a device")
        try:
            name = info.name.encode("utf-8", "surrogateescape").decode("utf-8")
        except UnicodeDecodeError:
            # Latin-1, as older systems in Europe wrote names; they are converted, since readers need text
            name = info.name.encode("utf-8", "surrogateescape").decode("latin-1")
        yield Member(_checked(path, name), info.size, info.isdir(), lambda c=content: c)  # type: ignore[misc]


@contextmanager
def _rar(path: Path, most: int, apart: Path) -> Iterator[Iterator[Member]]:
    if bsdtar := shutil.which("bsdtar"):
        command = [bsdtar, "--format", "pax", "-cf", "-", f"@{path.absolute()}"]
        with tempfile.TemporaryFile() as told, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=told) as process:
            problem = None
            try:
                assert process.stdout is not None
                try:
                    yield _tar_members(path, tar_entries(process.stdout, most))
                except tarfile.TarError as error:
                    problem = error  # most likely bsdtar ended early and has printed the reason
                process.stdout.read()
                if process.wait() != 0 or problem:
                    told.seek(0)
                    lines = told.read().decode(errors="replace").strip().splitlines() or [str(problem)]
                    raise _damaged(path, f"bsdtar says: {lines[0]}")
            finally:
                process.kill()
    elif unrar := shutil.which("unrar"):
        shutil.rmtree(apart, ignore_errors=True)
        apart.mkdir()
        try:
            # -ol- leaves links out, -p- answers no password, -- ends the switches
            command = [unrar, "x", "-idq", "-y", "-o+", "-ol-", "-p-", "--", str(path.absolute()), f"{apart}{os.sep}"]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise _damaged(path, f"unrar says: {((done.stderr or done.stdout).strip().splitlines() or ['nothing'])[0]}")
            yield _folder_members(path, apart)
        finally:
            shutil.rmtree(apart, ignore_errors=True)
    else:
        raise ArchiveError(
            f"{path.name} is a rar archive, and neither `bsdtar` nor `unrar` is on this machine",
            "install one: `apt install libarchive-tools`, `brew install libarchive`, `conda install -c conda-forge libarchive`; "
            f"or {_BY_HAND.format(path=path)}",
        )


def _folder_members(path: Path, folder: Path) -> Iterator[Member]:
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            file = Path(parent, name)
            if file.is_symlink() or not (file.is_file() or file.is_dir()):
                raise _unsafe(path, f"`{_shown(str(file.relative_to(folder)))}` is a link or a device")
            if file.is_file():
                inside = _checked(path, file.relative_to(folder).as_posix())
                yield Member(inside, file.stat().st_size, False, lambda f=file: f.open("rb"))  # type: ignore[misc]


def _checked(path: Path, name: str) -> str:
    inside = safe_path(name)
    if inside is None:
        raise _unsafe(path, f"`{_shown(name)}` would be written outside the folder, or holds control characters")
    return inside


def _shown(name: str) -> str:
    """Return a name from outside for a message: one line, of bounded length."""
    cut = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}..."
    return cut if cut.isprintable() else ascii(cut)[1:-1]


def _clutter(inside: str) -> bool:
    # files that macOS and Windows add to archives
    parts = inside.split("/")
    return "__MACOSX" in parts or parts[-1] in (".DS_Store", "Thumbs.db", "desktop.ini") or parts[-1].startswith("._")


def _check_declared(path: Path, into: Path, allowed: int) -> None:
    """Refuse a zip by its declared sizes, before a byte is written; other kinds declare them member by member."""
    declared = packed_size(path)
    if _kind(path) == "zip":
        with _reading(path), open_zip(path) as archive:
            declared = sum(info.file_size for info in archive.infolist())
        if declared > allowed:
            raise _unsafe(path, _bomb(declared, allowed))
    free = shutil.disk_usage(into).free
    if declared > free:
        raise DataError(
            f"no room to unpack {path.name}: it takes {declared:,} bytes, {into.parent} has {free:,} free",
            "make room there, or point --root or DGBENCH_DATA at a larger disk; then run the same command again",
        )


@contextmanager
def _created(path: Path, target: Path) -> Iterator[BinaryIO]:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(
            target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0), 0o644
        )
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        raise _unsafe(path, f"it holds `{_shown(target.name)}` twice, or as a file and as a folder") from None
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL):
            raise _unsafe(path, f"`{_shown(target.name)}` is no name for a file on this disk: {error.strerror}") from None
        if error.filename is None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(target)) from None
    with os.fdopen(descriptor, "wb") as file:
        yield file


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except TooMuchError as error:
        raise _unsafe(path, str(error)) from None
    except _DAMAGE as error:
        raise _damaged(path, (str(error).splitlines() or [type(error).__name__])[0]) from None
    except NotImplementedError as error:
        raise ArchiveError(
            f"{path.name} is packed in a way that Python does not read: {error}", _BY_HAND.format(path=path)
        ) from None
    except OSError as error:
        if error.errno is not None:
            raise
        # gzip's and bz2's own errors
        raise _damaged(path, str(error)) from None


_BY_HAND = "unpack {path} yourself (7-Zip reads most kinds) and give the folder with --from"


def _bomb(total: int, allowed: int) -> str:
    return f"it unpacks to at least {total:,} bytes, more than the {allowed:,} that are accepted for its size"


def _unsafe(path: Path, why: str) -> ArchiveError:
    return ArchiveError(
        f"{path.name} is not unpacked: {why}",
        "official archives do not do this: it is from another source or was changed. Download it again from the data "
        f"set's own site; {path} can be deleted",
    )


def _damaged(path: Path, why: str) -> ArchiveError:
    return ArchiveError(f"{path.name} is damaged or cut off: {why}", f"download it again; {path} can be deleted")


def remove(folder: Path) -> None:
    """Delete a folder of dgbench that may be incomplete."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)
