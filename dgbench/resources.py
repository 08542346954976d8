"""Files that ship with the package, and processor cores."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).parent


def recipes_dir() -> Path:
    """Return the folder of the shipped recipes: at the repository's top level, and inside the package in a wheel."""
    packaged = _PACKAGE / "recipes"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "recipes"


def usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    # macOS has no affinity
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
