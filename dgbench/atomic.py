"""Atomic writes: a reader sees the old bytes, the new bytes or no file, never a part."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from dgbench.temporaries import beside


def write(path: Path, data: bytes | str) -> Path:
    """Replace `path` by `data` in one step, surviving a crash or a power cut at any moment.

    The bytes go to a hidden file in the same folder (`temporaries.beside`, which no reader of ours looks at), are flushed
    to the disk, and are then renamed over `path`.

    Raises: OSError naming `path` if the folder cannot be written or the disk is full; the old file is untouched then.
    """
    content = data.encode() if isinstance(data, str) else data
    if path.exists() and not path.is_file() and not path.is_dir():
        # /dev/stdout, /dev/null, a pipe: these are written to, never replaced
        path.write_bytes(content)
        return path
    temporary = beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        # the user asked for `path`; a full disk raises without any file name at all
        raise OSError(error.errno, error.strerror, str(path)) from error
    sync_folder(path.parent)
    return path


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable, where the system lets a folder be opened (POSIX)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
