"""Matrix products inside our own launchers: addresses of cuBLAS's function and of torch's handle.

The kernels' library is built without cuBLAS. torch has loaded it already; its handle includes the current
stream and the workspace of torch's own products.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from mfuser.ops import compiled

# of cublas_api.h
_COMPUTE_32F, _COMPUTE_32F_FAST_TF32 = 68, 77
_DISALLOW_REDUCED_PRECISION_REDUCTION = 16

_current_handle: Callable[[], int] = getattr(torch._C, "_cuda_getCurrentBlasHandle", torch.cuda.current_blas_handle)


@functools.cache
def cublas() -> ctypes.CDLL:
    """Return the cuBLAS that torch has loaded.

    Raises: ImportError with the reason when it is not.
    """
    if torch.version.cuda is None:
        raise ImportError("this torch build has no CUDA")
    name = f"libcublas.so.{torch.version.cuda.partition('.')[0]}"
    # one that is not loaded yet would not be torch's
    loaded_only = getattr(os, "RTLD_NOLOAD", 0) | getattr(os, "RTLD_NOW", 0)
    for path in (name, *_mapped()):
        try:
            found = ctypes.CDLL(path, mode=loaded_only)
            for function in (found.cublasGemmEx, found.cublasGetMathMode, found.cublasSetMathMode):
                function.restype = ctypes.c_int
        except (OSError, AttributeError):
            continue
        return found
    raise ImportError(f"torch has not loaded {name}, whose matrix products the block's kernels call")


def _mapped() -> list[str]:
    """Return the paths of libraries in this process that are named like cuBLAS."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    return sorted(set(re.findall(r"/.*/libcublas[-.\w]*\.so[.\w]*$", maps, re.MULTILINE)))


@functools.cache
def gemm() -> int:
    """Return the address of cublasGemmEx.

    Raises: ImportError as `cublas` does.
    """
    return ctypes.cast(cublas().cublasGemmEx, ctypes.c_void_p).value or 0


def handle(like: Tensor) -> int:
    """Return torch's handle for the device and the current stream of `like`, with torch's workspace."""
    index = like.get_device()
    if index == compiled.current_device():
        return _current_handle()
    with torch.cuda.device(index):
        return _current_handle()


def compute_type(dtype: torch.dtype) -> int:
    """Return the cublasComputeType_t of products of `dtype`: fp32, or TF32 where the user allows it for fp32."""
    if dtype is not torch.float32:
        return _COMPUTE_32F
    matmul = torch.backends.cuda.matmul
    # the older name raises where the newer has been set
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return _COMPUTE_32F_FAST_TF32 if allowed else _COMPUTE_32F


def sums_in_fp32(dtype: torch.dtype) -> bool:
    """Return whether PyTorch's settings forbid adding partial sums of products in bf16 or fp16."""
    matmul = torch.backends.cuda.matmul
    if dtype is torch.bfloat16:
        return not matmul.allow_bf16_reduced_precision_reduction
    return dtype is torch.float16 and not matmul.allow_fp16_reduced_precision_reduction


@contextmanager
def adding_in_fp32(handle: int) -> Iterator[None]:
    """Forbid sums in bf16 and fp16 for `handle` within the context."""
    before, library = ctypes.c_int(), cublas()
    library.cublasGetMathMode(ctypes.c_void_p(handle), ctypes.byref(before))
    library.cublasSetMathMode(ctypes.c_void_p(handle), before.value | _DISALLOW_REDUCED_PRECISION_REDUCTION)
    try:
        yield
    finally:
        library.cublasSetMathMode(ctypes.c_void_p(handle), before.value)
