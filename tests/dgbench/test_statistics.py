"""Differences of mIoU: against plain leave-one-out loops, scipy's Welch test, printed tables, and simulated repeats."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from dgbench import metrics
from dgbench.report.statistics import difference, holm, mean_difference, widened

Counts = NDArray[np.int64]


def images(n: int, seed: int, classes: int = 6) -> Counts:
    rng = np.random.default_rng(seed)
    counts: Counts = rng.poisson(1.0, (n, classes, classes)) * rng.integers(1, 50, (n, 1, classes))
    counts[:, range(classes), range(classes)] += rng.integers(20, 200, (n, classes))
    return counts


def plain_jackknife(statistic: list[float]) -> tuple[float, float]:
    """Standard error and degrees of freedom from the values without each image, written out."""
    n = len(statistic)
    middle = sum(statistic) / n
    squares = [(value - middle) ** 2 for value in statistic]
    variance_of_sum = n * np.var(squares)
    freedom = min(n - 1, 2 * sum(squares) ** 2 / variance_of_sum)
    return math.sqrt((n - 1) / n * sum(squares)), float(freedom)


@pytest.mark.parametrize("absent", ["skip", "unlabelled", "zero"])
@pytest.mark.parametrize("classes", [None, (0, 2, 3), (1, 5)])
def test_a_difference_of_two_runs_is_a_plain_paired_jackknife(absent: Any, classes: tuple[int, ...] | None) -> None:
    a, b = images(12, 1), images(12, 2)
    a[:, 4], b[:, 4] = 0, 0  # a class without labels

    def score(counts: Counts) -> float:
        return metrics.miou(counts.sum(axis=0), classes=classes, absent=absent)

    without = [score(np.delete(b, i, axis=0)) - score(np.delete(a, i, axis=0)) for i in range(12)]
    error, freedom = plain_jackknife(without)
    half = stats.t.ppf(0.975, freedom) * error
    found = difference([a], [b], classes=classes, absent=absent)
    value = score(b) - score(a)
    assert (found.value, found.low, found.high) == pytest.approx((value, value - half, value + half))
    assert found.p == pytest.approx(2 * stats.t.sf(abs(value) / error, freedom))
    assert (found.error, found.freedom) == pytest.approx((error, freedom))


def test_training_runs_on_images_without_spread_are_a_welch_test() -> None:
    # all images alike: what remains is the spread between training runs
    def run(hits: int) -> Counts:
        return np.tile(np.array([[hits, 100 - hits], [3, 97]]), (5, 1, 1))

    a, b = [run(60), run(63), run(58), run(61)], [run(66), run(71), run(64)]
    scores = [[metrics.miou(counts.sum(axis=0)) for counts in side] for side in (a, b)]
    expected = stats.ttest_ind(scores[1], scores[0], equal_var=False)
    found = difference(a, b)
    assert found.seeds == (4, 3)
    assert found.p == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval()
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_the_mean_over_targets_adds_the_variances_of_their_images() -> None:
    base = {"one": [images(20, 1)], "two": [images(30, 2)]}
    head = {"one": [images(20, 3)], "two": [images(30, 4)]}
    parts = [difference(base[name], head[name]) for name in base]
    found = mean_difference(base, head)
    assert found.value == pytest.approx(sum(part.value for part in parts) / 2)
    assert found.error == pytest.approx(math.hypot(*(part.error for part in parts)) / 2)


def test_pairing_finds_what_two_intervals_do_not() -> None:
    a = images(100, 5)
    b = a.copy()
    b[:, 0, 0] += np.minimum(1, b[:, 0, 1])
    b[:, 0, 1] -= np.minimum(1, b[:, 0, 1])
    found = difference([a], [b])
    assert 0 < found.low < found.value < found.high
    assert metrics.interval(a)[1] > metrics.interval(b)[0]


def test_equal_matrices_differ_by_nothing_for_certain() -> None:
    a = images(30, 6)
    found = difference([a], [a])
    assert (found.value, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)
    assert found.detectable() == 0.0


@pytest.mark.parametrize("n", [0, 1])
def test_one_image_says_nothing_of_others(n: int) -> None:
    found = difference([images(2, 1)[:n]], [images(2, 2)[:n]])
    assert math.isnan(found.p)
    assert math.isnan(found.low)
    assert math.isnan(found.power(0.01))


def test_different_numbers_of_images_or_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        difference([images(30, 1)], [images(29, 1)])
    with pytest.raises(ValueError, match="same number of training runs"):
        mean_difference({"a": [images(5, 1)], "b": []}, {"a": [images(5, 1)], "b": [images(5, 1)]})
    with pytest.raises(ValueError, match="targets differ"):
        mean_difference({"a": [images(5, 1)]}, {"b": [images(5, 1)]})


@pytest.mark.parametrize(
    ("p", "rejected"),
    [
        ([0.01, 0.04, 0.03, 0.005], [True, False, False, True]),  # the example of the method's usual textbook page
        ([0.04, 0.03], [False, False]),  # 0.03 > 0.05 / 2, and then no more
        ([0.02, 0.03], [True, True]),
        ([0.04, math.nan], [True, False]),  # one hypothesis that can be tested
        ([], []),
    ],
)
def test_holm_rejects_step_by_step(p: list[float], rejected: list[bool]) -> None:
    assert holm(p) == rejected


def test_power_is_that_of_the_printed_tables_of_the_t_test() -> None:
    # 34 pairs and an effect of half a standard deviation: 0.808 (G*Power's manual, means: difference between two dependent means)
    change = difference([images(34, 1)], [images(34, 2)])
    made = type(change)(0.0, 0.0, 0.0, 1.0, 0.1 / math.sqrt(34), 33.0)
    assert made.power(0.05) == pytest.approx(0.808, abs=1e-3)
    assert made.power(made.detectable()) == pytest.approx(0.8)


def test_known_noise_between_training_runs_widens_an_interval() -> None:
    found = difference([images(50, 1)], [images(50, 2)])
    wider = widened(found, 0.01**2)
    assert wider.value == found.value
    assert wider.error == pytest.approx(math.hypot(found.error, 0.01))
    assert wider.p > found.p


@pytest.fixture(scope="module")
def world() -> ModuleType:
    script = Path(__file__).parents[2] / "benchmarks" / "interval_coverage.py"
    spec = importlib.util.spec_from_file_location("interval_coverage", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_false_alarms_come_about_as_often_as_stated(world: ModuleType) -> None:
    """Two models that are equally good, correlation 0.9; `benchmarks/verdicts.py` has 2,000 repeats."""
    images_of = world.World(0, 0.04, np.random.default_rng(2), 1000, own=0.354, better=0.0)
    alarms = sum(difference([a], [b]).p < 0.05 for a, b in (images_of.draw(60) for _ in range(150)))
    assert stats.binomtest(alarms, 150, 0.05).pvalue > 0.001
