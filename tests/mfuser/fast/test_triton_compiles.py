"""Triton's compiler takes the kernels of fast inference for a GPU, which its interpreter does not show, without a stack."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[1] / "ops" / "triton_compile.py"


@pytest.mark.full
@pytest.mark.parametrize(("name", "kernels"), [("gated", 3), ("normed", 3), ("attention", 5), ("attention_tma", 2)])
def test_triton_compiles_it_for_a_gpu(name, kernels, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), name, "bfloat16"],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [line.partition(", ")[2].partition(",")[0] for line in done.stdout.splitlines()] == ["0 bytes of stack"] * kernels
