"""Compiles the Triton kernels that a call launches, without a GPU: `python triton_compiling.py sm_90` for the scan's.

The interpreter does not see what the compiler refuses, such as a loop variable that changes its type. Triton decides on
import whether it interprets, so that this is a program of its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from unittest.mock import patch

import torch

os.environ.pop("TRITON_INTERPRET", None)
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def launches(call: Callable[[], object]) -> Iterator[tuple[triton.JITFunction, tuple, dict]]:
    """The kernels that `call` would launch, each with its arguments and its options."""
    found = []

    def note(kernel, *args, grid, warmup, **kwargs) -> None:
        named = dict(zip(kernel.arg_names, args, strict=False))
        named |= {name: kwargs.pop(name) for name in kernel.arg_names if name in kwargs}
        found.append((kernel, named, kwargs))

    with patch.object(triton.JITFunction, "run", note), torch.device("meta"):
        call()
    yield from found


def compiled(kernel: triton.JITFunction, given: dict, options: dict, architecture: int):
    """`kernel` specialised to arguments as a launch would: 1 and None are constants, multiples of 16 are known as such."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        general = parameter.do_not_specialize
        if isinstance(value, torch.Tensor):
            signature[parameter.name], attributes[(i,)] = _TYPES[value.dtype], [["tt.divisibility", 16]]
        elif parameter.is_constexpr or value is None or (value == 1 and not general):
            signature[parameter.name], constants[(i,)] = "constexpr", value
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not general:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def scans() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls of the scan that differ in what is compiled."""
    from mfuser.ops.selective_scan import triton_backend

    def calls(
        batch: int, length: int, dim: int, state: int, dtype: torch.dtype, *, optional: bool, backward: bool = True
    ) -> Callable[[], object]:
        def call() -> None:
            tokens, states = (torch.empty(batch, length, n, dtype=dtype) for n in (dim, state))
            channels = torch.empty(dim) if optional else None
            initial = torch.empty(batch, dim, state) if optional else None
            given = (
                tokens, tokens, torch.empty(dim, state), states, states, channels, tokens if optional else None, channels,
                initial,
            )  # fmt: skip
            _, _, saved = triton_backend.forward(*given, optional, backward)
            if backward:
                triton_backend.backward(tokens, initial, *given, optional, saved)

        return call

    yield "with everything", calls(2, 2594, 512, 16, torch.bfloat16, optional=True)
    yield "of odd sizes", calls(3, 1001, 33, 5, torch.float32, optional=True)
    yield "of ones", calls(1, 1, 1, 1, torch.float16, optional=False)
    yield "of many states", calls(2, 100, 24, 64, torch.float32, optional=False)
    yield "of more than 2^31 numbers", calls(1, 2**19, 2**13, 16, torch.bfloat16, optional=False)
    yield "without a backward", calls(2, 2594, 512, 16, torch.bfloat16, optional=False, backward=False)


if __name__ == "__main__":
    architecture = int(sys.argv[1].removeprefix("sm_"))
    for name, call in scans():
        for kernel, given, options in launches(call):
            result = compiled(kernel, given, options, architecture)
            print(f"{kernel.__name__} {name}: {result.metadata.shared} bytes of shared memory", flush=True)
