"""How calls are timed: percentiles, turns, and how many."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch

from dgbench.cost.timing import Hardware, Times, hardware, interleaved, joules, median_ms, times

CPU = torch.device("cpu")


@pytest.mark.parametrize("count", [1, 2, 5, 20, 21, 300])
def test_the_median_and_what_90_percent_lie_between(count: int) -> None:
    samples = np.random.default_rng(count).lognormal(size=count)
    found = Times.of(list(samples))
    assert found.median == np.median(samples)
    assert found.low == np.percentile(samples, 5, method="nearest")
    assert found.high == np.percentile(samples, 95, method="nearest")
    assert found.calls == count


def test_several_calls_take_turns_so_that_drift_is_under_all() -> None:
    order: list[str] = []
    found = interleaved({name: lambda name=name: order.append(name) for name in "abc"}, CPU, at_most=0.002)  # type: ignore[misc]
    assert order == list(itertools.islice(itertools.cycle("abc"), len(order)))
    rounds = len(order) // 3 - 1  # the first round warms up
    assert {name: taken.calls for name, taken in found.items()} == dict.fromkeys("abc", rounds)
    assert rounds >= 5


def test_sleep_takes_as_long_as_it_says() -> None:
    found = interleaved({"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.01)}, CPU, at_most=0.06)
    assert 2 <= found["short"].median < 10 <= found["long"].median < 50
    for taken in found.values():
        assert taken.low <= taken.median <= taken.high


@pytest.mark.parametrize(("seconds", "calls"), [(0.0, 5), (0.05, 5)])
def test_a_few_calls_are_timed_however_long_they_take(seconds: float, calls: int) -> None:
    # within four times what was asked for
    taken = times(lambda: time.sleep(seconds), CPU, at_most=0.08, least=calls)
    assert taken.calls >= calls
    assert median_ms(lambda: time.sleep(0.001), CPU, at_most=0.01) >= 1


def test_a_very_slow_call_is_not_repeated_beyond_the_limit() -> None:
    begun = time.perf_counter()
    taken = times(lambda: time.sleep(0.1), CPU, at_most=0.05, least=50)
    assert 1 <= taken.calls <= 3
    assert time.perf_counter() - begun < 1


def test_a_cpu_has_a_name_and_no_counter_of_energy() -> None:
    assert hardware(CPU) == Hardware("cpu")
    assert joules(lambda: None, CPU) is None
