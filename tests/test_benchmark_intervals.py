"""The simulation of intervals of the mIoU runs, and its methods agree where they must."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "interval_coverage.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("interval_coverage", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_a_table_of_every_method_is_printed(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--repeats", "2", "--images", "20", "--rare", "4", "--truth", "1000"])
    script.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(script.METHODS) + 1
    assert len({line.count("|") for line in lines}) == 1


def test_methods_agree_where_every_class_is_common(script: ModuleType) -> None:
    rng = np.random.default_rng(0)
    counts = script.World(0, 0.04, rng, 1000).draw(300)[0]
    low, high = script.metrics.interval(counts)
    for name, method in script.METHODS.items():
        found = method(script.sums(counts), rng)
        assert found == pytest.approx((low, high), abs=0.3 * (high - low)), name
