"""Compiling CUDA sources with g++ to run on the CPU (tests/cuda_on_cpu/cuda_on_cpu.h)."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
HEADERS = ROOT / "tests" / "cuda_on_cpu"

# a GPU refuses misaligned vector loads and stores, which a CPU does not notice by itself
_CHECKS = ("-fsanitize=alignment,bounds", "-fno-sanitize-recover=all")
_FLAGS = ("-std=c++20", "-O2", "-march=native", "-fPIC", "-fvisibility=hidden", "-DMFUSER_ON_CPU", *_CHECKS)


def compile_on_cpu(sources: Sequence[Path], folder: Path, *flags: str) -> Path:
    """Compile `sources` into one library in `folder` and return its path; skips the test where there is no g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to run CUDA sources on the CPU")
    includes = (f"-I{ROOT / 'cuda'}", f"-I{HEADERS}")
    objects = [folder / f"{path.stem}.o" for path in sources]

    def compile_one(source: Path, target: Path) -> None:
        _run([compiler, *_FLAGS, *flags, *includes, "-x", "c++", "-c", str(source), "-o", str(target)])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, objects))
    library = folder / "on_cpu.so"
    _run([compiler, *_CHECKS, "-shared", *map(str, objects), "-o", str(library)])
    return library


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
