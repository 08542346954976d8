"""Random points that masks are compared on (PointRend, Kirillov et al., CVPR 2020), as (x, y) in 0..1."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# draw(output, kind, shape, like) -> uniform numbers in [0, 1); kind is "match", "over" or "uniform"
Draw = Callable[[int, str, tuple[int, int, int], Tensor], Tensor]


def uniform(output: int, kind: str, shape: tuple[int, int, int], like: Tensor) -> Tensor:
    """Return the default draw: the global generator of the logits' device."""
    return torch.rand(shape, device=like.device, dtype=torch.float32)


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values (P, C, n) of maps (P, C, H, W) at points (P, n, 2); zero outside."""
    grid = (2 * points - 1)[:, :, None]
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[..., 0]
