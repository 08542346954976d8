"""Calls beside a model."""

from __future__ import annotations

import threading
import time

import pytest

from dgbench.engine.beside import Beside


def test_results_are_in_the_order_of_the_calls_and_each_is_told():
    told = []
    with Beside[int](lambda: told.append(threading.current_thread())) as calls:
        for number in range(30):
            calls.put(lambda number=number: (time.sleep(0.001 * (number % 3)), number)[1])
        assert calls.results() == list(range(30))
    assert told == [threading.main_thread()] * 30


def test_an_error_of_a_call_is_raised_():
    def fails() -> int:
        raise OSError("no space left")

    def all_calls() -> list[int]:
        with Beside[int](lambda: None) as calls:
            calls.put(fails)
            return calls.results()

    with pytest.raises(OSError, match="no space left"):
        all_calls()


def test_calls_that_wait_are_bounded():
    gate, begun = threading.Event(), []

    def call() -> int:
        gate.wait(10)
        return 0

    with Beside[int](lambda: begun.append(1)) as calls:
        threading.Timer(0.2, gate.set).start()
        for _ in range(20):
            calls.put(call)
        assert begun, "a later call waited for earlier ones"
        calls.results()
    assert len(begun) == 20
