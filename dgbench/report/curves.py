"""The course of a training, for a picture: losses and learning rate by step from the run's log, and what it scored at the end."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgbench import untrusted
from dgbench.results import Record

LOG = "log.jsonl"
_LARGEST = 1 << 26  # bytes of a log that are read
_RATE = "lr"


@dataclass(frozen=True, slots=True)
class DomainScore:
    """mIoU in 0..1 with its 95 % interval over images."""

    domain: str
    miou: float
    low: float | None
    high: float | None
    seen: bool  # the model was trained on this domain


@dataclass(frozen=True, slots=True)
class Curves:
    """A training's numbers by step, and its scores; NaN where a line of the log has no such number."""

    steps: tuple[int, ...]
    losses: Mapping[str, tuple[float, ...]]  # `loss`, then its terms where there are several
    rate: tuple[float, ...]
    scores: tuple[DomainScore, ...]


def curves(run: Path, records: Iterable[Record] = ()) -> Curves | None:
    """Return the curves of a run, or None if its log has no line yet.

    Args:
        records: what its checkpoint scored, of a domain the last one counts; those without a defined mIoU are left out.

    Raises: ValueError if the log is none, or too large.
    """
    try:
        lines = _lines(untrusted.read_bytes(run / LOG, _LARGEST))
    except FileNotFoundError:
        return None
    if not lines:
        return None
    names = [name for name in dict.fromkeys(key for line in lines for key in line) if name not in ("step", _RATE)]
    terms = [name for name in names if name != "loss"]
    shown = ["loss", *(terms if len(terms) > 1 else ())]
    scores = tuple(
        DomainScore(record.target, record.miou, *record.interval, seen=record.target in record.source.split("+"))
        for record in {record.target: record for record in records}.values()
        if record.miou is not None
    )
    return Curves(
        tuple(line["step"] for line in lines), {name: _column(lines, name) for name in shown}, _column(lines, _RATE), scores
    )


def _lines(content: bytes) -> list[dict[str, Any]]:
    found = []
    for text in content.splitlines():
        try:
            line = untrusted.read_object(text)
        except ValueError:  # one that a kill cut short
            continue
        if line is not None and type(line.get("step")) is int:
            found.append(line)
    return found


def _column(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[float, ...]:
    values = (line.get(name) for line in lines)
    return tuple(float(value) if isinstance(value, int | float) else math.nan for value in values)
