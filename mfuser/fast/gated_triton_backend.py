"""The Triton kernel of `gated`: a program for each row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHANNELS = 1024  # of a row for each warp: of EVA02-L's 2752, four are faster than 2, 8 and 16 (H200)


def launch(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, width: int, eps: float) -> None:
    """Write the norm of silu(gate) * hidden, x (M, 2 C) -> out (M, C), as `gated.gated_norm` says."""
    channels = out.shape[1]
    block = triton.next_power_of_2(channels)
    given = (x, weight, weight if bias is None else bias, out, width, eps)
    with torch.cuda.device_of(x):
        _gated_norm[(len(x),)](
            *given, CHANNELS=channels, BIASED=bias is not None, BLOCK=block, num_warps=max(1, min(16, block // _CHANNELS))
        )


@triton.jit
def _gated_norm(
    x,
    weight,
    bias,
    out,
    width,
    eps,
    CHANNELS: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    there = channel < CHANNELS
    gate = tl.load(x + row * 2 * CHANNELS + channel, mask=there, other=0.0).to(tl.float32)
    hidden = tl.load(x + row * 2 * CHANNELS + CHANNELS + channel, mask=there, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * hidden
    mean = tl.sum(y, 0) / width
    y = tl.where(channel < width, y - mean, 0.0)  # of two steps: the variance of what is far from 0 is exact
    y = y * tl.rsqrt(tl.sum(y * y, 0) / width + eps)
    y = y * tl.load(weight + channel, mask=there, other=0.0)
    if BIASED:
        y += tl.load(bias + channel, mask=there, other=0.0)
    tl.store(out + row * CHANNELS + channel, y.to(out.dtype.element_ty), mask=there)
