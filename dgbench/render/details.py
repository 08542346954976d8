"""What stands behind the scores of a leaderboard's table: IoU by class, mIoU by condition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from dgbench.render.table import ABSENT, PARTIAL, Cell, Table

if TYPE_CHECKING:
    from dgbench.report.rows import Group, Row, Score

_Values = Mapping[str, float | None]


def class_tables(group: Group, labels: Sequence[str], title: str) -> list[Table]:
    """Return a table of IoU by class for each target, and one of their means; none where they were not asked for."""

    from dgbench.data.labels import NAMES

    def of(score: Score | None) -> _Values:
        return dict(zip(NAMES, score.iou, strict=False)) if score is not None else {}

    found = [
        _table(group, labels, f"{title}: IoU in % by class on {target}", [of(row.scores[target]) for row in group.rows], target)
        for target in group.targets
    ]

    def mean(row: Row) -> _Values:
        # as a mean of targets: only where all are complete
        each = [of(row.scores[target]) for target in group.targets] if row.mean is not None else []
        return {name: fmean(v) if (v := _known(each, name)) else None for name in (each[0] if each else ())}

    if len(group.targets) > 1:
        found.append(
            _table(group, labels, f"{title}: IoU in % by class, mean over the targets", [mean(row) for row in group.rows])
        )
    return [table for table in found if table is not None]


def condition_tables(group: Group, labels: Sequence[str], title: str) -> list[Table]:
    """Return a table of mIoU by condition for each target that has several; none where they were not asked for."""

    def of(row: Row, target: str) -> _Values:
        score = row.scores[target]
        conditions = dict(score.conditions) if score is not None else {}
        known = [value for value in conditions.values() if value is not None]
        return conditions | {"mean": fmean(known) if len(known) == len(conditions) else None} if conditions else {}

    said = ("Of the target's images of each condition. mean: of the conditions, which is not the mIoU of all images.",)
    found = []
    for target in group.targets:
        what = f"{title}: mIoU in % by condition of {target}"
        found.append(_table(group, labels, what, [of(row, target) for row in group.rows], target, said))
    return [table for table in found if table is not None]


def _table(
    group: Group, labels: Sequence[str], title: str, each: Sequence[_Values], target: str = "", legend: tuple[str, ...] = ()
) -> Table | None:
    header = max(each, key=len, default={})
    if not header:
        return None
    rows = []
    for row, label, own in zip(group.rows, labels, each, strict=True):
        score = row.scores.get(target)
        mark = PARTIAL if row.partial_source or (score is not None and score.partial) else ""
        if own:
            place = "ref" if row.kind == "reference" else str(row.rank or ABSENT)
            rows.append((Cell(place), Cell(label + mark), *_cells(header, own)))
    if any(row[1].text.endswith(PARTIAL) for row in rows):
        legend = (*legend, f"{PARTIAL} other images than the published split's, or trained on a part of the source.")
    return Table(title, ("#", "method", *header), tuple(rows), keys=2, legend=legend)


def _cells(header: _Values, own: _Values) -> list[Cell]:
    return [Cell(ABSENT if (value := own.get(name)) is None else f"{100 * value:.1f}") for name in header]


def _known(each: Sequence[_Values], name: str) -> list[float]:
    """Return a class's values on all targets; nothing if one lacks it."""
    values = [own.get(name) for own in each]
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else []
