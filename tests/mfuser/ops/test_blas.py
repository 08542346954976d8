"""cuBLAS by address: which library, which precision, and what its refusal looks like."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from importlib import import_module

import pytest
import torch

from mfuser.fusion import MVFuser
from mfuser.ops import blas, compiled, explain

FP32, TF32 = 68, 77  # CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F_FAST_TF32
has_cuda = pytest.mark.skipif(torch.version.cuda is None, reason="this torch build has no CUDA")


@pytest.fixture
def matmul() -> Iterator[object]:
    """torch's settings for products on a GPU, put back after the test."""
    matmul = torch.backends.cuda.matmul
    names = ["allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"]
    names.append("fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32")
    before = {name: getattr(matmul, name) for name in names}
    yield matmul
    for name, value in before.items():
        setattr(matmul, name, value)


@pytest.fixture
def fresh() -> Iterator[None]:
    """Forget what was found, before and after."""
    for function in (blas.cublas, blas.gemm):
        function.cache_clear()
    yield
    for function in (blas.cublas, blas.gemm):
        function.cache_clear()


@pytest.mark.parametrize("name", ["allow_tf32", "fp32_precision"])
def test_tf32_is_used_where_the_user_allows_it_for_fp32(matmul, name):
    if not hasattr(matmul, name):
        pytest.skip("an older torch")
    on, off = ("tf32", "ieee") if name == "fp32_precision" else (True, False)
    for value, expected in ((on, TF32), (off, FP32)):
        setattr(matmul, name, value)
        assert blas.compute_type(torch.float32) == expected
        assert blas.compute_type(torch.bfloat16) == blas.compute_type(torch.float16) == FP32


def test_partial_sums_are_rounded_where_the_user_allows_it(matmul):
    for allowed in (True, False):
        matmul.allow_bf16_reduced_precision_reduction = allowed
        matmul.allow_fp16_reduced_precision_reduction = not allowed
        assert blas.sums_in_fp32(torch.bfloat16) is not allowed
        assert blas.sums_in_fp32(torch.float16) is allowed
        assert not blas.sums_in_fp32(torch.float32)


@has_cuda
@pytest.mark.usefixtures("fresh")
def test_cublas_is_the_one_that_torch_has_loaded(monkeypatch):
    assert blas.gemm() == ctypes.cast(blas.cublas().cublasGemmEx, ctypes.c_void_p).value
    # under another name than torch's version suggests, it is found among what is mapped
    found = blas.gemm()
    monkeypatch.setattr(torch.version, "cuda", "1.0")
    blas.cublas.cache_clear()
    blas.gemm.cache_clear()
    assert blas.gemm() == found


@pytest.mark.usefixtures("fresh")
def test_without_cublas_the_block_says_so(monkeypatch, emulated):
    monkeypatch.setattr(torch.version, "cuda", "1.0")
    monkeypatch.setattr(blas, "_mapped", list)
    with pytest.raises(ImportError, match=r"torch has not loaded libcublas\.so\.1, whose matrix products"):
        blas.gemm()
    fuser = MVFuser(24, state=4)
    with compiled.use(emulated) as library:
        assert explain("mvfuser", fuser.in_proj.weight, fuser.A_log)["cuda"] is None, "the emulation has its own"
        monkeypatch.setattr(library, "device", "cuda")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert explain("mvfuser")["cuda"].startswith("torch has not loaded libcublas.so.1")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ImportError, match="this torch build has no CUDA"):
        blas.gemm()


def test_a_failing_product_raises_with_its_status(emulated, monkeypatch):
    backend = import_module("mfuser.ops.mvfuser.cuda_backend")
    products = backend._products
    fuser, joint = MVFuser(24, state=4, backend="cuda"), torch.randn(1, 5, 24)
    with compiled.use(emulated):
        assert fuser.mix(joint).shape == (1, 5, 24)
        monkeypatch.setattr(backend, "_products", lambda *a: (products(*a)[0], 0, FP32))
        with pytest.raises(RuntimeError, match="mfuser_mvfuser_block_fwd: cuBLAS status 1: not initialized"):
            fuser.mix(joint)
        monkeypatch.setattr(backend, "_products", lambda *a: (*products(*a)[:2], 64))
        with pytest.raises(RuntimeError, match="cuBLAS status 15: not supported"):
            fuser.mix(joint)
        monkeypatch.setattr(backend, "_products", lambda *a: (0, 1, FP32))
        with pytest.raises(RuntimeError, match="CUDA error 1: invalid argument"):
            fuser.mix(joint)


@pytest.mark.parametrize("allowed", [True, False])
def test_the_block_computes_in_the_type_of_the_setting(emulated, matmul, monkeypatch, allowed):
    matmul.allow_tf32 = allowed
    backend, seen = import_module("mfuser.ops.mvfuser.cuda_backend"), []
    monkeypatch.setattr(backend, "_OWN", Recorder(backend._OWN, seen))
    fuser = MVFuser(24, state=4, backend="cuda")
    with compiled.use(emulated):
        fuser.mix(torch.randn(1, 5, 24)).sum().backward()
    assert [arguments[-1] for arguments in seen] == [TF32 if allowed else FP32] * 2


class Recorder:
    """What the launchers' own fields are packed by; notes what comes through."""

    def __init__(self, own, seen) -> None:
        self.own, self.seen = own, seen

    def pack_into(self, params, offset, *arguments) -> None:
        self.seen.append(arguments)
        self.own.pack_into(params, offset, *arguments)


@pytest.mark.gpu
def test_the_handle_keeps_its_math_mode():
    handle = blas.handle(torch.zeros(1, device="cuda"))

    def mode() -> int:
        found = ctypes.c_int()
        assert blas.cublas().cublasGetMathMode(ctypes.c_void_p(handle), ctypes.byref(found)) == 0
        return found.value

    before = mode()
    with blas.adding_in_fp32(handle):
        assert mode() == before | 16
    assert mode() == before
