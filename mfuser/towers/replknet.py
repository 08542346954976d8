"""RepLKNet (Ding et al., "Scaling Up Your Kernels to 31x31", CVPR 2022): a convolutional trunk with very large kernels.

As it is run: the small kernels beside the large ones in training are added to them, and have no parameters here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


class LargeKernelBlock(nn.Module):
    """A depthwise convolution with a large kernel between two of 1x1, beside a residual."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.layers = nn.Sequential(
            *_conv_norm(dim, dim, 1),
            nn.ReLU(),
            nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim),  # its norm is merged into it
            nn.ReLU(),
            *_conv_norm(dim, dim, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.layers(self.norm(x))
        return out


class ConvFFN(nn.Module):
    """Two 1x1 convolutions with four times the width between them, beside a residual."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.layers = nn.Sequential(*_conv_norm(dim, 4 * dim, 1), nn.GELU(), *_conv_norm(4 * dim, dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.layers(self.norm(x))
        return out


class RepLKNet(nn.Module):
    """A trunk of four maps of strides 4, 8, 16 and 32, each with a norm of its own.

    Args:
        channels: of the maps, finest first.    depths: pairs of blocks of the stages.    kernels: sides of their large kernels.

    Attributes:
        channels: as given.
    """

    def __init__(self, channels: Sequence[int], depths: Sequence[int], kernels: Sequence[int]) -> None:
        super().__init__()
        self.channels = tuple(channels)
        first = channels[0]
        self.stem = nn.Sequential(
            *_conv_norm(3, first, 3, stride=2),
            nn.ReLU(),
            *_conv_norm(first, first, 3, groups=first),
            nn.ReLU(),
            *_conv_norm(first, first, 1),
            nn.ReLU(),
            *_conv_norm(first, first, 3, stride=2, groups=first),
            nn.ReLU(),
        )
        self.stages = nn.ModuleList(
            nn.Sequential(*(part for _ in range(depth) for part in (LargeKernelBlock(dim, kernel), ConvFFN(dim))))
            for dim, depth, kernel in zip(channels, depths, kernels, strict=True)
        )
        self.downs = nn.ModuleList(
            nn.Sequential(
                *_conv_norm(dim, following, 1),
                nn.ReLU(),
                *_conv_norm(following, following, 3, stride=2, groups=following),
                nn.ReLU(),
            )
            for dim, following in pairwise(channels)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(dim) for dim in channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images (B, 3, H, W) to four maps (B, C, h, w), finest first."""
        x = self.stem(images)
        maps = []
        for stage, blocks in enumerate(self.stages):
            x = blocks(x)
            maps.append(self.norms[stage](x))
            if stage < len(self.downs):
                x = self.downs[stage](x)
        return maps


def _conv_norm(dim: int, out: int, kernel: int, *, stride: int = 1, groups: int = 1) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    conv = nn.Conv2d(dim, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(out)
