"""Pictures of costs: accuracy against operations, and a fusion layer against the number of tokens."""

from __future__ import annotations

import io
import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgbench import atomic
from dgbench.render.outside import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dgbench.cost.fusion import FusionProfile
    from dgbench.cost.tradeoff import Panel, Tradeoff

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


def _as_it_is(text: str) -> str:
    # matplotlib reads text between two dollars as a formula
    return visible(text).replace("$", r"\$")


def _figure(panels: int, columns: int = 2) -> tuple[Figure, list[Axes]]:
    # not pyplot, which keeps its figures and needs a display
    from matplotlib.figure import Figure

    across = min(columns, panels)
    down = math.ceil(panels / across)
    figure = Figure(figsize=(6 * across, 4.2 * down), layout="constrained")
    return figure, list(figure.subplots(down, across, squeeze=False).flat)


def _written(figure: Figure, path: Path) -> Path:
    from matplotlib import rc_context

    buffer = io.BytesIO()
    # no date and no random names, so that the same numbers give the same file
    dateless = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower(), {})
    with rc_context({"svg.hashsalt": "dgbench"}):
        figure.savefig(buffer, format=path.suffix.lower().removeprefix("."), dpi=150, metadata=dateless)
    return atomic.write(path, buffer.getvalue())
