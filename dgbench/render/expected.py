"""A training against what its recipe is expected to score."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dgbench.render.flat import FlatRow, flat_row
from dgbench.render.table import Cell, Table

if TYPE_CHECKING:
    from dgbench.report.expected import Expected


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
    """A row for each score that a range is known of, or one that says why there is none."""
    if found.reason:
        return [{"recipe": found.recipe, "reason": found.reason}]
    return [
        flat_row(verdict, recipe=found.recipe, seeds=found.seeds, origin=found.origin) | {"within": verdict.within}
        for verdict in found.verdicts
    ]
