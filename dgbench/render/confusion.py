"""A confusion matrix as a heat map: where each cell lies, how dark it is and what it says."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dgbench.data.labels import NAMES

_SIDE = 26  # of a cell, in the map's own units
_LEFT, _TOP = 88, 84  # room for the names
_SHOWN = 0.0005  # smaller shares have no cell
_WORDED = 0.01  # and from here on, a number


class HeatCell(NamedTuple):
    """One cell that is not empty."""

    x: int
    y: int
    depth: float  # 0..1
    text: str  # in percent, "" where it is small
    dark: bool  # the number needs a light colour
    told: str  # in words


class Name(NamedTuple):
    """The name of a row and a column."""

    text: str
    at: int  # from the first cell's middle, both ways


class Heat(NamedTuple):
    """A heat map; rows are labels, columns predictions."""

    cells: tuple[HeatCell, ...]
    names: tuple[Name, ...]
    side: int
    left: int
    top: int
    size: int  # of all cells together


def heat(counts: NDArray[Any]) -> Heat:
    """Return the heat map of (K, K) counts: the shares of each row."""
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    cells = [
        HeatCell(
            _LEFT + column * _SIDE,
            _TOP + row * _SIDE,
            round(0.08 + 0.92 * float(shares[row, column]), 3),
            f"{100 * shares[row, column]:.0f}" if shares[row, column] >= _WORDED else "",
            bool(shares[row, column] > 0.8),
            f"{NAMES[row]} taken for {NAMES[column]}: {100 * shares[row, column]:.1f} %",
        )
        for row, column in np.argwhere(shares >= _SHOWN).tolist()
    ]
    names = tuple(Name(name, i * _SIDE + _SIDE // 2) for i, name in enumerate(NAMES[: len(counts)]))
    return Heat(tuple(cells), names, _SIDE, _LEFT, _TOP, _SIDE * len(counts))
