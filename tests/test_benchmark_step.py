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


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["graphs"], "--options graphs: CUDA graphs need a GPU; leave it out"),
        (["graphs", "checkpoint"], "--options graphs and checkpoint do not go together"),
        (["compile", "checkpoint"], "--options compile and checkpoint do not go together"),
    ],
)
def test_it_refuses(script, options, problem, capsys):
    with pytest.raises(SystemExit):
        script.main(["--towers", "tiny", "--size", "64", "--device", "cpu", "--options", *options])
    assert problem in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu_a_row_with_graphs_launches_them(script, tmp_path, capsys):
    words = ["--towers", "tiny", "--size", "64", "--batch", "2", "4", "--steps", "2", "--options", "frozen", "graphs"]
    assert script.main([*words, "--json", str(tmp_path / "step.json")]) == 0
    rows = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert [(row["batch"], row["options"]) for row in rows][-2:] == [(2, "bf16 + frozen + graphs"), (4, "bf16 + frozen + graphs")]
    assert capsys.readouterr().out.count("cudaGraphLaunch 2") == 2
