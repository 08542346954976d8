"""How calls are timed: percentiles, turns, and how many."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

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


def test_sleep_takes_no_less_than_it_says() -> None:
    found = interleaved({"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.01)}, CPU, at_most=0.06)
    assert found["short"].median >= 2
    assert found["long"].median >= 10
    for taken in found.values():
        assert taken.low <= taken.median <= taken.high


@pytest.fixture
def sleep(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Callable[[], None]]:
    """Make calls that take exactly so many seconds, by a clock that nothing else moves: a real one also counts who else runs."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    return lambda seconds: lambda: clock.__setitem__(0, clock[0] + seconds)


def test_a_call_takes_what_the_clock_moves_by_meanwhile(sleep: Callable[[float], Callable[[], None]]) -> None:
    found = interleaved({"short": sleep(0.25), "long": sleep(1.5)}, CPU, at_most=8)
    assert found["short"] == Times(250, 250, 250, 10)  # 16 s for both
    assert found["long"] == Times(1500, 1500, 1500, 10)
    assert median_ms(sleep(0.5), CPU, at_most=1) == 500


@pytest.mark.parametrize(("seconds", "calls"), [(0.5, 16), (2.0, 5), (6.0, 5), (7.0, 5), (8.0, 4)])
def test_a_few_calls_are_timed_however_long_they_take(
    seconds: float, calls: int, sleep: Callable[[float], Callable[[], None]]
) -> None:
    # within four times what was asked for
    assert times(sleep(seconds), CPU, at_most=8, least=5).calls == calls


def test_a_very_slow_call_is_not_repeated_beyond_the_limit(sleep: Callable[[float], Callable[[], None]]) -> None:
    assert times(sleep(20), CPU, at_most=8, least=50).calls == 2


def test_a_cpu_has_a_name_and_no_counter_of_energy() -> None:
    assert hardware(CPU) == Hardware("cpu")
    assert joules(lambda: None, CPU) is None
