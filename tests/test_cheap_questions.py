"""What is asked before any work answers without the libraries that only the work needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
COMPILER = ("torch._dynamo", "torch._inductor", "sympy", *(() if torch.cuda.is_available() else ("triton",)))
TOWERS = ("timm", "open_clip", "torchvision", "transformers")
COUNTERS = ("fvcore", "accelerate", "datasets", "pandas", "matplotlib")


def loaded(*commands: str) -> set[str]:
    """Run commands in one new process, and return the modules that are imported then."""
    code = f"""
import contextlib, io, json, sys
from dgbench.cli import app
for command in {commands!r}:
    with contextlib.redirect_stdout(io.StringIO()):
        app(command.split(), prog_name="dgbench", standalone_mode=False)
print(json.dumps(sorted(sys.modules)))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


@pytest.mark.parametrize("command", ["models", "models --json"])
def test_the_list_of_towers_needs_no_torch_and_no_http_client(command: str) -> None:
    assert not loaded(command) & {"torch", "numpy", "httpx", "httpx2", "requests", "rich.console", *TOWERS, *COUNTERS}


def test_what_the_machine_offers_and_what_models_cost_needs_neither_compiler_nor_towers() -> None:
    assert not loaded("kernels list", "doctor", "profile --count-only --quiet") & {*COMPILER, *TOWERS, *COUNTERS}
