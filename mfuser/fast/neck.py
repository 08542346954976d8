"""The neck's transposed convolutions as matrix products, and what follows them linearly as part of their weights.

A transposed convolution of kernel 2 and stride 2 makes four cells of each, every one a product of its own: one product with four
times the rows, and a shuffle. The pixel decoder begins with a 1x1 convolution of each map. Behind a transposed convolution both
are one product: of the full model, 12288 channels for each cell of the grid become 768.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mfuser.decoder.neck import cells, cells_of_cells, rows_of
from mfuser.fast.activated import activated, joins
from mfuser.folded_neck import foldable


class Enlarge(nn.Module):
    """A transposed convolution of kernel 2 and stride 2, (B, C, H, W) -> (B, D, 2 H, 2 W).

    Args:
        weight: (C, D, 2, 2) and bias (D,), as nn.ConvTranspose2d has them, in a precise type.    dtype: of the product.
    """

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", rows_of(weight).to(dtype).contiguous(), persistent=False)
        self.register_buffer("bias", bias.repeat(4).to(dtype), persistent=False)

    weight: Tensor
    bias: Tensor

    def cells(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., 2, 2, D): the four cells of each, by row and column."""
        with torch.autocast(x.device.type, enabled=False):
            return cells(x.to(self.weight.dtype), self.weight, self.bias)

    def activated(self, x: Tensor, act: nn.Module) -> Tensor:
        """Return act(cells(x)) as one product, see `activated.joins`."""
        return activated(x.to(self.weight.dtype), self.weight, self.bias, act).unflatten(-1, (2, 2, len(self.bias) // 4))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, 2 H, 2 W), in memory channels last."""
        found = self.cells(x.permute(0, 2, 3, 1))  # (B, H, W, 2, 2, D)
        return found.transpose(2, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


class EnlargeTwice(nn.Module):
    """Two of them around an activation, (B, C, H, W) -> (B, E, 4 H, 4 W); only the result is put in its order."""

    def __init__(self, first: Enlarge, act: nn.Module, second: Enlarge) -> None:
        super().__init__()
        self.first, self.act, self.second = first, act, second
        self.joined = joins(act, first.bias, first.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, E, 4 H, 4 W), in memory channels last."""
        x = x.permute(0, 2, 3, 1)
        inner = self.first.activated(x, self.act) if self.joined else self.act(self.first.cells(x))
        return cells_of_cells(self.second.cells(inner))


def take(model: nn.Module, dtype: torch.dtype) -> bool:
    """Replace the neck of a model, in place; False for a model that has none of `foldable`."""
    found = foldable(model)
    if found is None:
        return False
    pixel: Any
    fpn1, fpn2, pixel = found
    first, norm, act, second = (part for part in fpn1)
    finest, next_ = pixel.lateral_conv, pixel.input_convs[-1]
    assert isinstance(first, nn.ConvTranspose2d)
    assert isinstance(second, nn.ConvTranspose2d)
    assert first.bias is not None
    scale, shift = _affine(norm)
    weight, bias = first.weight.detach().double(), first.bias.detach().double()
    inner = Enlarge(weight * scale[:, None, None], bias * scale + shift, dtype)
    model.fpn1 = EnlargeTwice(inner, act, Enlarge(*_followed(second, finest.conv), dtype))
    model.fpn2 = Enlarge(*_followed(fpn2, next_.conv), dtype)
    finest.conv = nn.Identity()
    next_.conv = nn.Identity()
    return True


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Return scale and shift of a batch norm in evaluation mode."""
    scale = norm.weight.detach().double() * torch.rsqrt(norm.running_var.double() + norm.eps)
    return scale, norm.bias.detach().double() - norm.running_mean.double() * scale


def _followed(enlarge: nn.ConvTranspose2d, conv: Any) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a transposed convolution with a 1x1 convolution behind it."""
    matrix = conv.weight.detach().double().flatten(1)  # (E, D)
    weight = torch.einsum("cdyx,ed->ceyx", enlarge.weight.detach().double(), matrix)
    assert enlarge.bias is not None
    bias = matrix @ enlarge.bias.detach().double()
    return weight, bias if conv.bias is None else bias + conv.bias.detach().double()
