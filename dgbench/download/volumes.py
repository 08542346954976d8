"""Zip archives, also those split into volumes (`set.z01`, `set.z02`, ..., `set.zip`), which zipfile alone does not read.

The volumes are read as one file. In a split archive an offset counts from the start of its volume, and a large one
(zip64) states that it has several volumes; both are corrected (APPNOTE.TXT 4.3.14 to 4.3.16, 4.4.11, 8.5).
"""

from __future__ import annotations

import bisect
import io
import itertools
import struct
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, BinaryIO, cast

from dgbench.errors import DataError

_CONTENTS = 64 << 20  # bytes of a table of contents: half a million files
_END, _LOCATOR, _END64 = b"PK\x05\x06", b"PK\x06\x07", b"PK\x06\x06"


def volumes(path: Path) -> list[Path]:
    """Return all files of an archive in order, the given one last; only that one if it is not split.

    Raises: DataError naming the first volume that is missing.
    """
    if path.suffix.lower() != ".zip":
        return [path]
    with path.open("rb") as file:
        tail = _tail(file)
    at = tail.rfind(_END)
    count = struct.unpack_from("<H", tail, at + 4)[0] if at >= 0 and len(tail) >= at + 22 else 0
    if at >= 20 and tail[at - 20 : at - 16] == _LOCATOR:
        count = struct.unpack_from("<I", tail, at - 20 + 16)[0] - 1
    earlier = [path.with_suffix(f".{'Z' if path.suffix == '.ZIP' else 'z'}{n:02d}") for n in range(1, count + 1)]
    if missing := [volume for volume in earlier if not volume.is_file()]:
        raise DataError(
            f"{path.name} is the last of {count + 1} volumes, and {missing[0].name} is not beside it",
            f"put all of {earlier[0].name} to {path.name} into {path.parent}",
        )
    return [*earlier, path]


@contextmanager
def open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """Return the archive with all its volumes, opened for reading."""
    files = volumes(path)
    with ExitStack() as stack:
        opened: list[BinaryIO] = [stack.enter_context(volume.open("rb")) for volume in files]
        if len(files) == 1:
            yield stack.enter_context(zipfile.ZipFile(cast(IO[bytes], _Bounded(opened[0]))))
            return
        joined = _Joined(opened)
        archive = stack.enter_context(zipfile.ZipFile(cast(IO[bytes], _Bounded(io.BufferedReader(joined, 1 << 20)))))
        shift = archive.start_dir - joined.directory  # what zipfile added to every offset
        for info in archive.filelist:
            info.header_offset += joined.starts[info.volume] - shift
        ends = sorted([info.header_offset for info in archive.filelist] + [archive.start_dir])
        for info in archive.filelist:
            if hasattr(info, "_end_offset"):  # newer versions of Python use it to find overlapping members
                info._end_offset = ends[bisect.bisect_right(ends, info.header_offset)]
        yield archive


class _Bounded:
    """A file whose single reads are limited to the size of a table of contents.

    zipfile reads that in one call, and keeps ten times its size in memory.
    """

    def __init__(self, file: BinaryIO | io.BufferedReader) -> None:
        self._file = file
        self.seek, self.tell, self.seekable, self.close = file.seek, file.tell, file.seekable, file.close

    def read(self, size: int = -1) -> bytes:
        block = self._file.read(size if 0 <= size <= _CONTENTS else _CONTENTS + 1)
        if len(block) > _CONTENTS:
            raise zipfile.BadZipFile(f"its table of contents is larger than {_CONTENTS >> 20} MiB")
        return block


class _Joined(io.RawIOBase):
    """Volumes that are read as one file, with the end record of a single volume."""

    def __init__(self, files: list[BinaryIO]) -> None:
        self._files = files
        sizes = [file.seek(0, io.SEEK_END) for file in files]
        self.starts = [0, *itertools.accumulate(sizes)]
        self._at = 0
        self._tail = bytearray(_tail(files[-1]))
        end = self._tail.rfind(_END)
        self.directory = struct.unpack_from("<I", self._tail, end + 16)[0]  # the central directory's offset in its volume
        if end >= 20 and self._tail[end - 20 : end - 16] == _LOCATOR:
            volume, offset = struct.unpack_from("<IQ", self._tail, end - 16)
            struct.pack_into("<IQI", self._tail, end - 16, 0, self.starts[volume] + offset, 1)
            at = self._tail.rfind(_END64, 0, end)
            if at >= 0:
                self.directory = struct.unpack_from("<Q", self._tail, at + 48)[0]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self.starts[-1])[whence])
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self._at >= self.starts[-1]:
            return 0
        which = bisect.bisect_right(self.starts, self._at) - 1
        end = self.starts[-1] - len(self._tail)
        if self._at >= end:
            block = bytes(self._tail[self._at - end : self._at - end + len(buffer)])
        else:
            self._files[which].seek(self._at - self.starts[which])
            room = min(len(buffer), self.starts[which + 1] - self._at, end - self._at)
            block = self._files[which].read(room)
        buffer[: len(block)] = block
        self._at += len(block)
        return len(block)


def _tail(file: BinaryIO) -> bytes:
    """Return the bytes in which the end records are: at most 64 KiB of comment and what precedes them."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - (1 << 16) - 256))
    return file.read()
