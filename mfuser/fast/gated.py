"""SwiGLU's gate with the layer norm behind it in one kernel, which reads and writes each row once.

What the compiler makes of them reads a row three times: for its mean and variance, and to normalise it. A row of EVA02-L fits in
the registers of a block.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor, nn

_WIDEST = 16384  # channels of a row that a block's registers hold


def fuses(act: nn.Module, norm: nn.Module, weight: Tensor) -> bool:
    """Return whether a gate and a norm (of `blocks.Norm`'s kind) can be one kernel: SiLU, on a GPU with Triton, in 16 bits."""
    return (
        type(act) is nn.SiLU
        and isinstance(getattr(norm, "weight", None), Tensor)
        and weight.is_cuda
        and weight.dtype in (torch.bfloat16, torch.float16)
        and len(weight) // 2 <= _WIDEST
        and find_spec("triton") is not None
    )


@torch.library.custom_op("mfuser::gated_norm", mutates_args=())  # the compiler would give its launches other sizes
def gated_norm(x: Tensor, weight: Tensor, bias: Tensor | None, width: int, eps: float) -> Tensor:
    """Return the norm of silu(gate) * hidden, (..., 2 C) -> (..., C), in x's type; sums are fp32.

    Args:
        x: gate and hidden behind each other, each zero from channel `width` on.
        weight, bias: (C,) in fp32, zero from there on, too; then so is the result.    width: channels that the norm is of.
    """
    channels = x.shape[-1] // 2
    rows = x.reshape(-1, 2 * channels)
    out = x.new_empty(len(rows), channels)
    if len(rows):
        from mfuser.fast.gated_triton_backend import launch  # where it is: see `fuses`

        launch(rows, weight, bias, out, width, eps)
    return out.view(*x.shape[:-1], channels)


@gated_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, width: int, eps: float) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
