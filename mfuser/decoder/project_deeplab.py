"""DeepLabV3+ as FAMix has it (VainF's implementation): dense convolutions, corners not aligned, one 3x3 behind the finest map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mfuser.decoder.deeplab import conv_norm, initialise
from mfuser.decoder.separable_deeplab import enlarged


class ProjectedASPP(nn.Module):
    """Atrous spatial pyramid pooling with a projection, (B, C, h, w) -> (B, dim, h, w)."""

    def __init__(self, channels: int, dim: int, rates: Sequence[int] = (6, 12, 18)) -> None:
        super().__init__()
        dilated = [conv_norm(channels, dim, 3, dilation=rate) for rate in rates]
        self.convs = nn.ModuleList([conv_norm(channels, dim, 1), *dilated])
        self.image_pool = conv_norm(channels, dim, 1)
        self.project = conv_norm((len(rates) + 2) * dim, dim, 1)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = enlarged(self.image_pool(x.mean((2, 3), keepdim=True)), x.shape[-2:])
        out: Tensor = self.dropout(self.project(torch.cat([*(branch(x) for branch in self.convs), pooled], 1)))
        return out


class ProjectDeepLabV3Plus(nn.Module):
    """The decoder: the finest map (B, F, h, w) and the coarsest one to logits (B, K, h, w).

    Args:
        fine_channels, channels: of the finest and the coarsest map.    classes: K.    dim: width of the decoder.
    """

    def __init__(self, fine_channels: int, channels: int, classes: int, dim: int = 256) -> None:
        super().__init__()
        fine = 3 * dim // 16  # 48 of 256
        self.project = conv_norm(fine_channels, fine, 1)
        self.aspp = ProjectedASPP(channels, dim)
        self.final = conv_norm(fine + dim, dim, 3)
        self.classify = nn.Conv2d(dim, classes, 1)
        weight, bias = self.classify.weight, self.classify.bias
        initialise(self)
        assert bias is not None
        # the bias of the last convolution keeps PyTorch's own values
        bound = weight[0].numel() ** -0.5
        nn.init.uniform_(bias, -bound, bound)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        context = enlarged(self.aspp(coarse), fine.shape[-2:])
        out: Tensor = self.classify(self.final(torch.cat([self.project(fine), context], 1)))
        return out
