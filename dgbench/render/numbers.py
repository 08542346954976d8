"""Numbers as text: scores, times, amounts of data."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dgbench.render.table import ABSENT

if TYPE_CHECKING:
    from dgbench.report.rows import Score


def percent(score: Score | None, digits: int = 1, mark: str = "", *, interval: bool = True) -> str:
    """Return a score as `43.1 ±1.2`, in percent: half the interval over images, or of several seeds their deviation."""
    if score is None:
        return ABSENT
    width = score.half if score.deviation is None else score.deviation
    half = f" ±{100 * width:.{digits}f}" if interval and width is not None and math.isfinite(width) else ""
    return f"{100 * score.miou:.{digits}f}{mark}{half}"


def duration(seconds: float) -> str:
    """Return seconds as `9s`, `1:05` or `2:03:00`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def byte_size(n: int | None) -> str:
    """Return bytes as `5.7 GB`."""
    if n is None:
        return "unknown"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= scale:
            return f"{n / scale:,.1f} {unit}"
    return f"{n} B"


def counted(count: int, units: str) -> str:
    """Return a number with its unit, given in the plural: `1 image`, `2 images`."""
    return f"{count} {units.removesuffix('s') if count == 1 else units}"
