"""ResNets from timm, with torchvision's names: an image to four maps, the last ones dilated instead of strided.

Every size is taken, and nothing is padded to whole cells: a convolution of stride 2 gives half the size, rounded up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mfuser.towers.meta import unfilled
from mfuser.towers.table import TOWERS, tower

STRIDES = (4, 8, 16, 32)  # of the maps, undilated


class ResNetEncoder(nn.Module):
    """A ResNet of timm's that gives the maps of its four stages.

    The stem is the row's: one 7x7 convolution, or timm's `stem_type: deep`, three of 3x3; both with a 3x3 max-pooling.

    Attributes:
        channels: of the maps, finest first.    strides: of the maps.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, *, output_stride: int = 32, contracted: bool = False) -> None:
        """Build with random weights.

        Args:
            name: a ResNet among TOWERS.
            output_stride: 32, 16 or 8, the largest stride of a map. Where a stage would exceed it, all of its 3x3 convolutions
                are dilated instead, the first block's too, as in RobustNet.
            contracted: the first block of such a stage has half the dilation, as by torchvision's and mmsegmentation's rules.

        Raises: ValueError for another row, an unknown name, or another stride.
        """
        super().__init__()
        row = tower(name)
        known = resnets()
        if name not in known:
            raise ValueError(f"`{name}` is no ResNet; choose from {', '.join(known)}")
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride is {output_stride}; choose from 8, 16, 32")
        self.name, self.channels = name, row.channels
        self.strides = tuple(min(stride, output_stride) for stride in STRIDES)
        if row.timm is None:
            from timm.models.resnet import BasicBlock, ResNet

            self.trunk: Any = ResNet(BasicBlock, num_classes=0, **row.options)
        else:
            import timm

            # large: its parameters stay on the meta device until they are loaded, or drawn by `loading.fill`
            with unfilled():
                self.trunk = timm.create_model(row.timm, pretrained=False, num_classes=0, **row.options)
        for stage, stride in zip(self.stages, STRIDES, strict=True):
            if stride > output_stride:
                _dilate(stage, stride // output_stride, stride // output_stride // (2 if contracted else 1))
        self.register_buffer("mean", torch.tensor(row.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(row.std).view(3, 1, 1), persistent=False)

    @property
    def stages(self) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
        """The four stages, each of which gives a map."""
        trunk = self.trunk
        return trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) in [0, 1] to four maps (B, C, h, w), finest first."""
        return self.maps(self.stem(self.normalised(images)))

    def normalised(self, images: Tensor) -> Tensor:
        """Return images (B, 3, H, W) in [0, 1] with the tower's mean and deviation, in its precision."""
        normalised = (images - self.mean) / self.std
        kind = images.device.type
        if kind == "meta" or not torch.is_autocast_enabled(kind):  # on shapes alone there is no autocast
            # of a model in 16 bits or fp64, whatever the images have
            normalised = normalised.to(next(self.trunk.parameters()).dtype)
        return normalised

    def stem(self, normalised: Tensor) -> Tensor:
        """Return the map (B, C, H/4, W/4) that enters the first stage: convolution, norm, ReLU, max-pooling."""
        trunk = self.trunk
        out: Tensor = trunk.maxpool(trunk.act1(trunk.bn1(trunk.conv1(normalised))))
        return out

    def maps(self, x: Tensor) -> list[Tensor]:
        """Return the four maps of what `stem` gives."""
        found = []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found


def resnets() -> list[str]:
    """Return the ResNets of the table of towers."""
    return [name for name, row in TOWERS.items() if row.channels and not row.text and "resnet" in (row.timm or name)]


def _dilate(stage: nn.Module, dilation: int, first: int) -> None:
    """Let a stage keep the size of its input, with 3x3 convolutions of this dilation, those of its first block of `first`."""
    for number, block in enumerate(stage.children()):
        own = dilation if number else first
        for module in block.modules():
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)
                if module.kernel_size == (3, 3):
                    module.dilation = module.padding = (own, own)
