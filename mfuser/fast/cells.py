"""The beginning and the end of a pixel decoder as one layer each, of maps whose cells lie in memory one behind the other.

Tokens are such maps. Where a map of channels meets one, the compiler copies one of them or reads it in small pieces; a 1x1
convolution is a product over cells, and a group norm's sums are those of its channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.decoder.pixel_decoder import PixelDecoder
from mfuser.fast.blocks import Norm


class Point(nn.Module):
    """A 1x1 convolution as a product, (B, H, W, C) -> (B, H, W, D) in its type; of nn.Identity only the type is left."""

    def __init__(self, conv: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        weight, bias = (getattr(conv, name, None) for name in ("weight", "bias"))
        self.register_buffer(
            "weight", None if weight is None else weight.detach().flatten(1).to(dtype, copy=True), persistent=False
        )
        self.register_buffer("bias", None if bias is None else bias.detach().to(dtype, copy=True), persistent=False)

    weight: Tensor | None
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        x = x.to(self.dtype)
        return x if self.weight is None else F.linear(x, self.weight, self.bias)


class Groups(nn.Module):
    """A group norm of cells, (B, H, W, C) -> the same in fp32 (fp64 of fp64)."""

    def __init__(self, norm: nn.GroupNorm, dtype: torch.dtype) -> None:
        super().__init__()
        self.groups, self.eps = norm.num_groups, norm.eps
        wide = torch.promote_types(dtype, torch.float32)
        for name in ("weight", "bias"):
            self.register_buffer(name, getattr(norm, name).detach().to(wide, copy=True), persistent=False)

    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        x = x.to(self.weight.dtype)
        # of every channel first: so a GPU reads whole cells, not the few channels of each that are a group. And from its first
        # value on: sums of squares are exact enough so, and divide nothing by a running count, as `var_mean` does
        first = x[:, :1, :1]
        away = (x - first).flatten(1, 2)
        mean = away.mean(1)
        variance = ((away * away).mean(1) - mean * mean).clamp_min(0)
        variance, mean = (each.unflatten(1, (self.groups, -1)) for each in (variance, mean + first.flatten(1)))
        centre = mean.mean(-1, keepdim=True)
        scale = torch.rsqrt((variance + (mean - centre).square()).mean(-1, keepdim=True) + self.eps)
        scale = scale * self.weight.unflatten(0, (self.groups, -1))
        shift = self.bias.unflatten(0, (self.groups, -1)) - centre * scale
        return x * scale.flatten(1)[:, None, None] + shift.flatten(1)[:, None, None]


class Enter(nn.Module):
    """`PixelDecoder.enter` of a decoder."""

    def __init__(self, decoder: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.convs = nn.ModuleList(Point(each.conv, dtype) for each in decoder.input_convs)
        self.norms = nn.ModuleList(Groups(each.gn, dtype) for each in decoder.input_convs)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Take and return what it does; tokens in fp32, fp64 of fp64."""
        with torch.autocast(features[0].device.type, enabled=False):
            cells = [conv(x.permute(0, 2, 3, 1)) for conv, x in zip(self.convs, features, strict=True)]
            return torch.cat([norm(x).flatten(1, 2) for norm, x in zip(self.norms, cells, strict=True)], 1)


class Leave(nn.Module):
    """`PixelDecoder.leave` of a decoder."""

    def __init__(self, decoder: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        norm = decoder.post_norm
        self.post_norm = Norm(norm, torch.promote_types(dtype, torch.float32)) if isinstance(norm, nn.LayerNorm) else norm
        self.lateral, self.lateral_norm = Point(decoder.lateral_conv.conv, dtype), Groups(decoder.lateral_conv.gn, dtype)
        weight = decoder.output_conv.conv.weight.detach().to(dtype, copy=True)
        self.register_buffer("weight", weight.contiguous(memory_format=torch.channels_last), persistent=False)
        self.output_norm = Groups(decoder.output_conv.gn, dtype)
        self.mask_feature = Point(decoder.mask_feature, dtype)

    weight: Tensor

    def forward(self, tokens: Tensor, shapes: Sequence[tuple[int, int]], finest: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Take and return what it does; mask features are in the products' type, and all maps views of cells."""
        with torch.autocast(tokens.device.type, enabled=False):
            parts = self.post_norm(tokens).split([h * w for h, w in shapes], 1)
            maps = [part.unflatten(1, shape).permute(0, 3, 1, 2) for part, shape in zip(parts, shapes, strict=True)]
            lateral = self.lateral_norm(self.lateral(finest.permute(0, 2, 3, 1)))
            enlarged = F.interpolate(maps[-1], lateral.shape[1:3], mode="bilinear", align_corners=False)
            summed = (lateral + enlarged.permute(0, 2, 3, 1)).to(self.dtype)
            found = F.conv2d(summed.permute(0, 3, 1, 2), self.weight, padding=self.weight.shape[-1] // 2)
            found = self.mask_feature(F.relu(self.output_norm(found.permute(0, 2, 3, 1))))
            return found.permute(0, 3, 1, 2), maps


def take(model: nn.Module, dtype: torch.dtype) -> bool:
    """Make both ends of every pixel decoder layers of their own, in place; False for a model without one, or of other layers."""
    found = [part for part in model.modules() if isinstance(part, PixelDecoder) and _fits(part)]
    for decoder in found:
        d: Any = decoder
        d.ends = nn.ModuleDict({"enter": Enter(d, dtype), "leave": Leave(d, dtype)})
        for name, end in d.ends.items():
            vars(d)[name] = end
    return bool(found)


def _fits(decoder: PixelDecoder) -> bool:
    """Return whether the convolutions are those that the constructor makes, or folded into what is before them."""
    pointed: list[Any] = [each.conv for each in (*decoder.input_convs, decoder.lateral_conv)]
    made = [each for each in pointed if type(each) is not nn.Identity]
    return all(type(each) is nn.Conv2d for each in (*made, decoder.output_conv.conv, decoder.mask_feature))
