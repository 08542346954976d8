"""Capture of what C libraries write to the process's standard error.

OpenCV lets libjpeg print its warnings about damaged data there, and offers no other way to get them.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import TextIO

_LOCK = threading.Lock()
_ours: Captured | None = None  # the active capture, shared by all threads


class Captured:
    """The text captured so far."""

    def __init__(self) -> None:
        self.users = 0
        _flush()
        try:
            self._terminal = os.dup(2)
        except OSError:  # there is none
            self._terminal = os.open(os.devnull, os.O_WRONLY)
        self._file = _unnamed_file()
        os.dup2(self._file, 2)
        # Python's own messages and progress bars, from whatever thread, still go to the terminal
        self._replaced: TextIO | None = None
        if _number(sys.stderr) == 2:
            self._replaced = sys.stderr
            copy = os.dup(self._terminal)
            sys.stderr = os.fdopen(copy, "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")

    def size(self) -> int:
        """Return the bytes so far: if they grow during a call, it (or another thread's) has written."""
        return os.fstat(self._file).st_size

    def text(self) -> str:
        """Return all that was written."""
        return os.pread(self._file, min(self.size(), 1 << 20), 0).decode(errors="replace")

    def end(self) -> None:
        """Restore standard error; text that is not an image library's is written to the terminal."""
        if self._replaced is not None:
            stand_in, sys.stderr = sys.stderr, self._replaced
            stand_in.close()
        os.dup2(self._terminal, 2)
        rest = "".join(line for line in self.text().splitlines(True) if not any(word in line for word in _LIBRARIES))
        if rest:
            os.write(2, rest.encode())
        os.close(self._file)
        os.close(self._terminal)


# of libjpeg's warnings (jerror.h), each has one of these
_LIBRARIES = ("JPEG", "JFIF", "Huffman", "libpng", "SOS", "progression sequence", "scanlines", "Adobe", "marker", "restart")


@contextlib.contextmanager
def captured() -> Iterator[Captured]:
    """Keep what C code writes to stderr off the terminal. Threads that do so at once share one capture."""
    global _ours
    with _LOCK:
        _ours = told = _ours or Captured()
        told.users += 1
    try:
        yield told
    finally:
        with _LOCK:
            told.users -= 1
            if not told.users:
                _ours = None
                told.end()


def _unnamed_file() -> int:
    if hasattr(os, "memfd_create"):  # in memory: needs no folder to write to
        return os.memfd_create("stderr")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _flush() -> None:
    with contextlib.suppress(AttributeError, OSError, ValueError):  # closed, or none at all
        sys.stderr.flush()


def _number(stream: TextIO | None) -> int | None:
    try:
        return stream.fileno() if stream is not None else None
    except (AttributeError, OSError, ValueError):
        return None
