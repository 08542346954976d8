"""The folders in which data sets and the cache lie."""

from __future__ import annotations

import os
from pathlib import Path

from dgbench.errors import DataError


def data_root(given: Path | None = None) -> Path:
    """Return the data root: the argument, else DGBENCH_DATA, else `./data`.

    Raises: DataError if the variable holds no absolute path.
    """
    return given or _named_by("DGBENCH_DATA") or Path("data")


def cache_root() -> Path:
    """Return the folder of rendered images and statistics: DGBENCH_CACHE, else the user's cache; never the current folder.

    Raises: DataError if the variable holds no absolute path, or the user has no home folder.
    """
    if path := _named_by("DGBENCH_CACHE"):
        return path
    # the XDG specification: anything but an absolute path is ignored
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if cache.is_absolute():
        return cache / "dgbench"
    try:
        home = Path.home()
    except RuntimeError:
        home = Path()
    if not home.is_absolute():
        raise DataError("there is no home folder to keep a cache in", "set HOME, or DGBENCH_CACHE to a folder that is yours")
    return home / ".cache" / "dgbench"


def _named_by(variable: str) -> Path | None:
    """Return the folder that a variable names, None if it is empty or unset; it does not depend on the current folder."""
    value = os.environ.get(variable)
    if value and not os.path.isabs(value):
        meant = os.path.abspath(os.path.expanduser(value))
        raise DataError(f"{variable} is `{value}`, which is no absolute path", f"set it to {meant}, or unset it")
    return Path(value) if value else None
