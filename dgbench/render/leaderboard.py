"""Tables of the leaderboard: own results by rank, one table for each comparable group, and the published tables."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from dgbench.render.flat import FlatRow, flat_row, flatten
from dgbench.render.numbers import percent
from dgbench.render.protocols import with_hash
from dgbench.render.table import ABSENT, Cell, Table

if TYPE_CHECKING:
    from dgbench.report.expected import Expected
    from dgbench.report.rows import Group, Leaderboard, Row, Score

PARTIAL = "~"  # after a score: not exactly the published split's images; after a name: trained on a part of the source
_NAMED = 5  # rows that a line of the legend names


def leaderboard_tables(board: Leaderboard) -> list[Table]:
    tables: list[Table] = []
    titles: set[str] = set()
    names = _names(board.groups)
    for group, labels in zip(board.groups, names, strict=True):
        title = _title(group)
        # two groups with the same title differ in their protocol hashes
        key = f"{title} {group.targets}"
        alike = "; at another image size or label map than the table above" if key in titles else ""
        tables.append(_own(group, labels, title + alike))
        titles.add(key)
    if not tables:
        tables = [Table("No results of your own yet: dgbench train streets/mfuser", (), ())]
    return tables + [_published(group) for group in board.published]


def leaderboard_rows(board: Leaderboard) -> list[FlatRow]:
    """Return a row for each model of each numbered table: what it is, its scores and whether each is partial."""
    return [
        flat_row(
            row,
            without=("source_score", "scores", "mean", "settings"),
            table=number,
            trained_on=group.source,
            trained_on_rendered=group.source_rendered,
            trained_on_part=row.partial_source,
            protocol=group.protocol,
            protocol_digest=group.protocol_digest,
            targets_rendered=group.rendered,
        )
        | _flat_scores(row)
        | {f"settings_{key}": str(value) for key, value in row.settings.items()}
        for number, group in enumerate((*board.groups, *board.published), 1)
        for row in group.rows
    ]


def _flat_scores(row: Row) -> FlatRow:
    values: FlatRow = {}
    for name, score in {"source_val": row.source_score, **row.scores, "mean": row.mean}.items():
        if score is not None:
            flatten(name, score, values)
    return values


def _title(group: Group) -> str:
    prefix = _shared_prefix(group.targets)
    source = f"{group.source} (rendered)" if group.source_rendered else group.source
    exports = ", scored on rendered exports, not the published sets" if group.rendered else ""
    targets = f", scored on {prefix}*" if prefix else ""
    protocol = with_hash(group.protocol, group.protocol_digest)
    return f"Trained on {source}{exports or targets}, protocol {protocol}: mIoU in %"


def _names(groups: Sequence[Group]) -> list[list[str]]:
    """Return the names of the rows of each group: a run has one name in all tables that were scored alike."""
    together: list[list[Group]] = []
    place: list[int] = []
    having: dict[tuple[object, ...], int] = {}  # what was scored in the same way -> its index
    for group in groups:
        shared = (group.source, group.protocol, group.protocol_digest, group.rendered, group.source_rendered)
        keys = [(*shared, value) for value in group.protocol_hashes]
        found = next((having[key] for key in keys if key in having), len(together))
        together += [[]] if found == len(together) else []
        together[found].append(group)
        place.append(found)
        having |= dict.fromkeys(keys, found)
    names = []
    for several in together:
        rows = {_identity(row): row for group in several for row in group.rows}
        names.append(dict(zip(rows, _labels(list(rows.values())), strict=True)))
    return [[names[i][_identity(row)] for row in group.rows] for group, i in zip(groups, place, strict=True)]


def _identity(row: Row) -> tuple[str, ...]:
    return row.kind, row.method, row.variant, row.recipe, row.recipe_hash, row.origin, row.created


def _own(group: Group, labels: Sequence[str], title: str) -> Table:
    ranked = [row for row in group.rows if row.rank is not None]
    columns = [_all_scores(row) for row in ranked]
    best = [_best(column) for column in zip(*columns, strict=True)]
    prefix = _shared_prefix(group.targets)
    header = ("#", "method", "source val", *(target.removeprefix(prefix) for target in group.targets), "mean", "images")
    wide, narrow = [], []
    for row, label in zip(group.rows, labels, strict=True):
        mark = PARTIAL if row.partial_source else ""
        keys = (Cell("ref" if row.kind == "reference" else str(row.rank or ABSENT)), Cell(label + mark))
        marked = best if row.rank is not None else [None] * len(header)
        n_images = sum(score.n_images or 0 for score in row.scores.values() if score)
        scores = list(zip(_all_scores(row), marked, strict=False))
        cells = (*keys, *(_score_cell(*pair) for pair in scores), Cell(str(n_images) if n_images else ABSENT))
        short = (*keys, *(_score_cell(*pair, interval=False) for pair in scores))
        dim = row.kind == "reference"
        wide.append(tuple(dataclasses.replace(cell, style="dim") if dim else cell for cell in cells))
        narrow.append(tuple(dataclasses.replace(cell, style="dim") if dim else cell for cell in short))
    compact = Table(title, header[:-1], tuple(narrow), keys=2, legend=_own_legend(group, labels, intervals=False))
    return Table(title, header, tuple(wide), keys=2, legend=_own_legend(group, labels, intervals=True), compact=compact)


def _all_scores(row: Row) -> tuple[Score | None, ...]:
    return (row.source_score, *row.scores.values(), row.mean)


def _labels(rows: Sequence[Row]) -> list[str]:
    """Return for each row the shortest name that no other row has."""
    own = {row.recipe for row in rows if row.kind == "run"}
    # a reference beside a row of its own recipe has the same name, with `ref` in front
    named = [row for row in rows if row.kind == "run" or row.recipe not in own]
    forms: list[Callable[[Row], str]] = [_method, lambda row: row.recipe, _settings, _hash]
    forms += [lambda row: f"{_settings(row)} {_time(row)}", lambda row: f"{_hash(row)} {_time(row)}"]
    counts = [Counter(form(row) for row in named) for form in forms]
    unique = [
        next((form(row) for form, count in zip(forms, counts, strict=True) if count[form(row)] == 1), forms[-1](row))
        for row in rows
    ]
    return [row.recipe if row.kind == "reference" and row.recipe in own else name for row, name in zip(rows, unique, strict=True)]


def _settings(row: Row) -> str:
    """Return `streets/mfuser, train.steps=40, seed 1`; for unknown settings the text for the hash that follows."""
    texts = [f"seed {value}" if key == "train.seed" else f"{key}={_short(value)}" for key, value in row.settings.items()]
    return ", ".join([row.recipe, *texts]) if texts else _hash(row)


def _short(value: object) -> str:
    from dgbench.report.settings import value_text

    text = value_text(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


def _hash(row: Row) -> str:
    return f"{row.recipe}#{row.recipe_hash[:4]}"


def _time(row: Row) -> str:
    return row.created[5:16].replace("T", " ")


def _own_legend(group: Group, labels: Sequence[str], *, intervals: bool) -> tuple[str, ...]:
    lines = ["Higher is better; * best."]
    if not intervals:
        lines = ["Intervals and image counts: in a wider terminal or with --json. Higher is better; * best."]
    elif any(score.half is not None for row in group.rows for score in _all_scores(row) if score):
        lines = ["Higher is better; * best. ±: half the 95 % interval over images (not over training runs)."]
    lines.append(f"source val: {group.source}, seen in training. mean: over the targets, only where all are complete.")
    if any(score.partial for row in group.rows for score in _all_scores(row) if score):
        lines.append(f"{PARTIAL} only some images of the split, or more than it has: not ranked, not averaged.")
    partial = [(row, label) for row, label in zip(group.rows, labels, strict=True) if row.partial_source]
    for images, available in sorted({(row.source_images, row.source_available) for row, _ in partial}):
        several = [label for row, label in partial if (row.source_images, row.source_available) == (images, available)]
        which = ", ".join(several[:_NAMED]) + (f" and {len(several) - _NAMED} more" if len(several) > _NAMED else "")
        lines.append(f"{which}{PARTIAL}: trained on {images} of {available} source images: not ranked.")
    own = {row.recipe for row in group.rows if row.kind == "run"}
    for row in group.rows:
        if row.kind == "reference":
            absent = "" if row.recipe in own else ", not run here"
            lines.append(f"ref: expected of recipe {row.recipe}{absent}. From: {row.origin}.")
    if group.other_targets:
        lines.append(f"Also scored: {', '.join(group.other_targets)} (dgbench leaderboard --targets ...).")
    return tuple(lines)


def _published(group: Group) -> Table:
    rows = tuple(
        (
            Cell("pub", "dim"),
            Cell(row.method + ("†" if row.note else ""), "dim"),
            Cell(row.variant, "dim"),
            *(Cell(percent(score, 2), "dim") for score in (*row.scores.values(), row.mean)),
        )
        for row in group.rows
    )
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
        return Cell(percent(score, mark=PARTIAL, interval=interval))
    if score is not None and best is not None and round(score.miou, 3) == best:
        return Cell(percent(score, mark="*", interval=interval), "best")
    return Cell(percent(score, interval=interval))


def _method(row: Row) -> str:
    return f"{row.method} ({row.variant})" if row.variant else row.method


def _shared_prefix(targets: Sequence[str]) -> str:
    return "streets-" if targets and all(target.startswith("streets-") for target in targets) else ""


def expected_tables(found: Expected) -> list[Table]:
    if found.reason:
        return [Table(f"No expected range of recipe {found.recipe} for this run: {found.reason}", (), ())]
    rows = tuple(
        (
            Cell(verdict.target),
            Cell(f"{100 * verdict.miou:.1f}"),
            Cell(f"{100 * verdict.low:.1f} to {100 * verdict.high:.1f}"),
            Cell("within", "good") if verdict.within else Cell("outside", "warn"),
        )
        for verdict in found.verdicts
    )
    width = (
        f"the width is of {found.seeds} training runs with other seeds"
        if found.seeds
        else "the width is a margin: no other seeds were measured"
    )
    legend = (f"Range: expected score ± tolerance; {width}.", f"From: {found.origin}.")
    title = f"This run against what recipe {found.recipe} is expected to give: mIoU in %"
    return [Table(title, ("domain", "mIoU", "expected range", ""), rows, legend=legend)]


def expected_rows(found: Expected) -> list[FlatRow]:
    """Return a row for each score with an expected range, or one that says why there is none."""
    if found.reason:
        return [{"recipe": found.recipe, "reason": found.reason}]
    return [
        flat_row(verdict, recipe=found.recipe, seeds=found.seeds, origin=found.origin) | {"within": verdict.within}
        for verdict in found.verdicts
    ]
