"""`benchmarks/step.py` on a CPU: every path of it, with tiny towers."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "step.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_of_steps", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_it_prints_a_row_for_each_option_added_and_where_a_step_goes(script, tmp_path, capsys):
    out = tmp_path / "step.json"
    words = ["--towers", "tiny", "--size", "64", "--device", "cpu", "--batch", "2", "--steps", "2", "--json", str(out)]
    assert script.main([*words, "--options", "frozen", "checkpoint"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["batch"], row["options"]) for row in rows] == [
        (2, "bf16"),
        (2, "bf16 + frozen"),
        (2, "bf16 + frozen + checkpoint"),
    ]
    assert all(row["lowest"] <= row["ms"] <= row["highest"] for row in rows)
    printed = capsys.readouterr().out
    assert printed.count("| 2 | bf16") == 3
    assert "## Batch 2, bf16 + frozen + checkpoint" in printed
    assert "Calls in a step: cudaStreamSynchronize 0" in printed
