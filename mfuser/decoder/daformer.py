"""The decode heads of MiT's methods: DAFormer's context-aware fusion (Hoyer et al., CVPR 2022) and SegFormer's MLP head.

Both bring the four maps to one width and to the size of the finest; logits have a quarter of the image's side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.decoder.deeplab import conv_norm
from mfuser.labels import IGNORE, train_ids


def enlarged(x: Tensor, size: Sequence[int]) -> Tensor:
    """Return a map (B, C, h, w) at another (H, W), bilinear, with corners that are not aligned."""
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


class Head(nn.Module):
    """Base: each map through a linear layer, all at the size of the finest, fused, then classified."""

    def __init__(self, channels: Sequence[int], classes: int, dim: int) -> None:
        super().__init__()
        self.embed = nn.ModuleList(nn.Linear(width, dim) for width in channels)
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = nn.Conv2d(dim, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Four maps (B, C, h, w), finest first, to logits (B, K, h, w) of the finest."""
        size = maps[0].shape[-2:]
        embedded = [layer(x.movedim(1, -1)).movedim(-1, 1) for layer, x in zip(self.embed, maps, strict=True)]
        logits: Tensor = self.classifier(self.dropout(self.fused([enlarged(x, size) for x in embedded])))
        return logits

    def fused(self, maps: Sequence[Tensor]) -> Tensor:
        """Return one map (B, dim, h, w) of four."""
        raise NotImplementedError(f"{type(self).__name__}.fused")

    def _initialise(self) -> None:
        """Draw as mmsegmentation does: convolutions by Kaiming's fan-out, the classifier N(0, 0.01)."""
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.classifier.weight, std=0.01)
        assert self.classifier.bias is not None
        nn.init.zeros_(self.classifier.bias)


class DAFormerHead(Head):
    """Fusion by an atrous pyramid of separable convolutions, without pooling, and a dense 3x3 convolution.

    Args:
        channels: of the four maps.    classes: K.    dim: width.    rates: dilations; a rate of 1 is a dense 1x1 convolution.
    """

    def __init__(self, channels: Sequence[int], classes: int, dim: int = 256, rates: Sequence[int] = (1, 6, 12, 18)) -> None:
        super().__init__(channels, classes, dim)
        width = len(channels) * dim
        self.aspp = nn.ModuleList(conv_norm(width, dim, 1) if rate == 1 else _separable(width, dim, rate) for rate in rates)
        self.bottleneck = conv_norm(len(rates) * dim, dim, 3)
        self._initialise()

    def fused(self, maps: Sequence[Tensor]) -> Tensor:
        """Return one map (B, dim, h, w) of four."""
        x = torch.cat(list(maps), 1)
        out: Tensor = self.bottleneck(torch.cat([branch(x) for branch in self.aspp], 1))
        return out


class SegFormerHead(Head):
    """Fusion by one 1x1 convolution over the maps, coarsest first.

    Args:
        channels: of the four maps.    classes: K.    dim: width.
    """

    def __init__(self, channels: Sequence[int], classes: int, dim: int = 768) -> None:
        super().__init__(channels, classes, dim)
        self.fuse = conv_norm(len(channels) * dim, dim, 1)
        self._initialise()

    def fused(self, maps: Sequence[Tensor]) -> Tensor:
        """Return one map (B, dim, h, w) of four."""
        out: Tensor = self.fuse(torch.cat(list(maps[::-1]), 1))
        return out


def _separable(in_channels: int, dim: int, dilation: int) -> nn.Sequential:
    """Build a depthwise 3x3 and a 1x1 convolution, each with batch norm and ReLU."""
    depthwise = nn.Conv2d(in_channels, in_channels, 3, padding=dilation, dilation=dilation, groups=in_channels, bias=False)
    return nn.Sequential(depthwise, nn.BatchNorm2d(in_channels), nn.ReLU(inplace=True), *conv_norm(in_channels, dim, 1))


def enlarged_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of logits (B, K, h, w) at the size of labels (B, H, W), summed over labelled pixels and divided by all.

    mmsegmentation before 1.0 divides so: with more ignored pixels the loss is smaller.

    Raises: TypeError or ValueError for labels that are no train ids, as `train_ids` does.
    """
    labels = train_ids(labels, logits.shape[1])
    large = enlarged(logits.float(), labels.shape[-2:])
    return F.cross_entropy(large, labels, reduction="sum", ignore_index=IGNORE) / labels.numel()
