"""Where the files that travel with the package lie: in the repository at its top level, in a wheel inside the package."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent


def recipes_dir() -> Path:
    """The folder of the shipped recipes."""
    packaged = _PACKAGE / "recipes"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "recipes"
