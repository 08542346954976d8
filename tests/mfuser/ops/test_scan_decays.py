"""Decays near 1 in fp32, where a GPU's unit of exponentials is off in the same direction over many steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mfuser.ops import compiled
from mfuser.ops.selective_scan import cuda_backend, reference

from .emulation import ROOT, compile_on_cpu


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # off by 1.2e-7, always upwards
    unit = "-DMFUSER_CPU_EXP2(x)=(exp2f(x)*1.00000012f)"
    return compile_on_cpu([ROOT / "cuda" / "selective_scan_fp32.cu"], tmp_path_factory.mktemp("decays"), unit)


@pytest.fixture
def kernels(library: Path) -> Iterator[None]:
    with compiled.use(library):
        yield


def lasting(batch: int, length: int, dim: int, state: int) -> dict[str, Any]:
    """The arguments of a backend's forward; a state lasts for hundreds of steps.

    Decays differ from step to step: a rounding that is the same in all of them would add up for any kernel.
    """
    u, delta, B, C = (torch.randn(batch, length, width) for width in (dim, dim, state, state))
    A, D, bias = -torch.randn(dim, state).exp(), torch.randn(dim), torch.randn(dim) - 3
    rest = {"D": D, "z": None, "bias": bias, "initial": None, "softplus": True}
    return {"u": u, "delta": delta - 3, "A": A, "B": B, "C": C, **rest}


def error(found: Tensor | None, expected: Tensor | None) -> float:
    """Norm of the difference, relative to that of what is expected."""
    assert found is not None
    assert expected is not None
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.usefixtures("kernels")
def test_an_error_of_the_exponential_does_not_add_up() -> None:
    given = lasting(1, 2000, 8, 8)
    wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in given.items()}
    expected, last, wide_saved = reference.forward(**wide)
    y, state, saved = cuda_backend.forward(**given)
    assert error(y, expected) < 1e-6
    assert error(state, last) < 1e-6
    dy = torch.randn_like(y)
    dA = cuda_backend.backward(dy, None, **given, saved=saved)[2]
    assert error(dA, reference.backward(dy.double(), None, **wide, saved=wide_saved)[2]) < 2e-6
