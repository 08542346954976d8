"""Numbers as text: scores, times, amounts of data."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dgbench.render.table import ABSENT

if TYPE_CHECKING:
    from dgbench.report.rows import Score


def percent(score: Score | None, digits: int = 1, mark: str = "", *, interval: bool = True) -> str:
    """Return a score as `43.1 ±1.2`, in percent."""
    if score is None:
        return ABSENT
    shown = interval and score.half is not None and math.isfinite(score.half)
    half = f" ±{100 * (score.half or 0):.{digits}f}" if shown else ""
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
