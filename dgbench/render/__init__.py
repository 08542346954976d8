"""Output of results: tables drawn by Rich on a terminal, aligned text elsewhere, or JSON.

Results go to stdout, everything else to stderr. Colour is never the only mark: the best value has a `*`.
A file for each kind of result turns it into tables; `table` draws them, `texts` writes them for other programs, `pictures` plots.
"""

from dgbench.render.backbone_plot import draw_backbones
from dgbench.render.bars import progress, transfers
from dgbench.render.curves import draw_curves
from dgbench.render.lab_pictures import (
    draw_convolution,
    draw_copying,
    draw_memory,
    draw_scans,
    draw_speeds,
    draw_step_errors,
)
from dgbench.render.numbers import duration, percent
from dgbench.render.pictures import draw_fusion, draw_severity, draw_tradeoff
from dgbench.render.results import show, tell
from dgbench.render.table import ABSENT, WIDTH, Cell, Table, plain
from dgbench.render.terminal import failure, note, warning, write

__all__ = [
    "ABSENT",
    "WIDTH",
    "Cell",
    "Table",
    "draw_backbones",
    "draw_convolution",
    "draw_copying",
    "draw_curves",
    "draw_fusion",
    "draw_memory",
    "draw_scans",
    "draw_severity",
    "draw_speeds",
    "draw_step_errors",
    "draw_tradeoff",
    "duration",
    "failure",
    "note",
    "percent",
    "plain",
    "progress",
    "show",
    "tell",
    "transfers",
    "warning",
    "write",
]
