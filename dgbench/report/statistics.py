"""Whether one model's mIoU differs from another's: intervals and p-values over images and training runs, and their power.

A difference is a corpus-level one: the matrices of all images are summed before an IoU is taken. Its error has two sources.
*Images*: both models are scored on the same ones, and one image is left out of both at a time (jackknife, Tukey 1958);
`benchmarks/interval_coverage.md` measures why not the percentile bootstrap, which is too short where a class stands in few
images. *Training runs*: with two or more seeds on a side, the variance of their scores over their number is added (Welch
1947). The degrees of freedom are Satterthwaite's (1946). `benchmarks/verdicts.py` measures how often the result is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dgbench import metrics

LEVEL = 0.05
"""Probability of an error of the first kind."""
POWER = 0.8
"""Probability with which a drop of `Difference.detectable` is found."""

Seeds = Sequence[NDArray[Any]]
"""Per-image counts (n, K, K), one array for each training run; image i is the same one in all of them."""


@dataclass(frozen=True, slots=True)
class Variance:
    """The variance of an estimate, and the degrees of freedom with which it is known (infinite for a variance of zero)."""

    value: float
    freedom: float

    def __add__(self, other: Variance) -> Variance:
        """Return the variance of a sum of independent estimates (Satterthwaite 1946)."""
        total = self.value + other.value
        shares = sum(v.value**2 / v.freedom for v in (self, other) if v.value > 0)
        return Variance(total, total**2 / shares if shares > 0 else math.inf)

    def __mul__(self, factor: float) -> Variance:
        """Return the variance of the estimate times the square root of a factor."""
        return Variance(self.value * factor, self.freedom)


NONE = Variance(0.0, math.inf)


@dataclass(frozen=True, slots=True)
class Difference:
    """mIoU of one model less that of another, in -1..1.

    Attributes:
        value: the difference.
        low, high: its 95 % interval; NaN where it is unknown, as with fewer than two images.
        p: two-sided p-value of no difference; 1 for two equal sets of matrices, NaN where it is unknown.
        error: standard error.
        freedom: its degrees of freedom.
        seeds: training runs of each side. With one on a side the interval says nothing of other training runs of it.
    """

    value: float
    low: float
    high: float
    p: float
    error: float
    freedom: float
    seeds: tuple[int, int] = (1, 1)

    def detectable(self, level: float = LEVEL, power: float = POWER) -> float:
        """Return the smallest true drop that a test at this level finds with this probability, in 0..1."""
        from scipy import optimize

        if not self.error > 0:
            return self.error  # 0, or NaN
        # in standard errors: the power rises from level / 2 at none to 1
        errors = optimize.brentq(lambda size: _power(size, self.freedom, level) - power, 0.0, 1000.0)
        return float(errors) * self.error

    def power(self, drop: float, level: float = LEVEL) -> float:
        """Return the probability with which a true drop of this size, in 0..1, is found at this level."""
        if math.isnan(self.error):
            return math.nan
        return _power(drop / self.error, self.freedom, level) if self.error > 0 else 1.0


def difference(
    a: Seeds, b: Seeds, *, classes: Sequence[int] | None = None, absent: metrics.Absent = "skip", level: float = LEVEL
) -> Difference:
    """Return mIoU(b) - mIoU(a) on one target, each the mean over its training runs.

    Args:
        a, b: per-image counts (n, K, K) of each training run; the images are the same ones in the same order.
        classes, absent: as `metrics.miou`'s.

    Raises: ValueError if the shapes differ.
    """
    return mean_difference({"": a}, {"": b}, classes=classes, absent=absent, level=level)


def mean_difference(
    a: Mapping[str, Seeds],
    b: Mapping[str, Seeds],
    *,
    classes: Sequence[int] | None = None,
    absent: metrics.Absent = "skip",
    level: float = LEVEL,
) -> Difference:
    """Return the difference of the means over targets, b - a; the targets' images are drawn independently of each other.

    Args:
        a, b: for each target what `difference` takes. A training run has the same place in the lists of all targets, as its
            scores on them are not independent.

    Raises: ValueError if targets, shapes, or the numbers of training runs of a side differ.
    """
    return compared(summary(a, classes=classes, absent=absent), summary(b, classes=classes, absent=absent), level=level)


@dataclass(frozen=True, slots=True)
class Summary:
    """What a comparison needs of one model; many pairs of a few models take it from each of them once.

    Attributes:
        shapes: (n, 3, K) by target.
        scores: mean mIoU over the targets of each training run.
        without: by target, the mIoU without image i, (n,), the mean over training runs.
    """

    shapes: Mapping[str, tuple[int, ...]]
    scores: NDArray[np.float64]
    without: Mapping[str, NDArray[np.float64]]


def summary(side: Mapping[str, Seeds], *, classes: Sequence[int] | None = None, absent: metrics.Absent = "skip") -> Summary:
    """Summarize one side of a comparison, given as to `mean_difference`.

    Raises: ValueError if the numbers of training runs differ, or the shapes on one target.
    """
    if len({len(runs) for runs in side.values()}) != 1 or not all(side.values()):
        raise ValueError("a side needs the same number of training runs, one or more, on each target")
    shapes, scores, without = {}, [], {}
    for target, runs in side.items():
        reduced = [_reduced(run) for run in runs]
        shapes[target] = reduced[0].shape
        if uneven := {run.shape for run in reduced} - {shapes[target]}:
            raise ValueError(_uneven({shapes[target], *uneven}))
        totals = [run.sum(axis=0) for run in reduced]
        scores.append([float(_means(total, classes, absent)) for total in totals])
        each = [_means(total - run, classes, absent) for total, run in zip(totals, reduced, strict=True)]
        without[target] = np.mean(each, axis=0)
    return Summary(shapes, np.array(scores).mean(axis=0), without)


def compared(a: Summary, b: Summary, *, level: float = LEVEL) -> Difference:
    """Return the difference of the means over targets, b - a.

    Raises: ValueError if targets or shapes differ.
    """
    if a.shapes.keys() != b.shapes.keys():
        raise ValueError(f"the targets differ: {sorted(a.shapes)} and {sorted(b.shapes)}")
    if uneven := [target for target in a.shapes if a.shapes[target] != b.shapes[target]]:
        raise ValueError(_uneven({a.shapes[uneven[0]], b.shapes[uneven[0]]}))
    variance = NONE
    for target in a.without:
        variance += _of_jackknife(b.without[target] - a.without[target]) * (1 / len(a.without) ** 2)
    for scores in (a.scores, b.scores):
        if len(scores) > 1:
            variance += Variance(float(scores.var(ddof=1)) / len(scores), len(scores) - 1.0)
    return _tested(float(b.scores.mean() - a.scores.mean()), variance, (len(a.scores), len(b.scores)), level)


def _uneven(shapes: set[tuple[int, ...]]) -> str:
    return f"paired matrices differ in shape: {sorted((s[0], s[2], s[2]) for s in shapes)}"


def widened(change: Difference, variance: float, level: float = LEVEL) -> Difference:
    """Return the difference with a known variance added to its own, such as that between training runs."""
    own = Variance(change.error**2, change.freedom if change.error > 0 else math.inf)
    return _tested(change.value, own + Variance(variance, math.inf), change.seeds, level)


def holm(p: Sequence[float], level: float = LEVEL) -> list[bool]:
    """Return which of several hypotheses are rejected, so that the probability of any false one is at most `level`.

    Holm (1979): the smallest p-value is held against level / m, the next against level / (m - 1), until one is not below. NaN
    is never rejected and does not count.
    """
    known = sorted((value, place) for place, value in enumerate(p) if not math.isnan(value))
    rejected = [False] * len(p)
    for rank, (value, place) in enumerate(known):
        if value > level / (len(known) - rank):
            break
        rejected[place] = True
    return rejected


def _reduced(counts: NDArray[Any]) -> NDArray[np.float64]:
    """Return hits, labels and predictions of each image, (n, K, K) -> (n, 3, K): all that an IoU needs."""
    hits = np.diagonal(counts, axis1=1, axis2=2)
    return np.stack([hits, counts.sum(axis=2), counts.sum(axis=1)], axis=1).astype(np.float64)


def _means(sums: NDArray[np.float64], classes: Sequence[int] | None, absent: metrics.Absent) -> NDArray[np.float64]:
    """Return the mIoU of reduced counts, (..., 3, K) -> (...)."""
    hits, labels = sums[..., 0, :], sums[..., 1, :]
    return metrics.mean_of_classes(metrics.iou_of(hits, labels, sums[..., 2, :], absent), classes)


def _of_jackknife(without: NDArray[np.float64]) -> Variance:
    """Return the variance of a statistic from its values without each of n images; infinite with fewer than two."""
    if len(without) < 2 or np.isnan(without).any():
        return Variance(math.nan, math.nan)
    value, freedom = metrics.jackknife(without)
    return Variance(value, freedom if value > 0 else math.inf)


def _tested(value: float, variance: Variance, seeds: tuple[int, int], level: float) -> Difference:
    from scipy import special

    error = math.sqrt(variance.value) if variance.value >= 0 else math.nan
    if math.isnan(error) or math.isnan(value):
        return Difference(value, math.nan, math.nan, math.nan, math.nan, math.nan, seeds)
    if error == 0:
        return Difference(value, value, value, 1.0 if value == 0 else 0.0, 0.0, math.inf, seeds)
    half = float(special.stdtrit(variance.freedom, 1 - level / 2)) * error
    p = 2 * float(special.stdtr(variance.freedom, -abs(value) / error))
    return Difference(value, max(value - half, -1.0), min(value + half, 1.0), p, error, variance.freedom, seeds)


def _power(size: float, freedom: float, level: float) -> float:
    """Return the probability that a two-sided t-test finds a drop of so many standard errors in the right direction."""
    from scipy import special, stats

    if math.isinf(freedom):
        return float(special.ndtr(size - special.ndtri(1 - level / 2)))
    return float(stats.nct.sf(special.stdtrit(freedom, 1 - level / 2), freedom, size))
