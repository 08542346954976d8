"""Plots: accuracy against operations, a fusion layer against the number of tokens, mIoU against the severity of a shift."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgbench import atomic
from dgbench.render.outside import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dgbench.cost.fusion import FusionProfile
    from dgbench.cost.tradeoff import Panel, Point, Tradeoff
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
        draw_panel(panel, found, axis)
    for axis in axes[len(found.panels) :]:
        axis.set_axis_off()
    return _written(figure, path)


def draw_panel(panel: Panel, found: Tradeoff, axis: Axes) -> None:
    """Draw mIoU against operations of one group of comparable models."""
    axis.set_xlabel(f"{found.unit} a crop (convention {found.convention})", fontsize=9)
    for kind, (meaning, style) in _KINDS.items():
        points = [point for point in panel.points if point.kind == kind]
        if not points:
            continue
        axis.scatter([p.cost for p in points], [100 * p.miou for p in points], label=meaning, s=36, zorder=3, **style)
        for point in points:
            if point.half is not None and math.isfinite(point.half):
                axis.errorbar(point.cost, 100 * point.miou, yerr=100 * point.half, color="0.5", capsize=2, zorder=2)
    costs, scores = [point.cost for point in panel.points], [100 * point.miou for point in panel.points]
    axis.set_xscale("log")
    axis.set_xlim(min(costs) / 2.5, 2.5 * max(costs))
    _label_costs(axis)
    halves = [point.half if point.half is not None and math.isfinite(point.half) else 0.0 for point in panel.points]
    ends = [100 * (point.miou + sign * half) for point, half in zip(panel.points, halves, strict=True) for sign in (-1, 1)]
    margin = max(1.0, 0.25 * (max(scores) - min(scores)))
    axis.set_ylim(max(0.0, min(*ends, min(scores) - margin)), min(100.0, max(*ends, max(scores) + margin)))
    _label_points(panel.points, axis)
    axis.set_ylabel("mIoU in %, mean over unseen domains", fontsize=9)
    axis.tick_params(labelsize=8)
    lines = (textwrap.shorten(line, 64, placeholder=" …") for line in panel.title.splitlines())
    axis.set_title("\n".join(map(_as_it_is, lines)), fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="lower right")


def _label_points(points: Sequence[Point], axis: Axes) -> None:
    """Write each point's label where it lies on no other label and on no point, as far as there is such a place."""
    width, height = (72 / axis.figure.dpi * pixels for pixels in (axis.bbox.width, axis.bbox.height))
    to_place = (axis.transScale + axis.transLimits).transform  # 0..1 of the panel
    places = [to_place((point.cost, 100 * point.miou)) * (width, height) for point in points]
    taken = [(x - 4.0, y - 4.0, x + 4.0, y + 4.0) for x, y in places]
    for point, (x, y) in sorted(zip(points, places, strict=True), key=lambda pair: pair[0].miou):
        wide, high = _LETTER * len(point.label), 9.0
        choices = [
            ("left", "center", 7.0, 0.0, (x + 5, y - high / 2, x + 7 + wide, y + high / 2)),
            ("right", "center", -7.0, 0.0, (x - 7 - wide, y - high / 2, x - 5, y + high / 2)),
            ("center", "bottom", 0.0, 6.0, (x - wide / 2, y + 5, x + wide / 2, y + 6 + high)),
            ("center", "top", 0.0, -6.0, (x - wide / 2, y - 6 - high, x + wide / 2, y - 5)),
        ]
        inside = [one for one in choices if one[4][0] >= 0 and one[4][2] <= width] or choices
        best = min(inside, key=lambda one: sum(_overlap(one[4], other) for other in taken))
        taken.append(best[4])
        ha, va, across, up, _ = best
        axis.annotate(
            _as_it_is(point.label),
            (point.cost, 100 * point.miou),
            xytext=(across, up),
            textcoords="offset points",
            fontsize=7,
            ha=ha,
            va=va,
        )


_LETTER = 3.9  # points of width of a letter of size 7, about
_Box = tuple[float, float, float, float]  # left, bottom, right, top


def _overlap(a: _Box, b: _Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _label_costs(axis: Axes) -> None:
    """Label 1, 2, 3 and 5 of each decade and nothing between them; powers alone where there are many decades."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    low, high = axis.get_xlim()
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5) if high / low < 1000 else (1,)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axis.yaxis.set_major_formatter("{x:g}")


def draw_severity(found: Severity, path: Path) -> Path:
    """Draw a panel of weather and one for each corrupted domain, mIoU over severity; return the path.

    Raises: OSError if it cannot be written.
    """
    panels = severity_panels(found)
    figure, axes = _figure(len(panels), columns=2, width=7)
    for (domain, curves), axis in zip(panels.items(), axes, strict=False):
        draw_severity_panel(domain, curves, axis)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    variant = f" ({found.variant})" if found.variant else ""
    figure.suptitle(_as_it_is(f"{found.method}{variant}, trained on {found.source}"), fontsize=11)
    return _written(figure, path)


def severity_panels(found: Severity) -> dict[str, list[Curve]]:
    """Return the curves of each panel by the corrupted domain; those of weather are under ""."""
    panels: dict[str, list[Curve]] = {}
    for curve in found.curves:
        panels.setdefault(curve.domain if curve.corruption else "", []).append(curve)
    return panels


def draw_severity_panel(domain: str, curves: Sequence[Curve], axis: Axes) -> None:
    """Draw the curves of weather, or of one corrupted domain."""
    _draw_curves(curves, axis)
    n, of = curves[0].n_images, curves[0].n_available
    count = f"{n} of {of} images" if curves[0].partial else f"{n} images"
    name = domain or "weather of rendered streets"
    axis.set_title(_as_it_is(f"{name}{' (rendered)' * curves[0].rendered}, {count}"), fontsize=10)
    axis.set_xlabel("level of corruption, 0: clean" if domain else "severity")


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


def _figure(panels: int, columns: int = 2, width: float = 6, height: float = 4.2) -> tuple[Figure, list[Axes]]:
    # not pyplot, which keeps its figures and asks for a display
    from matplotlib.figure import Figure

    across = min(columns, panels)
    down = math.ceil(panels / across)
    figure = Figure(figsize=(width * across, height * down), layout="constrained")
    return figure, list(figure.subplots(down, across, squeeze=False).flat)


def _plain_numbers(axis: Axes) -> None:
    """Write 2.5, not 2.5 x 10^0, on a logarithmic axis that spans less than a decade, which has labels between the powers."""
    from matplotlib.ticker import FuncFormatter

    low, high = axis.get_ylim()
    if high < 10 * low:
        plain = FuncFormatter(lambda value, _: f"{value:.4g}")
        axis.yaxis.set_major_formatter(plain)
        axis.yaxis.set_minor_formatter(plain)


def _plain_rates(axis: Axes) -> None:
    """Write 20,000, not 2 x 10^4; between the powers of ten only where there are few of these."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _whole_steps(axis: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _written(figure: Figure, path: Path) -> Path:
    from matplotlib import rc_context

    buffer = io.BytesIO()
    # no date and no random names, so that the same numbers give the same file
    dateless = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower(), {})
    with rc_context({"svg.hashsalt": "dgbench"}):
        figure.savefig(buffer, format=path.suffix.lower().removeprefix("."), dpi=150, metadata=dateless)
    return atomic.write(path, buffer.getvalue())


def svg_of(draw: Callable[[Axes], None], *, width: float = 6, height: float = 3.8) -> bytes:
    """Return one panel as SVG without a background, whose texts are text in a font of the page that shows it.

    Args:
        draw: draws on the panel.
        width, height: in inches.
    """
    from matplotlib import rc_context

    buffer = io.BytesIO()
    nobody = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.hashsalt": "dgbench", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure, (axis,) = _figure(1, width=width, height=height)
        draw(axis)
        figure.savefig(buffer, format="svg", transparent=True, metadata=nobody)
    return buffer.getvalue()
