"""UPerNet (Xiao et al., ECCV 2018) as mmsegmentation has it, with which backbones are compared on ADE20K."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.decoder.deeplab import conv_norm

SCALES = (1, 2, 3, 6)  # cells a side of the pooled maps


class UPerNet(nn.Module):
    """A pyramid of pooled contexts on the coarsest map, a feature pyramid down from it, and one fused map that is classified.

    Args:
        channels: of the four maps, finest first.    classes: K.    dim: width of the head.
    """

    def __init__(self, channels: Sequence[int], classes: int, dim: int = 512) -> None:
        super().__init__()
        self.pooled = nn.ModuleList(conv_norm(channels[-1], dim, 1) for _ in SCALES)
        self.bottleneck = conv_norm(channels[-1] + len(SCALES) * dim, dim, 3)
        self.laterals = nn.ModuleList(conv_norm(width, dim, 1) for width in channels[:-1])
        self.smoothed = nn.ModuleList(conv_norm(dim, dim, 3) for _ in channels[:-1])
        self.fusion = conv_norm(len(channels) * dim, dim, 3)
        self.dropout = nn.Dropout2d(0.1)
        self.classify = nn.Conv2d(dim, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Four maps (B, C, h, w), finest first, to logits (B, K, h, w) of the finest one's size."""
        *finer, top = maps
        context = [
            resized(branch(F.adaptive_avg_pool2d(top, scale)), top.shape[-2:])
            for branch, scale in zip(self.pooled, SCALES, strict=True)
        ]
        levels = [lateral(x) for lateral, x in zip(self.laterals, finer, strict=True)]
        levels.append(self.bottleneck(torch.cat([top, *context], 1)))
        for level in range(len(levels) - 1, 0, -1):
            levels[level - 1] = levels[level - 1] + resized(levels[level], levels[level - 1].shape[-2:])
        smooth = [layer(x) for layer, x in zip(self.smoothed, levels[:-1], strict=True)] + levels[-1:]
        fused = self.fusion(torch.cat([resized(x, smooth[0].shape[-2:]) for x in smooth], 1))
        logits: Tensor = self.classify(self.dropout(fused))
        return logits


class AuxiliaryFCN(nn.Sequential):
    """Logits (B, K, h, w) of an intermediate map (B, C, h, w), for training alone."""

    def __init__(self, channels: int, classes: int, dim: int = 256) -> None:
        super().__init__(*conv_norm(channels, dim, 3), nn.Dropout2d(0.1), nn.Conv2d(dim, classes, 1))


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """Return a map (B, C, h, w) at another (H, W), bilinear; a map of that size already is not touched."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)
