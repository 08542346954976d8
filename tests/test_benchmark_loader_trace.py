"""`benchmarks/loader_trace.py` on a few small files: what waits is counted, and what works is not."""

from __future__ import annotations

import importlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dgbench.errors import DgbenchError

FOLDER = Path(__file__).parents[1] / "benchmarks"
SMALL = ["--towers", "tiny", "--side", "64", "--files", "3", "--batch", "2", "--workers", "0", "--device", "cpu", "--first", "1"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("loader_trace")


def test_waiting_and_working_are_told_apart(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow() -> Iterator[int]:
        for number in range(4):
            time.sleep(2 if number == 2 else 0)
            yield number

    # a clock that only sleeping moves: a real one also counts who else runs
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    found = list(script.trace(slow(), lambda samples, number: time.sleep(1)))
    assert [step.waited for step in found] == [0, 0, 2000, 0]
    assert [step.took for step in found] == [1000] * 4
    assert script.share_waited(found, 3) < script.share_waited(found, 1) < 1
    steps = [script.Step(100, 900), script.Step(1, 99), script.Step(3, 97)]
    assert script.share_waited(steps, 1) == pytest.approx(0.02)
    text = "\n".join(script.report(steps, 1, 8, "nothing"))
    assert "| 2 | 80.0 | 98.0 | 2.00 | 2.00% | 3, 1 |" in text
    assert "This is within the bar, 2% of the time." in text
    assert "The first 1 steps waited 100 ms" in text


def test_steps_before_an_error_are_kept(script: ModuleType) -> None:
    def failing(count: int) -> Iterator[Any]:
        for _ in range(count):
            yield script.Step(1.0, 9.0)
        raise RuntimeError("out of memory")

    assert script.kept(failing(2)) == ([script.Step(1.0, 9.0)] * 2, "stopped behind 2 steps: RuntimeError: out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        script.kept(failing(0))
    assert script.kept(iter([script.Step(1.0, 9.0)])) == ([script.Step(1.0, 9.0)], "")


def test_steps_of_a_model_and_steps_that_take_a_time(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    assert script.main([str(tmp_path), *SMALL, "--steps", "3", "--json", str(out)]) == 0
    text, found = capsys.readouterr().out, json.loads(out.read_text(encoding="utf-8"))
    assert "tiny + tiny on cpu, 2 images of 64x64 a step, 0 workers, 3 PNGs of 256x128" in text
    assert len(found["waited_ms"]) == len(found["took_ms"]) == 3
    assert found["share"] == pytest.approx(sum(found["waited_ms"][1:]) / sum(found["waited_ms"][1:] + found["took_ms"][1:]), 1e-3)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert len(files) == 6
    assert script.main([str(tmp_path), *SMALL, "--steps", "3", "--step-ms", "40", "--json", str(out)]) == 0
    assert re.search("^# Waiting for batches, steps of 40 ms, 2 images", capsys.readouterr().out, re.M)
    assert all(ms >= 40 for ms in json.loads(out.read_text(encoding="utf-8"))["took_ms"])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")} == files


def test_more_workers_than_cores_are_refused(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(DgbenchError, match="--workers 4096 are more than the"):
        script.main([str(tmp_path), "--workers", "4096"])
