"""Reading of tar streams, once and to the last byte, with limits on their headers.

tarfile itself reads an extended header of any size into memory, treats an unreadable header as the end of the
archive, and stops at the end mark, before the checksum of the compression around it. Here the bytes pass through a reader
that refuses large headers and never goes back, the end mark must be there, and only zeros may follow it: so
the checksums of gzip, bzip2 and xz are compared, and a damaged header in a plain tar (which has no other checksum) is found.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, cast

_HEADERS = 1 << 20  # bytes of all headers of one member: a long name, attributes
_READS = 200  # of them; each extended header is a step of tarfile's recursion
_BLOCK = 1 << 20
_PACKED: dict[bytes, Callable[[BinaryIO], IO[bytes]]] = {
    b"\x1f\x8b": lambda file: cast(IO[bytes], gzip.GzipFile(fileobj=file)),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
}


class TooMuchError(Exception):
    """A tar exceeds the limits for archives of data sets."""


def is_tar(path: Path) -> bool:
    """Return whether a file begins like a tar, compressed or not."""
    try:
        with _stream(path) as stream:
            tarfile.TarFile(fileobj=_Forward(stream, 2 * _HEADERS))  # type: ignore[arg-type]
    except TooMuchError:
        return True  # reading it gives the error
    except (tarfile.TarError, EOFError, ValueError, lzma.LZMAError, RecursionError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        return False
    return True


@contextmanager
def open_tar(path: Path, most: int) -> Iterator[Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]]:
    """Return the entries of a tar file, as `tar_entries` gives them."""
    with _stream(path) as stream:
        yield tar_entries(stream, most)


def tar_entries(stream: IO[bytes], most: int) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
    """Yield each entry of a tar stream with its content (None if it is no file), to be read before the next is requested.

    Args:
        most: unpacked bytes of the stream, headers and padding included.

    Raises: TooMuchError for headers, or for a stream, that are larger than allowed; the errors of tarfile and of the
        compression for damage, a missing end mark and bytes after it.
    """
    forward = _Forward(stream, most)
    with tarfile.TarFile(fileobj=forward) as archive:  # type: ignore[arg-type]
        while True:
            forward.begin_headers()
            info = archive.next()
            if info is None:
                break
            # tarfile would keep every entry
            archive.members.clear()  # type: ignore[attr-defined]
            if sum(len(key) + len(value) for key, value in archive.pax_headers.items()) > _HEADERS:
                raise TooMuchError("its global headers are larger than 1 MiB")
            forward.begin_content()
            yield info, archive.extractfile(info) if info.isreg() else None
        forward.begin_content()
        _check_end(forward, archive.offset)


def _check_end(forward: _Forward, offset: int) -> None:
    # an unreadable header is either the end mark or damage
    if forward.last is None or forward.last_at != offset:
        raise tarfile.ReadError(f"its end is not where a header belongs, at byte {offset:,}")
    if len(forward.last) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"it ends at byte {offset + len(forward.last):,} without an end mark")
    if any(forward.last):
        raise tarfile.ReadError(f"the header at byte {offset:,} cannot be read")
    while block := forward.read(_BLOCK):
        if any(block):
            raise tarfile.ReadError(f"there is something after its end mark, at byte {offset:,}")


class _Forward:
    """The stream that tarfile reads from: forward only, with limits."""

    def __init__(self, stream: IO[bytes], most: int) -> None:
        self._stream, self._most, self._at = stream, most, 0
        self._plain = stream.seekable() and isinstance(stream, io.BufferedReader)
        self.begin_headers()
        self.last: bytes | None = None  # the block that was last read as a header, and its position
        self.last_at = 0

    def begin_headers(self) -> None:
        self._headers, self._reads, self._limited = 0, 0, True

    def begin_content(self) -> None:
        self._limited = False

    def tell(self) -> int:
        return self._at

    def seek(self, position: int) -> int:
        if position < self._at:
            raise tarfile.ReadError(f"a header leads back from byte {self._at:,} to {position:,}")
        self._check(position)
        if self._plain:
            self._stream.seek(position)
            self._at = position
        while self._at < position:
            block = self._stream.read(min(_BLOCK, position - self._at))
            if not block:
                break
            self._at += len(block)
        return self._at

    def read(self, size: int = -1) -> bytes:
        if size < 0:
            raise tarfile.ReadError("a header states a negative size")
        if self._limited:
            self._headers += size
            self._reads += 1
            if self._headers > _HEADERS or self._reads > _READS:
                raise TooMuchError(f"the headers of one entry, at byte {self._at:,}, are larger than 1 MiB or too many")
        self._check(self._at + min(size, _BLOCK))
        block = self._stream.read(size)
        if self._limited and size == tarfile.BLOCKSIZE:
            self.last, self.last_at = block, self._at
        self._at += len(block)
        return block

    def close(self) -> None:
        """Do nothing: the owner of the stream closes it."""

    def _check(self, position: int) -> None:
        if position > self._most:
            raise TooMuchError(f"it unpacks to at least {position:,} bytes, more than is accepted for an archive of its size")


@contextmanager
def _stream(path: Path) -> Iterator[IO[bytes]]:
    with path.open("rb") as file:
        first = file.read(6)
        file.seek(0)
        unpack = next((make for magic, make in _PACKED.items() if first.startswith(magic)), None)
        if unpack is None:
            yield cast(IO[bytes], file)
            return
        with unpack(file) as stream:
            yield stream
