"""DeepLabV3+ (Chen et al., ECCV 2018) as RobustNet's family has it, and its auxiliary head.

Unlike in other code, every resizing has aligned corners, the pooled branch comes first, and the two 3x3 convolutions behind the
finest map are dense.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.labels import IGNORE, train_ids
from mfuser.processes import divisor


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """Return a map (B, C, h, w) at another (H, W), bilinear with aligned corners."""
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=True)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling, (B, C, h, w) -> (B, (2 + rates) * dim, h, w).

    Args:
        rates: dilations of its 3x3 convolutions, for maps of stride 16.
    """

    def __init__(self, in_channels: int, dim: int, rates: Sequence[int] = (6, 12, 18)) -> None:
        super().__init__()
        dilated = [conv_norm(in_channels, dim, 3, dilation=rate) for rate in rates]
        self.features = nn.ModuleList([conv_norm(in_channels, dim, 1), *dilated])
        self.img_conv = conv_norm(in_channels, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = resized(self.img_conv(x.mean((2, 3), keepdim=True)), x.shape[-2:])
        return torch.cat([pooled, *(branch(x) for branch in self.features)], 1)


class DeepLabV3Plus(nn.Module):
    """The decoder: the finest map (B, F, h, w) and the coarsest one to logits (B, K, h, w).

    Args:
        fine_channels, channels: of the finest and the coarsest map.    classes: K.    dim: width of the decoder.
    """

    def __init__(self, fine_channels: int, channels: int, classes: int, dim: int = 256) -> None:
        super().__init__()
        self.aspp = ASPP(channels, dim)
        fine = 3 * dim // 16  # 48 of 256
        self.bot_fine = conv_norm(fine_channels, fine, 1)
        self.bot_aspp = conv_norm(5 * dim, dim, 1)
        self.final1 = nn.Sequential(*conv_norm(fine + dim, dim, 3), *conv_norm(dim, dim, 3))
        self.final2 = nn.Sequential(nn.Conv2d(dim, classes, 1))
        initialise(self)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        logits: Tensor = self.final2(self.features(fine, coarse))
        return logits

    def features(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Return the map (B, dim, h, w) that is classified."""
        context = resized(self.bot_aspp(self.aspp(coarse)), fine.shape[-2:])
        out: Tensor = self.final1(torch.cat([self.bot_fine(fine), context], 1))
        return out


class AuxiliaryHead(nn.Sequential):
    """Logits (B, K, h, w) of an intermediate map (B, C, h, w), for training alone."""

    def __init__(self, channels: int, classes: int, dim: int = 512) -> None:
        super().__init__(
            nn.Conv2d(channels, dim, 3, padding=1),
            nn.BatchNorm2d(dim),
            nn.ReLU(inplace=True),
            nn.Dropout2d(0.1),
            nn.Conv2d(dim, classes, 1),
        )
        initialise(self)


def conv_norm(in_channels: int, out_channels: int, kernel: int, *, dilation: int = 1) -> nn.Sequential:
    """Build a convolution without bias that keeps the size, batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, padding=dilation * (kernel // 2), dilation=dilation, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def initialise(module: nn.Module) -> None:
    """Draw convolutions from Kaiming's normal distribution (fan-in, ReLU), with biases of 0; norms begin with 1 and 0."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of logits (B, K, H, W), the mean over labelled pixels; 0 where none is labelled.

    Args:
        labels: (B, h, w) train ids, brought to the size of the logits by the nearest pixel.

    Raises: TypeError or ValueError for labels that are no train ids, as `train_ids` does.
    """
    labels = train_ids(labels, logits.shape[1])
    if labels.shape[-2:] != logits.shape[-2:]:
        labels = F.interpolate(labels[:, None].float(), logits.shape[-2:], mode="nearest")[:, 0].long()
    total = F.cross_entropy(logits.float(), labels, reduction="sum", ignore_index=IGNORE)
    return total / divisor((labels != IGNORE).sum())
