"""DeepLabV3+ as mmsegmentation has it (DepthwiseSeparableASPPHead): separable convolutions, corners not aligned.

Used by TLDR with dilations for maps of stride 8. Only the first 3x3 of the pooled context is dense.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.decoder.deeplab import conv_norm

FINE = 48  # channels that the finest map is brought to


def enlarged(x: Tensor, size: Sequence[int]) -> Tensor:
    """Return a map (B, C, h, w) at another (H, W), bilinear without aligned corners."""
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


class SeparableDeepLabV3Plus(nn.Module):
    """The decoder: the finest map (B, F, h, w) and the coarsest one to logits (B, K, h, w).

    Args:
        fine_channels, channels: of the finest and the coarsest map.    classes: K.    dim: width of the decoder.
        rates: dilations of the branches; one of 1 is a dense 1x1.
    """

    def __init__(
        self, fine_channels: int, channels: int, classes: int, dim: int = 512, rates: Sequence[int] = (1, 12, 24, 36)
    ) -> None:
        super().__init__()
        self.image_pool = conv_norm(channels, dim, 1)
        self.aspp = nn.ModuleList(
            [conv_norm(channels, dim, 1) if rate == 1 else separable(channels, dim, dilation=rate) for rate in rates]
        )
        self.bottleneck = conv_norm((len(rates) + 1) * dim, dim, 3)
        self.fine = conv_norm(fine_channels, FINE, 1)
        self.final = nn.Sequential(separable(dim + FINE, dim), separable(dim, dim))
        self.dropout = nn.Dropout2d(0.1)
        self.classify = nn.Conv2d(dim, classes, 1)
        for part in self.modules():
            if isinstance(part, nn.Conv2d) and part is not self.classify:
                # mmcv's for convolutions followed by a norm
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.classify.weight, std=0.01)
        assert self.classify.bias is not None
        nn.init.zeros_(self.classify.bias)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        pooled = enlarged(self.image_pool(coarse.mean((2, 3), keepdim=True)), coarse.shape[-2:])
        context = self.bottleneck(torch.cat([pooled, *(branch(coarse) for branch in self.aspp)], 1))
        context = enlarged(context, fine.shape[-2:])
        out: Tensor = self.classify(self.dropout(self.final(torch.cat([context, self.fine(fine)], 1))))
        return out


def separable(in_channels: int, out_channels: int, *, dilation: int = 1) -> nn.Sequential:
    """Build a 3x3 convolution of each channel alone and then a 1x1, each with batch norm and ReLU."""
    return nn.Sequential(
        nn.Sequential(
            nn.Conv2d(in_channels, in_channels, 3, padding=dilation, dilation=dilation, groups=in_channels, bias=False),
            nn.BatchNorm2d(in_channels),
            nn.ReLU(inplace=True),
        ),
        conv_norm(in_channels, out_channels, 1),
    )
