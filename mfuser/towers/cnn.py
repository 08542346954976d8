"""Convolutional towers from timm: feature maps of strides 4, 8, 16 and 32.

The maps are the raw outputs of the four stages, without a final norm. Images can have any size: they are padded to multiples of
the largest stride.
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
    """A convolutional network of timm with four output maps.

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
        if not row.channels or row.clip_resnet:
            there = ", ".join(known for known, other in TOWERS.items() if other.channels and not other.clip_resnet)
            raise ValueError(f"`{name}` is no convolutional network; choose from {there}")
        self.name, self.channels = name, row.channels
        if row.timm is None:
            from timm.models.resnet import BasicBlock, ResNet

            self.trunk: Any = ResNet(BasicBlock, num_classes=0, **row.options)
        else:
            import timm

            # large: its parameters stay on the meta device until they are loaded, or drawn by `loading.fill`
            with unfilled():
                self.trunk = timm.create_model(row.timm, pretrained=False, num_classes=0, **row.options)
        # final norm and head are not used
        self.trunk.prune_intermediate_layers(len(STRIDES), prune_norm=True)
        self.register_buffer("mean", torch.tensor(row.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(row.std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return four maps (B, C, h, w), finest first, of images (B, 3, H, W) in [0, 1].

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
