"""Source by target: a table for each protocol, rows of models by what they were trained on, columns of domains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dgbench.render.flat import FlatRow, flat_row, flatten
from dgbench.render.protocols import with_hash
from dgbench.render.table import ABSENT, PARTIAL, Cell, Table

if TYPE_CHECKING:
    from dgbench.report.matrix import Matrix, MatrixRow, Value


def matrix_tables(found: Sequence[Matrix]) -> list[Table]:
    tables: list[Table] = []
    titles: set[str] = set()
    for matrix in found:
        exports = " on rendered exports, not the published sets" if matrix.rendered else ""
        title = f"Source by target{exports}, protocol {with_hash(matrix.protocol, matrix.protocol_digest)}: mIoU in %"
        # what two matrices of one title differ in is inside their protocol hashes
        alike = "; at another image size or label map than the table above" if title in titles else ""
        tables.append(_table(matrix, title + alike))
        titles.add(title)
    return tables


def _table(matrix: Matrix, title: str) -> Table:
    # of other sources it would be over other domains
    averaged = len({(row.source, row.source_rendered) for row in matrix.rows}) == 1 and _unseen(matrix) > 1
    prefix = "streets-" if all(target.startswith("streets-") for target in matrix.targets) else ""
    several = any(row.kind == "seeds" for row in matrix.rows)
    listed = sum(row.kind == "run" for row in matrix.rows) > 1 and several
    rows = []
    for row, label in zip(matrix.rows, _labels(matrix.rows), strict=True):
        source = f"{row.source} (rendered)" if row.source_rendered else row.source
        keys = [Cell(label), Cell(source + (PARTIAL if row.partial_source else "")), Cell(_runs(row))]
        values = [*row.values.values(), *([row.mean] if averaged else [])]
        bold = listed and row.kind == "seeds"
        rows.append((*keys, *(Cell(_text(value), "best" if bold else "") for value in values)))
    targets = (target.removeprefix(prefix) for target in matrix.targets)
    header = ("method", "trained on", "run", *targets, *(["mean"] if averaged else []))
    return Table(title, header, tuple(rows), keys=3, legend=_legend(matrix, prefix, averaged))


def _unseen(matrix: Matrix) -> int:
    values = [[row.values.get(target) for row in matrix.rows] for target in matrix.targets]
    return sum(not any(value is not None and value.seen for value in column) for column in values)


def _legend(matrix: Matrix, prefix: str, averaged: bool) -> tuple[str, ...]:
    values = [value for row in matrix.rows for value in row.values.values() if value is not None]
    lines = [f"Columns: {prefix}*." if prefix else "", "(…): the model was trained on this domain."]
    lines = [" ".join(filter(None, lines))]
    if any(value.deviation is not None for value in values):
        lines.append("±: standard deviation over training runs with other seeds (n - 1), not the interval over images.")
    if averaged:
        lines.append("mean: over the other domains, only where all are complete.")
    if any(value.partial for value in values):
        lines.append(f"{PARTIAL} behind a score: of only some images of the split, or more than it has.")
    if any(row.partial_source for row in matrix.rows):
        lines.append(f"{PARTIAL} behind a source: trained on other images than all of its split.")
    return tuple(lines)


def _text(value: Value | None) -> str:
    if value is None:
        return ABSENT
    spread = f" ±{100 * value.deviation:.1f}" if value.deviation is not None else ""
    text = f"{100 * value.miou:.1f}{PARTIAL if value.partial else ''}{spread}"
    return f"({text})" if value.seen else text


def _runs(row: MatrixRow) -> str:
    if row.kind == "seeds":
        return f"{len(row.seeds)} seeds"
    return Path(row.runs[0]).name or f"seed {row.seeds[0]}"


def _labels(rows: Sequence[MatrixRow]) -> list[str]:
    """Return for each row the shortest name that no other model of its source has."""
    forms = [
        lambda row: f"{row.method} ({row.variant})" if row.variant else row.method,
        lambda row: row.recipe,
        lambda row: ", ".join([row.recipe, *(f"{key}={value}" for key, value in row.settings.items())]),
    ]
    # rows of one model: its runs and their mean
    models = {_model(row): row for row in rows}
    counts = [Counter((row.source, form(row)) for row in models.values()) for form in forms]
    names = {
        key: next(
            (form(row) for form, count in zip(forms, counts, strict=True) if count[row.source, form(row)] == 1), forms[-1](row)
        )
        for key, row in models.items()
    }
    return [names[_model(row)] for row in rows]


def _model(row: MatrixRow) -> tuple[object, ...]:
    return row.method, row.variant, row.recipe, row.source, row.source_rendered, repr(dict(row.settings))


def matrix_rows(found: Sequence[Matrix]) -> list[FlatRow]:
    """A row for each model of each matrix, which are numbered; of each score, whether the model was trained on the domain."""
    return [
        flat_row(
            row,
            without=("seeds", "values", "mean", "settings"),
            matrix=number,
            protocol=matrix.protocol,
            protocol_digest=matrix.protocol_digest,
            targets_rendered=matrix.rendered,
        )
        | {"seeds": "; ".join(map(str, row.seeds))}
        | _flat_values(row)
        | {f"settings_{key}": str(value) for key, value in row.settings.items()}
        for number, matrix in enumerate(found, 1)
        for row in matrix.rows
    ]


def _flat_values(row: MatrixRow) -> FlatRow:
    values: FlatRow = {}
    for name, value in {**row.values, "mean_unseen": row.mean}.items():
        if value is not None:
            flatten(name, value, values)
    return values
