"""Plots: accuracy against operations, a fusion layer against the number of tokens, mIoU against the severity of a shift."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgbench import atomic
from dgbench.render.outside import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dgbench.cost.fusion import FusionProfile
    from dgbench.cost.tradeoff import Panel, Tradeoff
    from dgbench.engine.severity import Curve, Severity

# colours for colour-blind readers (Okabe and Ito, 2008), and markers for print without colour
_COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7")
_MARKERS = ("o", "v", "s", "^", "D", "P")
_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "run": ("measured here", {"marker": "o", "color": "#0072B2"}),
    "reference": ("expected of a recipe, not run here", {"marker": "s", "facecolors": "none", "edgecolors": "#009E73"}),
    "published": ("published, not comparable with ours", {"marker": "^", "facecolors": "none", "edgecolors": "#D55E00"}),
}


def draw_fusion(found: FusionProfile, path: Path) -> Path:
    """Draw operations, and times where there are some, over the number of tokens; return the path.

    Raises: OSError if it cannot be written.
    """
    timed = any(row.forward for point in found.sweep for row in point.rows)
    figure, axes = _figure(2 if timed else 1)
    names = [_as_it_is(row.fuser) for row in found.sweep[0].rows]
    tokens = [sum(point.tokens) for point in found.sweep]
    for number, name in enumerate(names):
        style: dict[str, Any] = {
            "color": _COLOURS[number % 6],
            "marker": _MARKERS[number % 6],
            "label": name,
            "markersize": 5,
        }
        axes[0].plot(tokens, [point.rows[number].total for point in found.sweep], **style)
        if timed:
            taken = [(n, point.rows[number].forward) for n, point in zip(tokens, found.sweep, strict=True)]
            measured = [(n, times) for n, times in taken if times is not None]
            spread = [[t.median - t.low for _, t in measured], [t.high - t.median for _, t in measured]]
            axes[1].errorbar([n for n, _ in measured], [t.median for _, t in measured], yerr=spread, capsize=2, **style)
    axes[0].set_ylabel(f"{found.unit} (convention {found.convention})")
    axes[0].set_title(_as_it_is(f"One fusion layer, {found.vfm} + {found.vlm}, width {found.dim}"), fontsize=10)
    if timed:
        axes[1].set_ylabel(f"ms, forward, batch {found.batch}, {found.dtype}")
        axes[1].set_title(_as_it_is(found.hardware.name) if found.hardware else "", fontsize=10)
    for axis in axes:
        axis.set(xscale="log", yscale="log", xlabel="tokens of both towers")
        axis.set_xticks(tokens, [f"{n:,}\n{point.size[0]}²" for n, point in zip(tokens, found.sweep, strict=True)], fontsize=8)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    return _written(figure, path)


def draw_tradeoff(found: Tradeoff, path: Path) -> Path:
    """Draw a panel of mIoU against operations for each group of comparable models; return the path.

    Raises: OSError if it cannot be written.
    """
    figure, axes = _figure(len(found.panels), columns=2)
    for panel, axis in zip(found.panels, axes, strict=False):
        _draw_panel(panel, axis)
        axis.set_xlabel(f"{found.unit} a crop (convention {found.convention})")
    for axis in axes[len(found.panels) :]:
        axis.set_axis_off()
    return _written(figure, path)


def _draw_panel(panel: Panel, axis: Axes) -> None:
    for kind, (meaning, style) in _KINDS.items():
        points = [point for point in panel.points if point.kind == kind]
        if not points:
            continue
        axis.scatter([p.cost for p in points], [100 * p.miou for p in points], label=meaning, s=36, zorder=3, **style)
        for point in points:
            if point.half is not None and math.isfinite(point.half):
                axis.errorbar(point.cost, 100 * point.miou, yerr=100 * point.half, color="0.5", capsize=2, zorder=2)
    # by height, left and right in turn, so that labels do not overlap
    for number, point in enumerate(sorted(panel.points, key=lambda point: point.miou)):
        side, shift = ("left", 7) if number % 2 == 0 else ("right", -7)
        axis.annotate(
            _as_it_is(point.label),
            (point.cost, 100 * point.miou),
            xytext=(shift, 0),
            textcoords="offset points",
            fontsize=7,
            ha=side,
            va="center",
        )
    costs, scores = [point.cost for point in panel.points], [100 * point.miou for point in panel.points]
    axis.set_xscale("log")
    axis.set_xlim(min(costs) / 2.5, 2.5 * max(costs))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.tick_params(axis="x", which="both", labelsize=7)
    margin = max(1.0, 0.25 * (max(scores) - min(scores)))
    axis.set_ylim(min(scores) - margin, max(scores) + margin)
    axis.set_ylabel("mIoU in %, mean over unseen domains")
    lines = panel.title.splitlines()
    if panel.left_out:
        names = ", ".join(sorted({label.partition(" (")[0] for label in panel.left_out}, key=str.lower))
        lines.append(f"not drawn, no model here to count: {names}")
    axis.set_title("\n".join(_as_it_is(part) for line in lines for part in textwrap.wrap(line, 84)), fontsize=8)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=7, loc="lower right")


def draw_severity(found: Severity, path: Path) -> Path:
    """Draw a panel of weather and one for each corrupted domain, mIoU over severity; return the path.

    Raises: OSError if it cannot be written.
    """
    panels: dict[str, list[Curve]] = {}
    for curve in found.curves:
        panels.setdefault(curve.domain if curve.corruption else "", []).append(curve)
    figure, axes = _figure(len(panels), columns=2, width=7)
    for (domain, curves), axis in zip(panels.items(), axes, strict=False):
        _draw_curves(curves, axis)
        n, of = curves[0].n_images, curves[0].n_available
        count = f"{n} of {of} images" if curves[0].partial else f"{n} images"
        name = domain or "weather of rendered streets"
        axis.set_title(_as_it_is(f"{name}{' (rendered)' * curves[0].rendered}, {count}"), fontsize=10)
        axis.set_xlabel("level of corruption, 0: clean" if domain else "severity")
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    variant = f" ({found.variant})" if found.variant else ""
    figure.suptitle(_as_it_is(f"{found.method}{variant}, trained on {found.source}"), fontsize=11)
    return _written(figure, path)


def _draw_curves(curves: Sequence[Curve], axis: Axes) -> None:
    by_level = bool(curves[0].corruption)
    few = len(curves) <= len(_COLOURS)
    for number, curve in enumerate(curves):
        mean = curve.corruption == "mean"
        points = [(point, point.miou) for point in curve.points if point.miou is not None]
        places = [point.severity * (5 if by_level else 1) for point, _ in points]
        scores = [100 * miou for _, miou in points]
        name = curve.corruption or curve.domain.removeprefix("streets-")
        area = "" if curve.area is None else f", area {100 * curve.area:.1f}"
        style: dict[str, Any] = {"label": _as_it_is(f"{name.replace('_', ' ')}{area}"), "markersize": 5}
        if mean:
            style |= {"color": "black", "marker": ".", "linewidth": 2.5}
        else:
            style |= {"color": _COLOURS[number % 6], "marker": _MARKERS[number % 6], "linestyle": ("-", "--")[number // 6 % 2]}
        axis.plot(places, scores, **style)
        low, high = ([_percent(point.interval[end]) for point, _ in points] for end in (0, 1))
        if few or mean:
            axis.fill_between(places, low, high, color=style["color"], alpha=0.12, linewidth=0)
    ticks = sorted({point.severity * (5 if by_level else 1) for curve in curves for point in curve.points})
    if min(after - before for before, after in pairwise(ticks)) > 0.06 * (ticks[-1] - ticks[0]):  # else they touch
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ylabel("mIoU in %, shaded: 95 % over images")
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), handlelength=3.5)


def _percent(share: float | None) -> float:
    return math.nan if share is None else 100 * share


def _as_it_is(text: str) -> str:
    # matplotlib reads text between two dollars as a formula
    return visible(text).replace("$", r"\$")


def _figure(panels: int, columns: int = 2, width: float = 6) -> tuple[Figure, list[Axes]]:
    # not pyplot, which keeps its figures and asks for a display
    from matplotlib.figure import Figure

    across = min(columns, panels)
    down = math.ceil(panels / across)
    figure = Figure(figsize=(width * across, 4.2 * down), layout="constrained")
    return figure, list(figure.subplots(down, across, squeeze=False).flat)


def _written(figure: Figure, path: Path) -> Path:
    from matplotlib import rc_context

    buffer = io.BytesIO()
    # no date and no random names, so that the same numbers give the same file
    dateless = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower(), {})
    with rc_context({"svg.hashsalt": "dgbench"}):
        figure.savefig(buffer, format=path.suffix.lower().removeprefix("."), dpi=150, metadata=dateless)
    return atomic.write(path, buffer.getvalue())
