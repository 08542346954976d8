"""Tables of the leaderboard: own results by rank, one table for each comparable group, and the published tables."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from dgbench.render.details import class_tables, condition_tables
from dgbench.render.flat import FlatRow, flat_row, flatten
from dgbench.render.numbers import percent
from dgbench.render.protocols import with_hash
from dgbench.render.published import published_table
from dgbench.render.table import ABSENT, MARKS, PARTIAL, Cell, Table

if TYPE_CHECKING:
    from dgbench.report.rows import Group, Leaderboard, Row, Score

_NAMED = 5  # rows that a line of the legend names


def leaderboard_tables(board: Leaderboard) -> list[Table]:
    """Return a table for each group, behind it those of its details, and the published tables last."""
    tables = [table for _, of_group in group_tables(board) for table in of_group]
    if not tables:
        tables = [Table("No results of your own yet: dgbench train streets/mfuser", (), ())]
    return tables + [published_table(group) for group in board.published]


def group_tables(board: Leaderboard) -> list[tuple[Group, list[Table]]]:
    """Return each group with its table, whose rows are the group's in their order, and those of its details."""
    found = []
    titles: set[str] = set()
    names = _names(board.groups)
    for group, labels in zip(board.groups, names, strict=True):
        title = _title(group)
        # two groups with the same title differ in their protocol hashes
        key = f"{title} {group.targets}"
        alike = "; at another image size or label map than the table above" if key in titles else ""
        short = _title(group, "")
        own = _own(group, labels, title + alike)
        found.append((group, [own, *class_tables(group, labels, short), *condition_tables(group, labels, short)]))
        titles.add(key)
    return found


def leaderboard_rows(board: Leaderboard) -> list[FlatRow]:
    """Return a row for each model of each numbered table: what it is, its scores and whether each is partial."""
    return [
        flat_row(
            row,
            without=("source_score", "scores", "mean", "settings", "shift"),
            table=number,
            trained_on=group.source,
            trained_on_rendered=group.source_rendered,
            trained_on_part=row.partial_source,
            protocol=group.protocol,
            protocol_digest=group.protocol_digest,
            targets_rendered=group.rendered,
        )
        | _flat_scores(row)
        | {name: getattr(row.shift, name) for name in ("gap", "retention", "spread", "worst")}
        | {f"settings_{key}": str(value) for key, value in row.settings.items()}
        for number, group in enumerate((*board.groups, *board.published), 1)
        for row in group.rows
    ]


def _flat_scores(row: Row) -> FlatRow:
    from dgbench.data.labels import NAMES

    values: FlatRow = {}
    for name, score in {"source_val": row.source_score, **row.scores, "mean": row.mean}.items():
        if score is not None:
            flatten(name, dataclasses.replace(score, iou=()), values)
            flatten(f"{name}_iou", dict(zip(NAMES, score.iou, strict=False)), values)
    return values


def _title(group: Group, what: str = ": mIoU in %") -> str:
    prefix = _shared_prefix(group.targets)
    source = f"{group.source} (rendered)" if group.source_rendered else group.source
    exports = ", scored on rendered exports, not the published sets" if group.rendered else ""
    targets = f", scored on {prefix}*" if prefix else ""
    protocol = with_hash(group.protocol, group.protocol_digest)
    return f"Trained on {source}{exports or targets}, protocol {protocol}{what}"


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
    best = [_best(column) for column in zip(*map(_all_scores, ranked), strict=True)]
    prefix = _shared_prefix(group.targets)
    seeds = any(row.seeds > 1 for row in group.rows)
    first = ("#", "method", *(["seeds"] if seeds else []))
    scored = ("source val", *(target.removeprefix(prefix) for target in group.targets), "mean")
    wide, narrow = [], []
    for row, label in zip(group.rows, labels, strict=True):
        mark = PARTIAL if row.partial_source else ""
        keys = [Cell("ref" if row.kind == "reference" else str(row.rank or ABSENT)), Cell(label + mark)]
        keys += [Cell(str(row.seeds) if row.kind == "run" else ABSENT)] if seeds else []
        marked = best if row.rank is not None else [_NONE] * len(scored)
        scores = list(zip(_all_scores(row), marked, strict=False))
        lost = [Cell(_points(row.shift.gap)), Cell(_points(row.shift.retention))]
        more = [Cell(_points(row.shift.spread)), Cell(row.shift.worst.removeprefix(prefix) or ABSENT), *_origin(row)]
        style: Literal["", "dim"] = "dim" if row.kind == "reference" else ""
        wide.append(_styled([*keys, *(_score_cell(*pair) for pair in scores), *lost, *more], style))
        narrow.append(_styled([*keys, *(_score_cell(*pair, interval=False) for pair in scores), *lost], style))
    header = (*first, *scored, "gap", "retention", "spread", "worst", "images", "date", "commit")
    full = _without_empty(header, wide, len(first) + len(scored))
    less = _without_empty(header[: len(first) + len(scored) + 2], narrow, len(first) + len(scored))
    compact = Table(title, *less, keys=2, legend=_own_legend(group, labels, intervals=False), marked=True)
    legend = _own_legend(group, labels, intervals=True)
    together = len(first) + len(scored)
    return Table(title, *full, keys=2, legend=legend, compact=compact, together=together, marked=True)


def _without_empty(
    header: tuple[str, ...], rows: Sequence[tuple[Cell, ...]], first: int
) -> tuple[tuple[str, ...], tuple[tuple[Cell, ...], ...]]:
    """Leave out columns in which no row has anything, from the given one on."""
    kept = [i for i in range(len(header)) if i < first or any(row[i].text != ABSENT for row in rows)]
    return tuple(header[i] for i in kept), tuple(tuple(row[i] for i in kept) for row in rows)


def _styled(cells: Sequence[Cell], style: Literal["", "dim"]) -> tuple[Cell, ...]:
    return tuple(dataclasses.replace(cell, style=style) if style else cell for cell in cells)


def _origin(row: Row) -> list[Cell]:
    n_images = sum(score.n_images or 0 for score in row.scores.values() if score)
    commit = "".join([row.commits[0][:7], "+" * row.commits[0].endswith("+")]) if row.commits else ABSENT
    more = f" and {len(row.commits) - 1} more" if len(row.commits) > 1 else ""
    return [Cell(str(n_images) if n_images else ABSENT), Cell(row.created[:10] or ABSENT), Cell(commit + more)]


def _points(share: float | None) -> str:
    return ABSENT if share is None else f"{100 * share:.1f}"


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
    texts = texts or ([f"{row.seeds} seeds"] if row.seeds > 1 else [])
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
    lines = ["Intervals, spread, images, date, commit: in a wider terminal or with --json."] if not intervals else []
    scores = [score for row in group.rows for score in _all_scores(row) if score]
    if intervals and any(score.half is not None and score.deviation is None for score in scores):
        lines.append("±: half the 95 % interval over images (not over training runs).")
    if intervals and any(score.deviation is not None for score in scores):
        lines.append("±, of several seeds: standard deviation over them; each value is their mean.")
    lines.append(f"source val: {group.source}, seen in training. mean: over the targets, only where all are complete.")
    if any(row.shift.gap is not None for row in group.rows):
        lines.append("gap: source val - mean, in points. retention: mean / source val, in %.")
    if intervals and any(row.shift.spread is not None for row in group.rows):
        lines.append("spread: best target - worst target, in points. worst: the target with the lowest mIoU.")
    lines += _ranks_legend(group, labels)
    if any(score.partial for row in group.rows for score in _all_scores(row) if score):
        lines.append(f"{PARTIAL} only some images of the split, or more than it has: not ranked, not averaged.")
    partial = [(row, label) for row, label in zip(group.rows, labels, strict=True) if row.partial_source]
    for images, available in sorted({(row.source_images, row.source_available) for row, _ in partial}):
        several = [label for row, label in partial if (row.source_images, row.source_available) == (images, available)]
        lines.append(f"{_listed(several)}{PARTIAL}: trained on {images} of {available} source images: not ranked.")
    started: dict[str, list[str]] = {}
    for row, label in zip(group.rows, labels, strict=True):
        for weights in row.weights:
            started.setdefault(weights, []).append(label)
    for weights, some in started.items():
        which = f" ({_listed(some)})" if len(some) < len(group.rows) else ""
        lines.append(f"Weights{which}: {weights}.")
    lines += [f"{label}: {row.note}." for row, label in zip(group.rows, labels, strict=True) if row.kind == "run" and row.note]
    own = {row.recipe for row in group.rows if row.kind == "run"}
    for row in group.rows:
        if row.kind == "reference":
            absent = "" if row.recipe in own else ", not run here"
            lines.append(f"ref: expected of recipe {row.recipe}{absent}. From: {row.origin}.")
    if group.other_targets:
        lines.append(f"Also scored: {', '.join(group.other_targets)} (dgbench leaderboard --targets ...).")
    return tuple(lines)


def _ranks_legend(group: Group, labels: Sequence[str]) -> list[str]:
    lines = []
    ranked = [(row, label) for row, label in zip(group.rows, labels, strict=True) if row.rank is not None]
    if len(ranked) > 1 and any(not row.untested for row, _ in ranked):
        lines.append("#: 1 + the rows that are significantly better, paired over images; 5 %, Holm over all pairs of rows.")
    untested: dict[str, list[str]] = {}
    for row, label in ranked:
        if row.untested:
            untested.setdefault(row.untested, []).append(label)
    for why, some in list(untested.items())[:_NAMED]:
        which = f" of {_listed(some)}" if len(some) < len(ranked) else ""
        lines.append(f"No test of ties{which}, ranked by the mean alone: {why}.")
    if more := list(untested.values())[_NAMED:]:
        lines.append(f"No test of ties, for other reasons, of {sum(map(len, more))} more.")
    return lines


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(labels[:_NAMED]) + (f" and {len(labels) - _NAMED} more" if len(labels) > _NAMED else "")


_NONE: tuple[float | None, float | None] = (None, None)


def _best(scores: Iterable[Score | None]) -> tuple[float | None, float | None]:
    """Return the best value and the second of a column as they are printed; of two rows the second is no distinction."""
    values = [round(score.miou, 3) for score in scores if score and not score.partial]
    distinct = sorted(set(values), reverse=True)
    if len(values) < 2:
        return _NONE
    return distinct[0], distinct[1] if len(values) > 2 and len(distinct) > 1 else None


def _score_cell(score: Score | None, best: tuple[float | None, float | None], *, interval: bool = True) -> Cell:
    if score is not None and score.partial:
        return Cell(percent(score, mark=PARTIAL, interval=interval))
    if score is not None and (value := round(score.miou, 3)) in best:
        style: Literal["best", "second"] = "best" if value == best[0] else "second"
        return Cell(percent(score, mark=MARKS[style], interval=interval), style)
    return Cell(percent(score, interval=interval))


def _method(row: Row) -> str:
    return f"{row.method} ({row.variant})" if row.variant else row.method


def _shared_prefix(targets: Sequence[str]) -> str:
    return "streets-" if targets and all(target.startswith("streets-") for target in targets) else ""
