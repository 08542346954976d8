"""`benchmarks/two_gpus.py` with two processes on a CPU: every part, and the table of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "two_gpus.py"


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
