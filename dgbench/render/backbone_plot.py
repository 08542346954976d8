"""A plot of a backbone table: accuracy against time or operations, and the trunks' cost over image sizes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgbench.render.pictures import _COLOURS, _MARKERS, _as_it_is, _figure, _label_points, _written

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from dgbench.cost.backbones import BackboneTable


def draw_backbones(found: BackboneTable, path: Path) -> Path:
    """Draw printed accuracy against our time, without a GPU against operations, and cost a pixel over sizes; return the path.

    Raises: OSError if it cannot be _written.
    """
    timed = any(point.ms for line in found.sweep for point in line.points)
    figure, axes = _figure(3 if timed else 2, columns=3)
    _accuracy(found, axes[0])
    sides = [point.side for point in found.sweep[0].points]
    for line in found.sweep:
        style: dict[str, Any] = {**_style(_kind(line.trunk)), "label": _as_it_is(line.trunk), "markersize": 5}
        pixels = [side**2 / 1e6 for side in sides]
        axes[1].plot(sides, [p.operations / 1e9 / n for p, n in zip(line.points, pixels, strict=True)], **style)
        if timed:
            measured = [(p.side, p.ms.median / n) for p, n in zip(line.points, pixels, strict=True) if p.ms]
            axes[2].plot([side for side, _ in measured], [ms for _, ms in measured], **style)
    axes[1].set_ylabel("trunk alone, GMAC a megapixel")
    axes[1].set_title("level: linear in tokens", fontsize=10)
    if timed:
        axes[2].set_ylabel(f"trunk alone, ms a megapixel, {found.dtype}")
        axes[2].set_title(_as_it_is(found.hardware.name) if found.hardware else "", fontsize=10)
    for axis in axes[1:]:
        axis.set(xscale="log", yscale="log", xlabel="side of a square image in pixels")
        axis.set_xticks(sides, [str(side) for side in sides], fontsize=8)
        axis.minorticks_off()
        low, high = axis.get_ylim()
        ticks = [step * 10**power for power in range(-3, 5) for step in (1, 2, 5) if low <= step * 10**power <= high]
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=7)
    return _written(figure, path)


# the same colour in every panel; the last two have none in that palette
_KINDS = ("resnet", "deit", "swin", "convnext", "nat", "vim", "vmamba", "replknet")


def _style(kind: str) -> dict[str, Any]:
    number = _KINDS.index(kind)
    return {"color": (*_COLOURS, "black", "gray")[number], "marker": (*_MARKERS, "X", "*")[number]}


def _kind(trunk: str) -> str:
    return next(kind for kind in _KINDS if trunk.startswith(kind))


def _accuracy(found: BackboneTable, axis: Axes) -> None:
    from dgbench.cost.tradeoff import Point

    table = found.table
    timed = any(row.whole for row in found.rows)
    families: dict[str, list[Point]] = {}
    for row in found.rows:
        score = row.printed.scores[table.score]
        cost = row.whole.ms.median if row.whole else None if timed else row.count.operations / 1e9
        if score is not None and cost is not None:
            families.setdefault(_kind(row.printed.trunk), []).append(Point(row.printed.backbone, "published", cost, score / 100))
    for kind, points in families.items():
        points.sort(key=lambda point: point.cost)
        axis.plot([p.cost for p in points], [100 * p.miou for p in points], markersize=6, **_style(kind))
    points = [point for family in families.values() for point in family]
    costs, scores = [point.cost for point in points], [100 * point.miou for point in points]
    axis.set_xlim(min(costs) - 0.15 * (max(costs) - min(costs)), max(costs) + 0.25 * (max(costs) - min(costs)))
    axis.set_ylim(min(scores) - 1, max(scores) + 1)
    _label_points(points, axis)
    size = f"{table.size[0]}x{table.size[1]}"
    axis.set_xlabel(f"ms an image of {size}, {found.dtype}, measured here" if timed else f"GMAC an image of {size}")
    axis.set_ylabel(f"{table.score} in %, as printed")
    axis.set_title(_as_it_is(table.title), fontsize=10)
    axis.grid(alpha=0.3)
