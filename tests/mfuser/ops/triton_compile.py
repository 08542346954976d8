"""Compile what a Triton backend launches, for an sm_90 that need not be there, and print what each kernel takes of it.

The interpreter minds neither types that change within a loop nor layouts that do not fit; the compiler does. To be run
in a process without TRITON_INTERPRET, which decides at import: python triton_compile.py ms_deform_attn float32
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver


class AbsentGPU(CudaDriver):
    def __init__(self) -> None:
        pass

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


def compile_only(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    done = kernel.warmup(*arguments, grid=grid, **options)
    print(f"{kernel.__name__}: {usage(done.asm['cubin'])}, {done.metadata.shared} bytes of shared memory")


def usage(binary: bytes) -> str:
    """Registers and stack, by the disassembler in Triton's wheel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        told = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", told.stdout + told.stderr)
    return f"{found[1]} registers, {found[2]} bytes of stack" if found else "unknown"


def ms_deform_attn(module: ModuleType, dtype: torch.dtype) -> None:
    # a model's size, and one whose every number is a special one to the compiler
    for batch, heads, dim, points, maps in ((2, 8, 32, 4, [(18, 18), (36, 36), (72, 72)]), (1, 1, 1, 1, [(1, 1), (1, 3)])):
        cells = sum(height * width for height, width in maps)
        value = torch.zeros(batch, cells, heads, dim, dtype=dtype)
        locations = torch.zeros(batch, cells, heads, len(maps), points, 2)
        weights = torch.zeros(batch, cells, heads, len(maps), points, dtype=dtype)
        shapes = [side for shape in maps for side in shape]
        out = module.forward(value, shapes, locations, weights)
        module.backward(out, value, shapes, locations, weights)


def selective_scan(module: ModuleType, dtype: torch.dtype) -> None:
    # everything; odd sizes; sizes that are special to the compiler; many states; more than 2^31 numbers
    cases = (
        (2, 2594, 512, 16, True),
        (3, 1001, 33, 5, True),
        (1, 1, 1, 1, False),
        (2, 99, 24, 64, False),
        (1, 2**19, 2**13, 16, False),
    )
    with torch.device("meta"):
        for batch, length, dim, state, optional in cases:
            tokens, states = (torch.empty(batch, length, n, dtype=dtype) for n in (dim, state))
            gate, channels, initial = tokens, torch.empty(dim), torch.empty(batch, dim, state)
            if not optional:
                gate = channels = initial = None
            given = (tokens, tokens, torch.empty(dim, state), states, states, channels, gate, channels, initial, optional)
            module.forward(*given, keep=False)
            saved = module.forward(*given)[2]
            module.backward(tokens, initial, *given, saved)


def gated(module: ModuleType, dtype: torch.dtype) -> None:
    # EVA02-L's and EVA02-B's MLPs, and the widest rows
    for rows, channels, width, biased in ((10376, 2752, 2730, True), (1297, 2048, 2048, True), (3, 16384, 16384, False)):
        x, out = (torch.empty(rows, n, dtype=dtype, device="meta") for n in (2 * channels, channels))
        weight = torch.empty(channels, device="meta")
        module.launch(x, weight, weight if biased else None, out, width, 1e-6)


def normed(module: ModuleType, dtype: torch.dtype) -> None:
    # a norm of a block's tokens, of its attention, and the widest rows
    for rows, channels, given in ((10376, 1024, torch.float32), (1297, 768, dtype), (3, 8192, torch.float32)):
        x, out = (torch.empty(rows, channels, dtype=each, device="meta") for each in (given, dtype))
        weight = torch.empty(channels, device="meta")
        module.launch(x, out if given is not dtype else None, weight, weight, out, 1e-6)


def attention(module: ModuleType, dtype: torch.dtype) -> None:
    # ViT-L's block, queries and keys turned; the pixel decoder's texts; wide heads; one token; more than 2^31 numbers
    cases = ((8, 16, 1297, 1297, 64), (8, 8, 6804, 19, 32), (2, 4, 4096, 200, 128), (1, 1, 1, 1, 16), (2, 16, 2**21, 2**21, 64))
    for batch, heads, length, keys, width in cases:
        packed = torch.empty(batch, keys, 3, heads, width, dtype=dtype, device="meta")
        q, out = (torch.empty(batch, length, heads, width, dtype=dtype, device="meta").transpose(1, 2) for _ in range(2))
        k, v = packed.permute(2, 0, 3, 1, 4)[1:]
        module.launch(q, k, v, out)


def attention_tma(module: ModuleType, dtype: torch.dtype) -> None:
    for batch, heads, length, width in ((8, 16, 1297, 64), (2, 4, 200, 128)):
        packed = torch.empty(batch, length, 3, heads, width, dtype=dtype, device="meta")
        out = torch.empty(batch, length, heads, width, dtype=dtype, device="meta").transpose(1, 2)
        module.launch(*packed.permute(2, 0, 3, 1, 4), out)


if __name__ == "__main__":
    triton.runtime.driver.set_active(AbsentGPU())
    triton.JITFunction.__getitem__ = lambda kernel, grid: partial(compile_only, kernel, grid)
    fast = sys.argv[1] in ("gated", "normed", "attention", "attention_tma")
    name = f"mfuser.fast.{sys.argv[1]}_triton_backend" if fast else f"mfuser.ops.{sys.argv[1]}.triton_backend"
    globals()[sys.argv[1]](import_module(name), getattr(torch, sys.argv[2]))
