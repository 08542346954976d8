"""`benchmarks/scan_forms.py` where it cannot measure: its help, and one line that says what is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
