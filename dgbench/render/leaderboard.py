"""The leaderboard: own results by rank, one table for each group that compares, and published tables apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from dgbench.render.numbers import percent
from dgbench.render.protocols import with_hash
from dgbench.render.table import ABSENT, Cell, Table, Tables

if TYPE_CHECKING:
    from dgbench.report.leaderboard import Group, Leaderboard, Row, Score


def _leaderboard(board: Leaderboard) -> list[Table]:
    tables: list[Table] = []
    for group in board.groups:
        # what two groups of one title differ in is inside their protocol hashes
        alike = any((g.source, g.targets, g.protocol, g.protocol_digest)
                    == (group.source, group.targets, group.protocol, group.protocol_digest)
                    for g in board.groups[: len(tables)])  # fmt: skip
        tables.append(_own(group, "; at another image size or label map than the table above" if alike else ""))
    if not tables:
        tables = [Table("No results of your own yet: dgbench train streets/mfuser", (), ())]
    return tables + [_published(group) for group in board.published]


def _own(group: Group, remark: str = "") -> Table:
    ranked = [row for row in group.rows if row.rank is not None]
    columns = [_all_scores(row) for row in ranked]
    best = [_best(column) for column in zip(*columns, strict=True)]
    prefix = _shared_prefix(group.targets)
    targets = f", scored on {prefix}*" if prefix else ""
    header = ("#", "method", "source val", *(target.removeprefix(prefix) for target in group.targets), "mean", "images")
    wide, narrow = [], []
    for row, label in zip(group.rows, _labels(group.rows), strict=True):
        keys = (Cell("ref" if row.kind == "reference" else str(row.rank or ABSENT)), Cell(label))
        marked = best if row.rank is not None else [None] * len(header)
        n_images = sum(score.n_images or 0 for score in row.scores if score)
        scores = list(zip(_all_scores(row), marked, strict=False))
        cells = (*keys, *(_score_cell(*pair) for pair in scores), Cell(str(n_images) if n_images else ABSENT))
        short = (*keys, *(_score_cell(*pair, interval=False) for pair in scores))
        dim = row.kind == "reference"
        wide.append(tuple(dataclasses.replace(cell, style="dim") if dim else cell for cell in cells))
        narrow.append(tuple(dataclasses.replace(cell, style="dim") if dim else cell for cell in short))
    protocol = with_hash(group.protocol, group.protocol_digest)
    title = f"Trained on {group.source}{targets}, protocol {protocol}: mIoU in %{remark}"
    compact = Table(title, header[:-1], tuple(narrow), keys=2, legend=_own_legend(group, intervals=False))
    return Table(title, header, tuple(wide), keys=2, legend=_own_legend(group, intervals=True), compact=compact)


def _all_scores(row: Row) -> tuple[Score | None, ...]:
    return (row.source_score, *row.scores, row.mean)


def _labels(rows: Sequence[Row]) -> list[str]:
    """Return for each row the shortest name that no other row has."""
    forms: list[Callable[[Row], str]] = [
        _method,
        lambda row: row.recipe,
        lambda row: f"{row.recipe}#{row.recipe_hash[:4]}",
        lambda row: f"{row.recipe}#{row.recipe_hash[:4]} {row.created[5:16].replace('T', ' ')}",
    ]
    return [
        next((form(row) for form in forms if sum(form(other) == form(row) for other in rows) == 1), forms[-1](row))
        for row in rows
    ]


def _own_legend(group: Group, *, intervals: bool) -> tuple[str, ...]:
    lines = ["Higher is better; * best."]
    if not intervals:
        lines = ["Intervals and image counts: in a wider terminal or with --json. Higher is better; * best."]
    elif any(score.half is not None for row in group.rows for score in _all_scores(row) if score):
        lines = ["Higher is better; * best. ±: half the 95 % bootstrap interval over images (not over training runs)."]
    lines.append(f"source val: {group.source}, seen in training. mean: over the targets, only where all are complete.")
    if any(score.partial for row in group.rows for score in _all_scores(row) if score):
        lines.append("~ only some images of the split: not ranked, not averaged.")
    for row in group.rows:
        if row.kind == "reference":
            lines.append(f"ref: expected of recipe {row.recipe}, not run here. From: {row.origin}.")
    if group.other_targets:
        lines.append(f"Also scored: {', '.join(group.other_targets)} (dgbench leaderboard --targets ...).")
    return tuple(lines)


def _published(group: Group) -> Table:
    rows = tuple(
        (Cell("pub", "dim"), Cell(row.method + ("†" if row.note else ""), "dim"), Cell(row.variant, "dim"),
         *(Cell(percent(score, 2), "dim") for score in (*row.scores, row.mean)))
        for row in group.rows
    )  # fmt: skip
    # every row of a table has one citation
    legend = [f"From {group.rows[0].origin}.", "mean: of the values shown, unweighted."]
    legend += [f"† {row.method}, {row.variant}: {row.note}." for row in group.rows if row.note]
    title = f"Published, trained on {group.source}: mIoU in % as printed, protocols differ by row, not ranked"
    return Table(title, ("", "method", "backbone", *group.targets, "mean"), rows, keys=3, legend=tuple(legend))


def _best(scores: Iterable[Score | None]) -> float | None:
    values = [round(score.miou, 3) for score in scores if score and not score.partial]
    return max(values) if len(values) > 1 else None


def _score_cell(score: Score | None, best: float | None, *, interval: bool = True) -> Cell:
    if score is not None and score.partial:
        return Cell(percent(score, mark="~", interval=interval))
    if score is not None and best is not None and round(score.miou, 3) == best:
        return Cell(percent(score, mark="*", interval=interval), "best")
    return Cell(percent(score, interval=interval))


def _method(row: Row) -> str:
    return f"{row.method} ({row.variant})" if row.variant else row.method


def _shared_prefix(targets: Sequence[str]) -> str:
    return "streets-" if targets and all(target.startswith("streets-") for target in targets) else ""


TABLES: Tables = {"Leaderboard": _leaderboard}
