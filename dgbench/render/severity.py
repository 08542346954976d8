"""mIoU as a shift grows: a table of weather, one of corruptions, and a row for each score for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dgbench.render.flat import FlatRow
from dgbench.render.numbers import percent
from dgbench.render.protocols import with_hash
from dgbench.render.table import ABSENT, Cell, Table
from dgbench.report.rows import Score

if TYPE_CHECKING:
    from dgbench.engine.severity import Curve, Severity


def severity_tables(found: Severity) -> list[Table]:
    weather = [curve for curve in found.curves if not curve.corruption]
    corrupted = [curve for curve in found.curves if curve.corruption]
    tables = []
    if weather:
        places = [f"{point.severity:g}" for point in weather[0].points]
        rows = tuple((Cell(curve.domain), *_cells(curve)) for curve in weather)
        title = f"mIoU over the severity of weather: {_model(found)}"
        tables.append(Table(title, ("domain", *places, "area", "kept", "images"), rows, legend=_legend(found, weather)))
    if corrupted:
        levels = ["clean", *(f"{5 * point.severity:g}" for point in corrupted[0].points[1:])]
        rows = tuple((Cell(_domain(curve)), Cell(curve.corruption), *_cells(curve)) for curve in corrupted)
        title = f"mIoU over the level of corruptions: {_model(found)}"
        header = ("domain", "corruption", *levels, "area", "kept", "images")
        tables.append(Table(title, header, rows, keys=2, legend=_legend(found, corrupted)))
    return tables


def _model(found: Severity) -> str:
    variant = f" ({found.variant})" if found.variant else ""
    protocol = with_hash(found.protocol, found.protocol_digest)
    return f"{found.method}{variant}, recipe {found.recipe}, trained on {found.source}, protocol {protocol}"


def _domain(curve: Curve) -> str:
    return f"{curve.domain} (rendered)" if curve.rendered else curve.domain


def _cells(curve: Curve) -> tuple[Cell, ...]:
    scores = [ABSENT if point.miou is None else f"{100 * point.miou:.1f}" for point in curve.points]
    area = ABSENT if curve.area is None else percent(Score(curve.area, *curve.interval))
    kept = ABSENT if curve.retention is None else f"{100 * curve.retention:.0f} %"
    count = f"{curve.n_images} of {curve.n_available}" if curve.partial else str(curve.n_images)
    return (*map(Cell, scores), Cell(area), Cell(kept), Cell(count))


def _legend(found: Severity, curves: Sequence[Curve]) -> tuple[str, ...]:
    legend = ["mIoU in %, higher is better. area: the curve's mean height, ± half its 95 % interval over images."]
    if any(curve.retention is not None for curve in curves):
        legend.append("kept: the area in % of the score at severity 0.")
    if any(curve.rendered for curve in curves):
        legend.append("rendered: an export of rendered scenes stands in the published set's place.")
    legend.append(f"Records: {found.run}")
    return tuple(legend)


def severity_rows(found: Severity) -> list[FlatRow]:
    """A row for each score, beside the area of its curve."""
    model = {name: getattr(found, name) for name in ("method", "variant", "recipe", "source", "protocol", "protocol_digest")}
    return [
        {
            **model,
            "domain": curve.domain,
            "corruption": curve.corruption,
            "severity": point.severity,
            "miou": point.miou,
            "interval_low": point.interval[0],
            "interval_high": point.interval[1],
            "area": curve.area,
            "area_low": curve.interval[0],
            "area_high": curve.interval[1],
            "retention": curve.retention,
            "n_images": curve.n_images,
            "n_available": curve.n_available,
            "partial": curve.partial,
            "rendered": curve.rendered,
            "run": str(found.run),
        }
        for curve in found.curves
        for point in curve.points
    ]
