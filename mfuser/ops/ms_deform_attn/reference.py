"""Multi-scale deformable attention written as sums over the four neighbours of each point: the reference for other backends.

    out[q, m] = sum_{s, p} weight[q, m, s, p] * value_s[m](x, y),    (x, y) = location * (W_s, H_s) - 1/2
where value_s(x, y) interpolates bilinearly between cell centres and is zero outside the map (Zhu et al. 2021, eq. 3).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def forward(value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    """Return (B, Q, M * D). Shapes as in `ms_deform_attn`; `shapes` is flat, [H_0, W_0, H_1, ...]."""
    batch, queries, heads = locations.shape[:3]
    out = value.new_zeros(batch, queries, heads, value.shape[-1], dtype=_precise(value))
    for scale, cells, share, _, _ in _neighbours(value, shapes, locations):
        out += (cells * (share * weights[:, :, :, scale].to(out.dtype))[..., None]).sum(3)
    return out.flatten(2).to(value.dtype)


def backward(dout: Tensor, value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of (value, locations, weights) in fp32 or fp64."""
    precise = _precise(value)
    dvalue = torch.zeros_like(value, dtype=precise)
    dlocations, dweights = (torch.zeros_like(tensor, dtype=precise) for tensor in (locations, weights))
    dout = dout.view(*locations.shape[:3], 1, -1).to(precise)  # (B, Q, M, 1, D)
    batch = torch.arange(len(value), device=value.device)[:, None, None, None]
    head = torch.arange(value.shape[2], device=value.device)[:, None]
    for scale, cells, share, slopes, index in _neighbours(value, shapes, locations):
        weight = weights[:, :, :, scale].to(precise)
        inner = (cells * dout).sum(-1)  # (B, Q, M, P)
        dweights[:, :, :, scale] += inner * share
        dlocations[:, :, :, scale] += (inner * weight)[..., None] * slopes
        # a cell outside the map has no share; its index points at some cell of the map, which gains nothing
        dvalue.index_put_((batch, index, head), (share * weight)[..., None] * dout, accumulate=True)
    return dvalue, dlocations, dweights


def _precise(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _neighbours(value: Tensor, shapes: list[int], locations: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
    """Yield the four neighbours of each point, per scale and corner.

    They are the scale, the cells' values (B, Q, M, P, D), their bilinear shares (B, Q, M, P), the shares' derivatives by
    location (B, Q, M, P, 2) and the cells' rows in `value` (B, Q, M, P).
    """
    precise = _precise(value)
    batch = torch.arange(len(value), device=value.device)[:, None, None, None]
    head = torch.arange(value.shape[2], device=value.device)[:, None]
    start = 0
    for scale, (height, width) in enumerate(zip(shapes[::2], shapes[1::2], strict=True)):
        x = locations[:, :, :, scale, :, 0].to(precise) * width - 0.5
        y = locations[:, :, :, scale, :, 1].to(precise) * height - 0.5
        # points elsewhere, and locations that are NaN, have no neighbours; differences of infinities would be NaN
        near = (x > -1) & (x < width) & (y > -1) & (y < height)
        x, y = torch.where(near, x, 0.0), torch.where(near, y, 0.0)
        left, top = x.floor(), y.floor()
        for column, sign_x in ((left, -1.0), (left + 1, 1.0)):
            for row, sign_y in ((top, -1.0), (top + 1, 1.0)):
                inside = (near & (column >= 0) & (column < width) & (row >= 0) & (row < height)).to(precise)
                share_x, share_y = 1 - (x - column).abs(), 1 - (y - row).abs()
                slopes = torch.stack([sign_x * width * share_y, sign_y * height * share_x], -1) * inside[..., None]
                cell = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
                index = start + cell.long()
                yield scale, value[batch, index, head].to(precise), share_x * share_y * inside, slopes, index
        start += height * width
