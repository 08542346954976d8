"""Published numbers: dim, without a rank, each with where it was read and at which size the images were tested."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dgbench.render.numbers import percent
from dgbench.render.table import ABSENT, Cell, Table

if TYPE_CHECKING:
    from dgbench.report.rows import Group, Row

NOTED = "†"  # behind a method: the legend says more


def published_table(group: Group) -> Table:
    """Return one published table. Numbers have the digits that were printed; means that were not stand in brackets."""
    sources = list(dict.fromkeys(row.origin for row in group.rows))
    averaged = any(row.mean is not None for row in group.rows)
    read_in = {origin: f"[{number}]" for number, origin in enumerate(sources, 1)} if len(sources) > 1 else {}
    rows = []
    for row in group.rows:
        texts = ["pub", row.method + (NOTED if row.note else ""), row.variant]
        texts += [percent(score, row.digits) for score in row.scores.values()]
        texts += [_mean(row)] if averaged else []
        texts += [row.test_size, row.reported_by, *([read_in[row.origin]] if read_in else [])]
        rows.append(tuple(Cell(text, "dim") for text in texts))
    header = ("", "method", "backbone", *group.targets, *(["mean"] if averaged else []), "tested", "by")
    header = (*header, "from") if read_in else header
    apart = f", {group.title}" if group.title else ""
    title = f"Published{apart}, trained on {group.source}: mIoU in %, protocols differ by row, not ranked"
    return Table(title, header, tuple(rows), keys=3, legend=_legend(group, read_in))


def _mean(row: Row) -> str:
    shown = percent(row.mean, row.digits)
    return shown if row.printed_mean or row.mean is None else f"({shown})"


def _legend(group: Group, read_in: dict[str, str]) -> tuple[str, ...]:
    lines = [f"From {group.rows[0].origin}."] if not read_in else []
    if any(row.mean is not None for row in group.rows):
        brackets = "; in brackets: computed here" if any(row.mean and not row.printed_mean for row in group.rows) else ""
        lines.append(f"mean: over the targets, unweighted, as printed{brackets}. {ABSENT}: not printed.")
    lines.append("by: reported by the method's own paper or repository (own) or by another work (other).")
    lines.append("tested: as the method's repository does, which may not be how these numbers were taken.")
    lines += [f"tested {name}: {meaning}." for name, meaning in sorted(group.test_sizes.items())]
    lines += [f"{NOTED} {row.method}, {row.variant}: {row.note}." for row in group.rows if row.note]
    return (*lines, *(f"{number} {origin}." for origin, number in read_in.items()))
