"""`benchmarks/two_gpus.py` with two processes on a CPU: every part, and the table of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "two_gpus.py"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--device", "cpu", "--options", "graphs"], "--options graphs: CUDA graphs need a GPU; leave it out"),
        (["--batches", "8", "5"], "--batches 5: two GPUs have equal parts, so even numbers from 2 on"),
        (["--steps", "10"], "--steps: the first ten are not timed, so more than those"),
    ],
)
def test_it_refuses(words: list[str], problem: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert problem in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_trainings_have_the_batches_and_options_asked_for(tmp_path: Path) -> None:
    words = [sys.executable, str(SCRIPT), str(tmp_path), "--device", "cpu", "--tiny", "--parts", "train"]
    words += ["--batches", "2", "--options", "frozen"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "| 2 | bf16 + frozen | " in (tmp_path / "scale.md").read_text()
    for processes in (1, 2):
        assert "frozen: bf16" in (tmp_path / f"work/train-2-{processes}/recipe.yaml").read_text()


@pytest.mark.full
def test_two_processes_are_measured_and_end(tmp_path: Path) -> None:
    words = [sys.executable, str(SCRIPT), str(tmp_path), "--device", "cpu", "--tiny"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "scale.json").read_text())
    assert [row["batch"] for row in found["train"]] == [2, 4]
    assert all(rate > 0 for row in found["train"] for rate in row["images_per_second"])
    assert found["eval"]["equal"]
    assert found["ends"]["two_whole_runs"] == 0
    for row in (found["ends"]["a process killed"], found["ends"]["the launcher told to end"]):
        assert row["status"]
        assert row["furthest_weight"] == 0
    assert "equal to the last bit" in (tmp_path / "scale.md").read_text()
