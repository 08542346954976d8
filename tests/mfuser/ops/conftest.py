from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from .emulation import ROOT, compile_on_cpu


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels of `cuda/` compiled to run on the CPU, for `mfuser.ops.compiled.use`."""
    sources = sorted((ROOT / "cuda").glob("*.cu"))
    if not sources:
        pytest.skip("cuda/ has no kernels")
    # processes that share the tests' work share the library, which takes half a minute to compile
    shared = tmp_path_factory.getbasetemp()
    shared = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "emulated"
    with FileLock(f"{shared}.lock"):
        done = shared / "path"
        if not done.exists():
            shared.mkdir(exist_ok=True)
            done.write_text(str(compile_on_cpu(sources, shared)))
    return Path(done.read_text())
