"""`benchmarks/scan_forms.py` where it cannot measure: its help, and one line that says what is missing."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "scan_forms.py"


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the script in some folder, without a GPU even where there is one."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_help_says_what_each_part_prints(tmp_path: Path) -> None:
    done = run("--help", folder=tmp_path)
    assert done.returncode == 0
    for part in ("unit", "deform", "sweep", "profile", "block", "check", "forward"):
        assert f"\n- {part}: " in done.stdout


@pytest.mark.parametrize("options", [[], ["--parts", "check", "--json", "out.json"]], ids=["all", "some"])
def test_without_a_gpu_one_line_says_so(options: list[str], tmp_path: Path) -> None:
    done = run(*options, folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "error: torch finds no CUDA GPU: run this where there is one\n"
    assert not done.stdout
    assert not [*tmp_path.iterdir()]


def test_a_part_that_fails_costs_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    script = importlib.import_module("scan_forms")
    bench = script.Bench(torch.device("cpu"), tmp_path / "out.json")

    def fails(_: object, library: str) -> None:
        raise RuntimeError(f"no launch of {library}")

    bench.attempt("block", fails, "plain")
    bench.attempt("forward", lambda bench: bench.add("forward", "3 us", us=3))
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert found["wrong"] == 1
    assert found["rows"] == {"block": [{"error": "RuntimeError: no launch of plain"}], "forward": [{"us": 3}]}
