"""Accuracy against cost as it is drawn: short titles, and no text on another."""

from __future__ import annotations

from itertools import combinations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dgbench.cost.tradeoff import Panel, Point, Tradeoff, of_board
from dgbench.progress import Silent
from dgbench.render.pictures import draw_panel
from dgbench.report.leaderboard import leaderboard


def texts(panel: Panel) -> list[tuple[str, object]]:
    """The labels of ticks and points of a panel, and where matplotlib puts them."""
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axis = figure.subplots()
    draw_panel(panel, Tradeoff((panel,), "GMAC", "mac"), axis)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    axis.set_xlim(*axis.get_xlim())
    low, high = axis.get_xlim()
    shown = [tick.label1 for tick in axis.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    shown += [*axis.get_xticklabels(minor=True), *axis.texts]
    return [(one.get_text(), one.get_window_extent(canvas.get_renderer())) for one in shown if one.get_text()]


@pytest.mark.parametrize(
    "places",
    [
        ((0.15, 0.134), (0.22, 0.1341)),
        ((0.15, 0.2), (0.151, 0.2), (0.152, 0.2)),
        ((1040, 0.7184), (1045, 0.717), (1296, 0.7187)),
        ((0.2, 0.2), (50, 0.4), (1296, 0.7)),
    ],
)
def test_no_label_lies_on_another(places: tuple[tuple[float, float], ...]) -> None:
    points = tuple(Point(f"mfuser (number {i})", "run", cost, miou, 0.01) for i, (cost, miou) in enumerate(places))
    shown = texts(Panel("a → b\nprotocol unified", points, ()))
    assert {point.label for point in points} <= {text for text, _ in shown}
    assert not [(a, b) for (a, one), (b, other) in combinations(shown, 2) if one.overlaps(other)]  # type: ignore[attr-defined]


def test_titles_are_short() -> None:
    found = of_board(leaderboard([]), Silent())
    titles = [panel.title.splitlines() for panel in found.panels]
    assert ["gta5 → cityscapes, bdd100k, mapillary", "Zhang and Tan, CVPR 2025, Table 1"] in titles
    assert all(len(line) <= 64 for lines in titles for line in lines)
