"""Forms of the scan's CUDA kernels that are not yet in the library: the forward in one pass, and decays near 1 in fp32.

The emulated unit of exponentials is off by 1.2e-7, always upwards, as a GPU's is in places.
"""

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

pytestmark = pytest.mark.full  # 12 s of compiling for what no user runs yet

FORMS = [1, 2, 3, 4, 5]
# batch, length, dim, state: ends within a turn, at its end, after several; channels beyond a block; states that are padded
SHAPES = [(1, 1, 4, 4), (2, 256, 12, 16), (1, 300, 13, 5), (1, 1100, 8, 12)]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = [ROOT / "cuda" / f"selective_scan_{dtype}.cu" for dtype in ("bf16", "fp32")]
    flags = ("-DMFUSER_SCAN_FORMS", "-DMFUSER_EXACT_DECAYS", "-DMFUSER_CPU_EXP2(x)=(exp2f(x)*1.00000012f)")
    return compile_on_cpu(sources, tmp_path_factory.mktemp("forms"), *flags)


@pytest.fixture
def kernels(library: Path) -> Iterator[None]:
    with compiled.use(library):
        yield


def inputs(batch: int, length: int, dim: int, state: int, dtype: torch.dtype, *, gated: bool) -> dict[str, Any]:
    """The arguments of a backend's forward; a gate and a first state where it is gated."""
    tokens = [torch.randn(batch, length, width).to(dtype) for width in (dim, dim, state, state, dim)]
    u, delta, B, C, z = tokens
    A, D, bias, initial = -torch.randn(dim, state).exp(), torch.randn(dim), torch.randn(dim) - 3, torch.randn(batch, dim, state)
    rest = {"D": D, "z": z if gated else None, "bias": bias, "initial": initial if gated else None, "softplus": True}
    return {"u": u, "delta": delta, "A": A, "B": B, "C": C, **rest}


def widened(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() if isinstance(value, Tensor) else value for name, value in given.items()}


def error(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None
    assert expected is not None
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("form", FORMS)
def test_one_pass_gives_the_same(
    form: int, shape: tuple[int, int, int, int], dtype: torch.dtype, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs(*shape, dtype, gated=gated)
    expected, last, _ = reference.forward(**widened(given))
    kept = cuda_backend.forward(**given)[2][..., : shape[2], : shape[3]]
    monkeypatch.setattr(cuda_backend, "_FORM", form)
    y, state, saved = cuda_backend.forward(**given, keep=gated)
    assert error(y, expected) < (2e-6 if dtype == torch.float32 else 4e-3)
    assert error(state, last) < (2e-6 if dtype == torch.float32 else 5e-5)
    if gated:
        torch.testing.assert_close(saved[..., : shape[2], : shape[3]], kept, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("form", [0, 1])
def test_an_error_of_the_exponential_does_not_add_up(form: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(1, 2000, 8, 8, torch.float32, gated=False)
    # a state lasts for hundreds of steps, whose decays differ: rounding that is the same in all of them adds up for any kernel
    given["delta"] = given["delta"] - 3
    wide = widened(given)
    expected, last, wide_saved = reference.forward(**wide)
    monkeypatch.setattr(cuda_backend, "_FORM", form)
    y, state, saved = cuda_backend.forward(**given)
    assert error(y, expected) < 1e-6
    assert error(state, last) < 1e-6
    dy = torch.randn_like(y)
    dA = cuda_backend.backward(dy, None, **given, saved=saved)[2]
    assert error(dA, reference.backward(dy.double(), None, **wide, saved=wide_saved)[2]) < 2e-6
