"""Per-image matrices of records, in one order of images, and checked against the scores beside which they lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dgbench import metrics, results
from dgbench import protocol as protocols
from dgbench.errors import ResultError
from dgbench.results import Record

_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Rules:
    """Over which classes a protocol's mean runs; see `metrics.miou`."""

    classes: tuple[int, ...] | None = None
    absent: metrics.Absent = "skip"


def rules_of(record: Record) -> Rules:
    """Return the rules of a record's protocol; those of `metrics.miou` for one that this dgbench does not know."""
    known = protocols.PROTOCOLS.get(record.protocol)
    return Rules() if known is None else Rules(protocols.CLASS_SETS[known.classes], known.absent_classes)


def by_image(record: Record) -> tuple[tuple[str, ...], NDArray[Any]]:
    """Return the ids of a record's images, sorted, and the counts (n, K, K) in that order.

    Raises: ResultError if there are none, they say not of which images, or they do not give the record's score.
    """
    found = results.read_matrices(record)
    if found.ids is None:
        raise ResultError(
            f"the matrices of record {record.id} do not say which images they belong to", "score it again with `dgbench eval`"
        )
    rules = rules_of(record)
    try:
        score = metrics.miou(found.counts.sum(axis=0), classes=rules.classes, absent=rules.absent)
    except IndexError:
        score = float("nan")  # of fewer classes
    if record.miou is None or not abs(score - record.miou) < _ROUNDING or len(set(found.ids)) < len(found.ids):
        raise ResultError(
            f"the matrices of record {record.id} do not give its score", "score the checkpoint again with `dgbench eval`"
        )
    order = sorted(range(len(found.ids)), key=found.ids.__getitem__)
    return tuple(found.ids[i] for i in order), found.counts[np.array(order, dtype=np.intp)]
