"""A comparison of two sides as tables: the verdict, mIoU by target, IoU by class, costs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dgbench.render.flat import FlatRow, flat_row
from dgbench.render.table import ABSENT, Cell, Style, Table

if TYPE_CHECKING:
    from dgbench.report.compare import Comparison, Score
    from dgbench.report.statistics import Difference

_STYLES: dict[str, Style] = {"better": "good", "worse": "bad", "missing": "warn", "not comparable": "warn", "new": "", "same": ""}
_HEADLINES = {"pass": "Pass", "regression": "Regression", "not comparable": "Not comparable"}
_NAMED = 3  # classes named behind a target


def comparison_tables(found: Comparison, *, per_class: bool = False) -> list[Table]:
    """Return the verdict, and a table each of scores, classes (where asked for) and costs."""
    tables = [_headline(found)]
    if found.scores:
        tables.append(_scores(found))
    if per_class:
        tables += class_changes(found)
    if found.costs:
        tables.append(_costs(found))
    return tables


def class_changes(found: Comparison) -> list[Table]:
    """Return a table of classes for each score."""
    return [_classes(score) for score in found.scores if score.classes]


def comparison_rows(found: Comparison) -> list[FlatRow]:
    """Return a row for each score, class and cost."""
    rows: list[FlatRow] = []
    for score in found.scores:
        row = flat_row(score, without=("classes", "changed"), kind="mIoU")
        rows.append(row | {"changed": "; ".join(score.changed)})
        for name, change in score.classes.items():
            rows.append(flat_row(change, kind="class IoU", model=score.model, target=score.target, name=name))
    return rows + [flat_row(cost, kind="cost") for cost in found.costs]


def _headline(found: Comparison) -> Table:
    lines = [*(f"Regression: {line}." for line in found.regressions), *(f"Not compared: {line}" for line in found.problems)]
    lines += [f"Not compared: {s.model} on {s.target}: {s.note or s.verdict}" for s in found.scores if s.verdict in _OPEN]
    lines += [*found.notes]
    return Table(f"{_HEADLINES[found.verdict]}: {found.head} against {found.base}", (), (), legend=tuple(lines))


_OPEN = ("missing", "not comparable")


def _scores(found: Comparison) -> Table:
    rows = []
    several = len({score.model for score in found.scores}) > 1
    for score in found.scores:
        change = score.difference
        cells = [
            Cell(score.target),
            Cell(_percent(score.base)),
            Cell(_percent(score.head)),
            Cell(_points(change.value) if change else ABSENT),
            Cell(_interval(change)),
            Cell(score.verdict, _STYLES[score.verdict]),
            Cell(str(score.images or ABSENT)),
            Cell(f"{100 * score.detectable:.1f}" if score.detectable else ABSENT),
            Cell(ABSENT if score.power is None else f"{100 * score.power:.0f} %"),
        ]
        rows.append(tuple([Cell(score.model), *cells] if several else cells))
    header = ("target", "base", "head", "change", "95 % interval", "verdict", "images", "detects", "1 point")
    allowed = f" and, of a drop, larger than {found.max_drop:g} points" if found.max_drop else ""
    legend = [
        f"mIoU in %, change in points. better, worse: significant at 5 %, Holm-corrected over the rows of a model{allowed}.",
        "same: no change was found; one smaller than `detects` may be there.",
        "detects: the smallest drop, in points, that so many images show with a probability of 80 %. 1 point: probability that"
        " a drop of one point is found.",
    ]
    for score in found.scores:
        if score.changed:
            legend.append(f"Classes on {score.target}{f', {score.model}' if several else ''}: {_named(score)}.")
    models = {score.model for score in found.scores}
    title = f"mIoU of {next(iter(models))}" if len(models) == 1 else "mIoU"
    return Table(title, (("model",) if several else ()) + header, tuple(rows), keys=2 if several else 1, legend=tuple(legend))


def _named(score: Score) -> str:
    """Return the classes that changed most, of the significant ones."""
    changed = sorted(score.changed, key=lambda name: -abs(score.classes[name].value))
    text = ", ".join(f"{name} {_points(score.classes[name].value)}" for name in changed[:_NAMED])
    return text + (f" and {len(changed) - _NAMED} more, see --per-class" if len(changed) > _NAMED else "")


def _classes(score: Score) -> Table:
    rows = tuple(
        (
            Cell(name),
            Cell(_points(change.value)),
            Cell(_interval(change)),
            Cell(*_significant(change, changed=name in score.changed)),
        )
        for name, change in score.classes.items()
    )
    legend = ("Significant at 5 %, Holm-corrected over the classes. Classes do not decide the verdict.",)
    return Table(
        f"IoU by class on {score.target}, {score.model}: change in points",
        ("class", "change", "95 % interval", ""),
        rows,
        legend=legend,
    )


def _significant(change: Difference, *, changed: bool) -> tuple[str, Style]:
    if not changed:
        return "", ""
    return ("better", "good") if change.value > 0 else ("worse", "bad")


def _costs(found: Comparison) -> Table:
    several = len({cost.model for cost in found.costs}) > 1
    rows = []
    for cost in found.costs:
        cells = [
            Cell(cost.name),
            Cell(_number(cost.base)),
            Cell(_number(cost.head)),
            Cell(ABSENT if cost.change is None else f"{100 * cost.change:+.1f} %"),
            Cell(ABSENT if cost.low is None or cost.high is None else f"[{100 * cost.low:+.1f}, {100 * cost.high:+.1f}]"),
            Cell(cost.verdict, _STYLES[cost.verdict]),
        ]
        rows.append(tuple([Cell(cost.model), *cells] if several else cells))
    header = ("cost", "base", "head", "change", "95 % interval", "verdict")
    if found.max_slowdown is None:
        legend = ["Costs do not decide the verdict; --max-slowdown makes speed do so."]
    else:
        legend = [f"A significant slowdown by more than {found.max_slowdown:g} % is a regression."]
    legend.append("Times that differ by 3 % or less are taken for equal.")
    notes = dict.fromkeys(f"{cost.name}{f', {cost.model}' if several else ''}: {cost.note}." for cost in found.costs if cost.note)
    legend += notes
    return Table("Costs", (("model",) if several else ()) + header, tuple(rows), keys=2 if several else 1, legend=tuple(legend))


def _percent(value: float | None) -> str:
    return ABSENT if value is None else f"{100 * value:.1f}"


def _points(value: float) -> str:
    return ABSENT if math.isnan(value) else f"{100 * value:+.1f}"


def _interval(change: Difference | None) -> str:
    if change is None or math.isnan(change.low):
        return ABSENT
    return f"[{100 * change.low:+.1f}, {100 * change.high:+.1f}]"


def _number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.4g}"
