"""The cells of a sweep: a table of their states."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from dgbench.render.numbers import duration
from dgbench.render.table import ABSENT, Cell, Table

if TYPE_CHECKING:
    from dgbench.sweep.cells import Status

_STYLES: dict[str, Literal["good", "warn", "bad", "dim"]] = {"done": "good", "running": "warn", "failed": "bad", "waiting": "dim"}


def sweep_tables(cells: Sequence[Status]) -> list[Table]:
    """Return one table, and how many cells are in each state."""
    rows = tuple(
        (
            Cell(one.cell),
            Cell(one.state, _STYLES[one.state]),
            Cell(f"{one.step}/{one.steps}"),
            Cell(ABSENT if one.seconds_left is None else duration(one.seconds_left)),
            Cell(one.job or ABSENT),
            Cell(one.reason or ABSENT),
        )
        for one in cells
    )
    counts = Counter(one.state for one in cells)
    legend = ", ".join(f"{counts[state]} {state}" for state in ("done", "running", "waiting", "failed") if counts[state])
    return [
        Table("", ("cell", "state", "step", "left", "job", "reason"), rows, left=True, legend=(f"{len(cells)} cells: {legend}.",))
    ]
