"""Reproducible random numbers: one raw PCG64 stream per purpose, and trigonometry by table.

NumPy guarantees the raw stream of a bit generator, but not the methods of `Generator`; a libm may differ from
another by the last bit. So a draw is 53 raw bits, and angles are steps of a quarter degree with rounded sines.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")

STEPS = 1440  # angles are quarter degrees
SINE = tuple(round(math.sin(2.0 * math.pi * step / STEPS), 6) for step in range(STEPS))


def turn(degrees: float) -> tuple[float, float]:
    """Return (cos, sin) of an angle in degrees, rounded to a quarter degree: equal on every machine."""
    step = math.floor(degrees * 4.0 + 0.5)
    return SINE[(step + STEPS // 4) % STEPS], SINE[step % STEPS]


def generator(*key: object) -> np.random.PCG64:
    """Return a bit generator keyed by the text of `key`; the same key gives the same stream on any machine."""
    text = "/".join(str(part) for part in key)
    return np.random.PCG64(int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little"))


def uniform(bits: np.random.PCG64, count: int) -> NDArray[np.float64]:
    """Return (count,) float64 in [0, 1) from the raw 64-bit stream."""
    return (bits.random_raw(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Dice:
    """Scalar draws for scene code, from blocks of one raw stream."""

    def __init__(self, *key: object) -> None:
        self._bits = generator(*key)
        self._values: Iterator[float] = iter(())

    def draw(self) -> float:
        """Return a uniform number in [0, 1)."""
        for value in self._values:
            return value
        self._values = iter(uniform(self._bits, 1024).tolist())
        return next(self._values)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.draw()

    def chance(self, probability: float) -> bool:
        return self.draw() < probability

    def index(self, count: int) -> int:
        return int(self.draw() * count)

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.draw() * len(options))]

    def weighted(self, options: Mapping[T, float]) -> T:
        """Return a key with probability proportional to its weight."""
        left = self.draw() * sum(options.values())
        for option, weight in options.items():
            left -= weight
            if left < 0.0:
                return option
        return option
