"""The neck of a plain transformer: maps of one grid to four scales, 4, 2, 1 and 1/2 times the grid.

Functions, not a module: the authors' checkpoints, and ours, have its convolutions at the top as `fpn1` and `fpn2`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F


def upsampling(channels: int) -> tuple[nn.Sequential, nn.ConvTranspose2d]:
    """Build `fpn1`, which enlarges a map (B, C, H, W) four times, and `fpn2`, which does so twice."""
    fpn1 = nn.Sequential(
        nn.ConvTranspose2d(channels, channels, 2, 2),
        nn.BatchNorm2d(channels),
        nn.GELU(),
        nn.ConvTranspose2d(channels, channels, 2, 2),
    )
    return fpn1, nn.ConvTranspose2d(channels, channels, 2, 2)


def halved(x: Tensor) -> Tensor:
    """Return the largest value of every 2x2 cells of a map, (B, C, H, W) -> (B, C, H // 2, W // 2)."""
    return F.max_pool2d(x, 2)


def four_scales(
    maps: Sequence[Tensor], fpn1: nn.Module, fpn2: nn.Module, halve: Callable[[Tensor], Tensor] = halved
) -> list[Tensor]:
    """Four maps (B, C, H, W) of one grid to four of 4, 2, 1 and 1/2 times the grid, as the pixel decoder takes them."""
    first, second, third, fourth = maps
    return [fpn1(first), fpn2(second), third, halve(fourth)]


def rows_of(weight: Tensor) -> Tensor:
    """Return a transposed convolution's weight of kernel and stride 2, (C, D, 2, 2), as a product's, (4 D, C), place by place."""
    return weight.permute(2, 3, 1, 0).flatten(0, 2)


def cells(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the four cells of each, by row and column, (..., C) -> (..., 2, 2, D).

    Args:
        weight: (4 D, C), as `rows_of` has it.    bias: (4 D,).
    """
    return F.linear(x, weight, bias).unflatten(-1, (2, 2, len(bias) // 4))


def cells_of_cells(x: Tensor) -> Tensor:
    """Put the cells of cells, (B, H, W, 2, 2, 2, 2, D), where they belong: (B, D, 4 H, 4 W), in memory channels last."""
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4, 6).flatten(1, 3).permute(0, 3, 1, 2)


def bilinear_scales(maps: Sequence[Tensor]) -> list[Tensor]:
    """Resize four maps (B, C, H, W) of one grid to 4, 2, 1 and 1/2 times the grid; Rein's neck, which has no parameters."""
    factors = (4.0, 2.0, 1.0, 0.5)
    return [
        F.interpolate(m, scale_factor=factor, mode="bilinear", align_corners=False) if factor != 1 else m
        for m, factor in zip(maps, factors, strict=True)
    ]


def four_taps(depth: int) -> tuple[int, int, int, int]:
    """Return the blocks whose maps the neck takes: 7, 11, 15 and 23 of 24 (counted from 0), the same shares of other depths."""
    first, second, third, fourth = (math.ceil(depth * share) - 1 for share in (1 / 3, 1 / 2, 2 / 3, 1))
    return first, second, third, fourth
