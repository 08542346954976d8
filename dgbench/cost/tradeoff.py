"""Accuracy against cost: each row of the leaderboard with the operations of its model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dgbench.cost.conventions import CONVENTIONS
from dgbench.cost.counted import Subject
from dgbench.cost.profile import counted_total
from dgbench.progress import Progress
from dgbench.recipe import Recipe, load_recipe
from dgbench.report.expected import references
from dgbench.report.leaderboard import leaderboard
from dgbench.report.rows import Group, Row
from dgbench.results import Record


@dataclass(frozen=True, slots=True)
class Point:
    """One model. `miou` is the mean over the panel's targets in 0..1, `half` half its 95 % interval over images."""

    label: str
    kind: Literal["run", "reference", "published"]
    cost: float  # of a crop, in the tradeoff's unit
    miou: float
    half: float | None = None


@dataclass(frozen=True, slots=True)
class Panel:
    """Models that may be compared: one source, one set of targets, one protocol or one published table."""

    title: str
    points: tuple[Point, ...]
    left_out: tuple[str, ...]  # rows whose model cannot be counted, or without a complete mean or source


@dataclass(frozen=True, slots=True)
class Tradeoff:
    """The data of `dgbench profile --plot`."""

    panels: tuple[Panel, ...]
    unit: str
    convention: str


def tradeoff(
    records: Iterable[Record], progress: Progress, *, convention: str = "mac", size: tuple[int, int] | None = None
) -> Tradeoff:
    """Count the models of own runs, of the recipes' reference results, and of published rows that name a recipe.

    Args:
        size: (H, W) to count at; by default each recipe's crop.
    """
    board = leaderboard(records, references(), tested=False)
    groups = [*board.groups, *board.published]
    costs: dict[str, float] = {}
    progress.start("counting", sum(len(group.rows) for group in groups), "rows")
    try:
        panels = tuple(_panel(group, convention, size, costs, progress) for group in groups)
    finally:
        progress.stop()
    return Tradeoff(tuple(panel for panel in panels if panel.points), CONVENTIONS[convention].unit, convention)


def _panel(group: Group, convention: str, size: tuple[int, int] | None, costs: dict[str, float], progress: Progress) -> Panel:
    points, left_out = [], []
    for row in group.rows:
        recipe = _recipe_of(row)
        label = f"{row.method} ({row.variant})" if row.variant else row.method
        if recipe is None or row.mean is None or row.partial_source:
            left_out.append(label)
        else:
            key = f"{recipe.method.model_dump_json()} {size or recipe.data.crop}"
            if key not in costs:
                costs[key] = counted_total(Subject(recipe.method, size or recipe.data.crop, recipe.name), convention)
            points.append(Point(label, row.kind, costs[key], row.mean.miou, row.mean.half))
        progress.advance()
    published = group.rows and group.rows[0].kind == "published"
    rules = group.rows[0].origin if published else f"protocol {group.protocol}"
    return Panel(f"{group.source} to {', '.join(group.targets)}\n{rules}", tuple(points), tuple(left_out))


def _recipe_of(row: Row) -> Recipe | None:
    """Return the recipe that defines the row's model; for a run, its own copy."""
    if row.kind == "run":
        return load_recipe(Path(row.origin) / "recipe.yaml")
    return load_recipe(row.recipe) if row.recipe else None
