"""The order of a group's rows, and ranks that only significant differences make.

The rank of a row is one more than the number of rows that are significantly better: each pair of rows is compared on the same
images (`report.statistics`), and the p-values of all pairs of the group are corrected by Holm's rule, so that the probability
of any false difference in the group is at most 5 %. Rows of one rank, or whose ranks overlap, are not told apart. Rows without
matrices are held against all others by their means alone, and say why.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING

from dgbench.errors import ResultError
from dgbench.report.images import by_image, rules_of
from dgbench.report.models import Model
from dgbench.report.rows import Row

if TYPE_CHECKING:
    from dgbench.report.statistics import Summary

MOST = 50  # rows that are compared pair by pair: their matrices are read, and Holm's rule asks more of every further pair


@dataclass(frozen=True, slots=True)
class Entry:
    """A row, and the models of which it is made; none of a reference row."""

    row: Row
    models: tuple[Model, ...] = ()


def ranked(entries: Sequence[Entry], *, tested: bool = True) -> list[Row]:
    """Sort by mean, own complete rows first; these get ranks.

    Args:
        tested: compare pairs of rows by their matrices; otherwise ranks follow the means.
    """
    ordered = sorted(entries, key=_order)
    places = [i for i, entry in enumerate(ordered) if _ranks(entry.row)]
    rows = [entry.row for entry in ordered]
    reasons: Mapping[int, str] = {}
    better: dict[int, int] = {}
    compared: set[int] = set()
    if tested and 1 < len(places) <= MOST:
        better, reasons = _compare([ordered[i] for i in places])
        compared = set(range(len(places))) - reasons.keys()
    elif tested and len(places) > MOST:
        reasons = dict.fromkeys(range(len(places)), f"more than {MOST} rows")
    lowered = [-_rounded(rows[i]) for i in places]  # ascending
    by_mean = [value for k, value in enumerate(lowered) if k not in compared]
    for k, i in enumerate(places):
        # a row that was compared is held by their means against those alone that were not
        above = better[k] + bisect_left(by_mean, lowered[k]) if k in compared else bisect_left(lowered, lowered[k])
        rows[i] = replace(rows[i], rank=1 + above, untested=reasons.get(k, ""))
    return rows


def _compare(entries: Sequence[Entry]) -> tuple[dict[int, int], dict[int, str]]:
    """Return how many rows are significantly better than each, and why others could not be compared."""
    from dgbench.report import statistics

    reasons: dict[int, str] = {}
    found: dict[int, tuple[tuple[tuple[str, ...], ...], Summary]] = {}
    for place, entry in enumerate(entries):
        try:
            found[place] = _summarized(entry)
        except ResultError as error:
            reasons[place] = error.message
    # rows of other images than most have cannot be paired with these
    usual = Counter(ids for ids, _ in found.values()).most_common(1)
    for place in [place for place, (ids, _) in found.items() if ids != usual[0][0]]:
        reasons[place] = "matrices of other images than the other rows have"
        del found[place]
    pairs = list(combinations(found, 2))
    if not pairs:
        return {}, {**dict.fromkeys(found, "no other row has per-image matrices"), **reasons}
    differences = [statistics.compared(found[a][1], found[b][1]) for a, b in pairs]
    significant = statistics.holm([difference.p for difference in differences])
    better = dict.fromkeys(found, 0)
    for (a, b), difference, told in zip(pairs, differences, significant, strict=True):
        if told and difference.value:
            better[a if difference.value > 0 else b] += 1
    return better, reasons


def _summarized(entry: Entry) -> tuple[tuple[tuple[str, ...], ...], Summary]:
    """Return the images of each target, and what a comparison needs of all seeds.

    Raises: ResultError if matrices are missing or wrong.
    """
    from dgbench.report import statistics

    if any(model.records[column].confusion is None for model in entry.models for column in entry.row.scores):
        raise ResultError("no per-image matrices")
    ids, side = [], {}
    rules = rules_of(entry.models[0].newest)
    for column in entry.row.scores:
        read = [by_image(model.records[column]) for model in entry.models]
        if len({names for names, _ in read}) > 1:
            raise ResultError("matrices of seeds that are of different images")
        ids.append(read[0][0])
        side[column] = [counts for _, counts in read]
    try:
        return tuple(ids), statistics.summary(side, classes=rules.classes, absent=rules.absent)
    except ValueError as error:
        raise ResultError(str(error)) from None


def _ranks(row: Row) -> bool:
    return row.kind == "run" and row.mean is not None and not row.partial_source


def _order(entry: Entry) -> tuple[bool, bool, bool, float, str]:
    row = entry.row
    return row.kind != "run", row.partial_source, row.mean is None, -_rounded(row), row.method


def _rounded(row: Row) -> float:
    """Return the mean to 0.01 points: closer ones are equal."""
    return round(row.mean.miou, 4) if row.mean else 0.0
