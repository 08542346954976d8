"""`manifest.json` of a saved folder: size and SHA-256 of each file when it was written.

It is written last and compared whenever one of the files is read, so that a flipped bit, a truncated or a replaced file
is an error instead of being loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NAME = "manifest.json"
FORMAT = 1
_LARGEST = 1 << 20  # bytes of a manifest


def seal(folder: Path, names: Iterable[str]) -> None:
    """Record these files of `folder`, in addition to those recorded before.

    Raises: OSError naming the file that cannot be read or written.
    """
    files = _read(folder) or {}
    for name in names:
        with (folder / name).open("rb") as file:
            files[name] = {"size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    write(folder / NAME, json.dumps({"format": FORMAT, "files": dict(sorted(files.items()))}, indent=1) + "\n")


def check(folder: Path, name: str) -> bool:
    """Check a file of `folder` against the manifest; False if there is none, as in older folders.

    Raises: ValueError naming the file that is damaged, missing, or not of this folder.
    """
    files, path = _read(folder), folder / name
    if files is None:
        return False
    if name not in files:
        if path.exists():
            raise ValueError(f"{path} is not among the files of {folder / NAME}: it was put there later")
        return True
    size, digest = files[name]["size"], files[name]["sha256"]
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            raise ValueError(f"{path} is not a file")
        if state.st_size != size:
            raise ValueError(f"{path} is damaged: it has {state.st_size:,} bytes, {size:,} were written")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if found != digest:
        raise ValueError(f"{path} is damaged: its content does not match {NAME}")
    return True


def write(path: Path, text: str) -> None:
    """Replace a text file in one step, on the disk when this returns."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, path)
    # the rename, too; not every system can open a folder
    with contextlib.suppress(OSError):
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_text(path: Path, largest: int) -> str:
    """Return the text of a regular file.

    Raises: FileNotFoundError, or ValueError naming the file if it is larger, cannot be read or is no text.
    """
    try:
        # checked before it is opened: a pipe would wait for its writer
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            raise ValueError(f"{path} is not a file")
        if state.st_size > largest:
            raise ValueError(f"{path} is damaged: it has {state.st_size:,} bytes, at most {largest:,} are read")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is damaged: it is not text in UTF-8") from None
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def _read(folder: Path) -> dict[str, dict[str, Any]] | None:
    path = folder / NAME
    try:
        content = json.loads(read_text(path, _LARGEST))
    except FileNotFoundError:
        return None
    except RecursionError:
        raise ValueError(f"{path} is damaged: its lists are nested too deep") from None
    except ValueError as error:
        raise (error if str(path) in str(error) else ValueError(f"{path} is damaged: {error}")) from None
    files = content.get("files") if isinstance(content, dict) and content.keys() == {"format", "files"} else None
    if not isinstance(files, dict) or content["format"] != FORMAT or not all(map(_is_row, files.values())):
        raise ValueError(f"{path} is damaged: it is not a manifest of format {FORMAT}")
    return files


def _is_row(row: object) -> bool:
    return isinstance(row, dict) and {key: type(value) for key, value in row.items()} == {"size": int, "sha256": str}
