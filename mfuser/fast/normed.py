"""A layer norm, with a sum before it if there is one, as one kernel, which reads and writes each row once.

What the compiler makes of a norm reads rows of 1024 channels twice.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

_WIDTHS = range(256, 8193)  # channels of a row that fill a warp and that a block's registers hold
_HALVES = (torch.bfloat16, torch.float16)
_TRITON = find_spec("triton") is not None  # asked for here, as the compiler cannot trace the question


def fuses(x: Tensor, weight: Tensor | None, dtype: torch.dtype) -> bool:
    """Return whether a norm can be one kernel: to 16 bits, on a GPU with Triton, with a weight and without gradients."""
    return (
        _TRITON
        and x.is_cuda
        and weight is not None
        and dtype in _HALVES
        and x.dtype in (torch.float32, *_HALVES)
        and x.shape[-1] in _WIDTHS
        and not (torch.is_grad_enabled() and x.requires_grad)
    )


@torch.library.custom_op("mfuser::layer_norm", mutates_args=())
def layer_norm(x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """Return the norm of x + added over the last dimension, (..., C) -> (..., C), in a type, without a backward pass.

    Sums are fp32.

    Args:
        added: (..., C) of another type, or none.    weight, bias: (C,) in fp32.

    Raises: ValueError for an `added` of another shape.
    """
    if added is not None and added.shape != x.shape:
        raise ValueError(f"layer_norm: x is {tuple(x.shape)}, but what is added to it {tuple(added.shape)}")
    rows, more = (None if each is None else each.reshape(-1, x.shape[-1]) for each in (x, added))
    assert rows is not None
    out = torch.empty(rows.shape, dtype=dtype, device=x.device)
    if out.numel():
        from mfuser.fast.normed_triton_backend import launch  # where it is: see `fuses`

        launch(rows, more, weight, bias, out, eps)
    return out.view(x.shape)


@layer_norm.register_fake
def _(x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)
