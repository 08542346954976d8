"""Compiling CUDA sources with g++ to run on the CPU (tests/cuda_on_cpu/cuda_on_cpu.h)."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[3]
HEADERS = ROOT / "tests" / "cuda_on_cpu"

# a GPU refuses misaligned vector loads and stores, which a CPU does not notice by itself
_CHECKS = ("-fsanitize=alignment,bounds", "-fno-sanitize-recover=all")
# -O0: to compile takes longer than all that is run
_FLAGS = ("-std=c++20", "-O0", "-march=native", "-fPIC", "-fvisibility=hidden", "-DMFUSER_ON_CPU", *_CHECKS)


def compile_on_cpu(sources: Sequence[Path], folder: Path, *flags: str) -> Path:
    """Compile `sources` into one library in `folder` and return its path; skips the test where that cannot be."""
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and g++ to run CUDA sources on the CPU")
    includes = (f"-I{ROOT / 'cuda'}", f"-I{HEADERS}")
    objects = [folder / f"{path.stem}.o" for path in sources]

    def compile_one(source: Path, target: Path) -> None:
        _run([compiler, *_FLAGS, *flags, *includes, "-x", "c++", "-c", str(source), "-o", str(target)])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, objects))
    library = folder / "on_cpu.so"
    _run([compiler, *_CHECKS, "-shared", *map(str, objects), "-o", str(library)])
    return library


def fenced(tensor: Tensor, *, before: bool = False) -> Tensor:
    """Return a contiguous copy of `tensor` that ends (or begins) at a page which kills the process when touched."""
    size, page = tensor.numel() * tensor.element_size(), mmap.PAGESIZE
    room = -(-size // page) * page
    memory = mmap.mmap(-1, room + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    fence = ctypes.c_void_p(address if before else address + room)
    assert libc.mprotect(fence, ctypes.c_size_t(page), 0) == 0, os.strerror(ctypes.get_errno())
    offset = page if before else room - size
    return torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape).copy_(tensor)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
