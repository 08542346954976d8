"""CLIP's ResNets (open_clip's class, OpenAI's names): three convolutions in the stem, and average pooling for strides."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.towers.meta import unfilled
from mfuser.towers.table import TOWERS, tower


class CLIPResNetEncoder(nn.Module):
    """A ResNet of CLIP's that gives the maps of its four stages; every size is taken, odd ones are halved downwards.

    Attributes:
        channels: of the maps, finest first.
        trunk: without the attention that pools the last map, see `AttentionPooling`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, *, output_stride: int = 32) -> None:
        """Build with random weights.

        Args:
            name: a ResNet of CLIP's among TOWERS.
            output_stride: 32, or 16: the last stage keeps the size of its input, and its last block is dilated, as in FAMix.

        Raises: ValueError for another row, an unknown name, or another stride.
        """
        super().__init__()
        row = tower(name)
        if name not in clip_resnets():
            raise ValueError(f"`{name}` is no ResNet of CLIP's; choose from {', '.join(clip_resnets())}")
        if output_stride not in (16, 32):
            raise ValueError(f"output_stride is {output_stride}; choose from 16, 32")
        self.name, self.channels = name, row.channels
        with nullcontext() if row.timm is None else unfilled():
            self.trunk: Any = _built(name)
        self.trunk.attnpool = nn.Identity()
        if output_stride == 16:
            first, last = self.trunk.layer4[0], self.trunk.layer4[-1]
            first.avgpool = nn.Identity()
            first.downsample[0] = nn.Identity()
            last.conv2.dilation = last.conv2.padding = (2, 2)
        self.register_buffer("mean", torch.tensor(row.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(row.std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) in [0, 1] to four maps (B, C, h, w), finest first."""
        low = self.low(images)
        return [low, *self.high(low)]

    def low(self, images: Tensor) -> Tensor:
        """Return the finest map (B, C, H/4, W/4)."""
        normalised = (images - self.mean) / self.std
        kind = images.device.type
        if kind == "meta" or not torch.is_autocast_enabled(kind):  # on shapes alone there is no autocast
            # of a model in 16 bits or fp64, whatever the images have
            normalised = normalised.to(next(self.trunk.parameters()).dtype)
        return self.from_normalised(normalised)

    def from_normalised(self, images: Tensor) -> Tensor:
        """Return the finest map of images with the tower's mean and deviation."""
        low: Tensor = self.trunk.layer1(self.trunk.stem(images))
        return low

    def high(self, low: Tensor) -> list[Tensor]:
        """Return the other three maps of the finest one."""
        found = []
        for stage in (self.trunk.layer2, self.trunk.layer3, self.trunk.layer4):
            low = stage(low)
            found.append(low)
        return found


class AttentionPooling(nn.Module):
    """CLIP's way from the last map of one of its ResNets to the embedding of an image."""

    def __init__(self, name: str) -> None:
        super().__init__()
        with nullcontext() if tower(name).timm is None else unfilled():
            self.pool: nn.Module = _built(name).attnpool

    def forward(self, x: Tensor) -> Tensor:
        """Return embeddings (B, D) of maps (B, C, 7, 7)."""
        out: Tensor = self.pool(x)
        return out


def clip_resnets() -> list[str]:
    """Return the ResNets of CLIP's in the table of towers."""
    return [name for name, row in TOWERS.items() if row.clip_resnet]


def pooled(low: Tensor) -> Tensor:
    """Return the finest map at the size that CLIP was trained with, 56x56, by averages."""
    return F.adaptive_avg_pool2d(low, (56, 56))


def _built(name: str) -> Any:
    from open_clip import get_model_config
    from open_clip.modified_resnet import ModifiedResNet

    row = TOWERS[name]
    config: Any = row.text and row.text.open_clip and get_model_config(row.text.open_clip)
    if not config:
        built = ModifiedResNet(**row.options)
        for name, scale in built.named_parameters():
            if name.endswith("bn3.weight"):  # 0 by default: a frozen block would pass its shortcut alone
                nn.init.ones_(scale)
        return built
    vision = config["vision_cfg"]
    width = vision["width"]
    return ModifiedResNet(vision["layers"], config["embed_dim"], width * 32 // 64, vision["image_size"], width)
