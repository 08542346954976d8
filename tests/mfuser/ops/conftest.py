from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

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
    return compile_on_cpu(sources, tmp_path_factory.mktemp("emulated"))
