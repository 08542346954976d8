"""The Triton kernel of `normed`: a program for each row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# bytes of a row for each warp: of 1024 numbers, one warp is the fastest where they have 16 bits, four where they have 32 (H200)
_BYTES = {2: 2048, 4: 1024}


def launch(x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor | None, out: Tensor, eps: float) -> None:
    """Write the norm of each row of x + added, (M, C) -> out (M, C), as `normed.layer_norm` says; rows may lie apart."""
    channels = out.shape[1]
    x, more = (each if each.stride(1) == 1 else each.contiguous() for each in (x, x if added is None else added))
    block = triton.next_power_of_2(channels)
    given = (x, x.stride(0), more, more.stride(0), weight, weight if bias is None else bias, out, eps)
    kinds = {"CHANNELS": channels, "ADDED": added is not None, "BIASED": bias is not None, "BLOCK": block}
    with torch.cuda.device_of(x):
        _layer_norm[(len(x),)](*given, **kinds, num_warps=max(1, block * x.element_size() // _BYTES[x.element_size()]))


@triton.jit
def _layer_norm(
    x,
    x_row,
    added,
    added_row,
    weight,
    bias,
    out,
    eps,
    CHANNELS: tl.constexpr,
    ADDED: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    there = channel < CHANNELS
    y = tl.load(x + row * x_row + channel, mask=there, other=0.0).to(tl.float32)
    if ADDED:
        y += tl.load(added + row * added_row + channel, mask=there, other=0.0).to(tl.float32)
    y = tl.where(there, y - tl.sum(y, 0) / CHANNELS, 0.0)  # of two steps: the variance of what is far from 0 is exact
    y = y * tl.rsqrt(tl.sum(y * y, 0) / CHANNELS + eps)
    y = y * tl.load(weight + channel, mask=there, other=0.0)
    if BIASED:
        y += tl.load(bias + channel, mask=there, other=0.0)
    tl.store(out + row * CHANNELS + channel, y.to(out.dtype.element_ty), mask=there)
