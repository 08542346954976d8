"""Bilinear resizing whose gradient, on a GPU, is two matrix products: torch's adds to a pixel from many threads at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mfuser.by_size import by_size


def bilinear(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps (B, C, H, W) to a size, as `F.interpolate` does with `align_corners=False`: the same values.

    On a GPU the gradient is the same but for the order of sums, which torch's leaves to chance.
    """
    found: Tensor = _Bilinear.apply(x, tuple(size)) if x.is_cuda and x.requires_grad else _resized(x, tuple(size))
    return found


def _resized(x: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


@by_size
def shares(length: int, of: int, *, device: torch.device | None = None) -> Tensor:
    """Return what each of a line's `length` values takes from each of `of`, (length, of) in fp32."""
    return F.interpolate(torch.eye(of, device=device)[None], length, mode="linear", align_corners=False)[0].T.contiguous()


class _Bilinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: tuple[int, ...]) -> Tensor:
        ctx.of = x.shape[2:]
        return _resized(x, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        return gradient(dout, ctx.of), None


def gradient(dout: Tensor, of: Sequence[int]) -> Tensor:
    """Return the gradient of maps (B, C, *of) from that of what they were resized to, (B, C, h, w)."""
    sizes = zip(dout.shape[2:], of, strict=True)
    down, right = (shares(length, size, device=dout.device).to(dout.dtype) for length, size in sizes)
    with torch.autocast(dout.device.type, enabled=False):  # a backward pass may be under it, too, and has sums in fp32
        return down.T @ dout @ right
