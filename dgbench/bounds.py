"""Bounds of a record's numbers, texts and names: files outside of them are refused."""

from __future__ import annotations

import dataclasses
import re
from datetime import datetime
from typing import TYPE_CHECKING

from dgbench.untrusted import shortened

if TYPE_CHECKING:
    from dgbench.results import Record

_LONGEST = 1000  # characters of a text field
_MOST = 10**12  # images, steps, seconds, a seed
_FILE_NAME = re.compile(r"confusion-[^/\\\0]{1,300}\.npz")


def problem(record: Record) -> str | None:
    """Return what is impossible about a record, as `field: problem`; None if there is nothing."""
    for name in _names(record, "str", "str | None"):
        if (text := getattr(record, name)) is not None and len(text) > _LONGEST:
            return f"{name}: has {len(text):,} characters, at most {_LONGEST:,} can be"
    for name in ("backends", "environment", "extra"):
        for key, value in getattr(record, name).items():
            if len(key) > _LONGEST or (isinstance(value, str) and len(value) > _LONGEST):
                return f"{name}: has a text of more than {_LONGEST:,} characters"
    for name in _names(record, "int"):
        if not 0 <= getattr(record, name) <= _MOST:
            return f"{name}: {shortened(getattr(record, name))} is not within 0 and {_MOST:,}"
    means = [value for key, value in record.extra.items() if key.startswith("miou")]
    for name, shares in (("miou", (record.miou,)), ("iou", record.iou), ("interval", record.interval), ("extra", means)):
        for share in shares:
            if share is not None and not (isinstance(share, float) and 0 <= share <= 1):
                return f"{name}: {shortened(share)} is not within 0 and 1"
    low, high = record.interval
    if low is not None and high is not None and low > high:
        return f"interval: its lower end {low} is above its upper end {high}"
    for key, seconds in record.seconds.items():
        if seconds is not None and not 0 <= seconds <= _MOST:
            return f"seconds.{shortened(key)}: {seconds} is not within 0 and {_MOST:,}"
    if not _is_time(record.created):
        return f"created: {shortened(record.created)} is not a time in ISO 8601, as 2026-11-24T02:15:00Z"
    if record.confusion is not None and not _FILE_NAME.fullmatch(record.confusion):
        return f"confusion: {shortened(record.confusion)} is not the name of a file beside the record"
    return None


def _is_time(text: str) -> bool:
    if not text.isascii() or text[10:11] != "T":
        return False
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False


def _names(record: Record, *types: str) -> tuple[str, ...]:
    """Return the fields of a record that are declared as one of these types."""
    return tuple(f.name for f in dataclasses.fields(record) if f.type in types)
