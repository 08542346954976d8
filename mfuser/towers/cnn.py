"""Convolutional towers from timm: an image to maps of four strides.

Raw outputs of the four stages, without a norm behind them, as detectors and segmentation decoders take them. Every size is
taken: an image is padded to whole cells of the coarsest map.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.towers.meta import unfilled
from mfuser.towers.table import TOWERS, tower

STRIDES = (4, 8, 16, 32)


class CNNEncoder(nn.Module):
    """A network of timm's that gives four maps.

    Attributes:
        channels: of the maps, finest first; their strides are `STRIDES`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str) -> None:
        """Build with random weights.

        Args:
            name: a row of TOWERS that has `channels`.

        Raises: ValueError for another row, or an unknown name.
        """
        super().__init__()
        row = tower(name)
        if not row.channels:
            there = ", ".join(known for known, other in TOWERS.items() if other.channels)
            raise ValueError(f"`{name}` is no network of convolutions; choose from {there}")
        self.name, self.channels = name, row.channels
        if row.timm is None:
            from timm.models.resnet import BasicBlock, ResNet

            self.trunk: Any = ResNet(BasicBlock, num_classes=0, **row.options)
        else:
            import timm

            # large: its parameters stay on the meta device until they are loaded, or drawn by `loading.fill`
            with unfilled():
                self.trunk = timm.create_model(row.timm, pretrained=False, num_classes=0, **row.options)
        # what comes behind the last map has no gradient
        self.trunk.prune_intermediate_layers(len(STRIDES), prune_norm=True)
        self.register_buffer("mean", torch.tensor(row.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(row.std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) in [0, 1] to four maps (B, C, h, w), finest first.

        Images are normalised, and then padded with zeros on the right and below to multiples of 32 pixels.
        """
        normalised = (images - self.mean) / self.std
        kind = images.device.type
        if kind == "meta" or not torch.is_autocast_enabled(kind):  # on shapes alone there is no autocast
            # of a model in 16 bits or fp64, whatever the images have
            normalised = normalised.to(next(self.trunk.parameters()).dtype)
        missing = [-side % STRIDES[-1] for side in images.shape[-2:]]
        if any(missing):
            normalised = F.pad(normalised, (0, missing[1], 0, missing[0]))
        maps: list[Tensor] = self.trunk.forward_intermediates(normalised, indices=len(STRIDES), intermediates_only=True)
        return maps
