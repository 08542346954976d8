"""Trunks that give four maps, by name: those of the published backbone tables, and tiny ones for streets.

timm builds ResNets, Swin, ConvNeXt and DeiT; NAT, RepLKNet, Vim and VMamba have files of their own here. Weights are random.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.towers.nat import NAT
from mfuser.towers.replknet import RepLKNet
from mfuser.towers.vim import Vim
from mfuser.towers.vmamba import VMamba

Size = tuple[int, int]
STRIDES = (4, 8, 16, 32)


class DeepStemResNet(nn.Module):
    """A ResNet of timm's whose stem has three 3x3 convolutions, as mmsegmentation's `v1c`; its four stages' maps.

    Attributes:
        channels: of the maps, finest first.
    """

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        self.trunk = _timm(name, num_classes=0, **options)
        self.trunk.prune_intermediate_layers(len(STRIDES), prune_norm=True)
        self.channels = tuple(info["num_chs"] for info in self.trunk.feature_info[1:])

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images (B, 3, H, W) to four maps (B, C, h, w), finest first."""
        maps: list[Tensor] = self.trunk.forward_intermediates(images, indices=len(STRIDES), intermediates_only=True)
        return maps


class NormedStages(nn.Module):
    """The stages of a Swin or ConvNeXt of timm's, each map with a norm of its own, as segmentation and detection take them.

    Attributes:
        channels: of the maps, finest first.
    """

    def __init__(self, name: str, size: Size, *, windowed: bool = False, **options: Any) -> None:
        """Args: windowed: the model is Swin, which is built for images of one size and gives maps (B, H, W, C)."""
        super().__init__()
        if windowed:
            options["img_size"] = size
        self.trunk = _timm(name, features_only=True, **options)
        self.windowed = windowed
        self.channels = tuple(self.trunk.feature_info.channels())
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-5 if windowed else 1e-6) for width in self.channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images (B, 3, H, W) to four maps (B, C, h, w), finest first."""
        maps = [x if self.windowed else x.permute(0, 2, 3, 1) for x in self.trunk(images)]
        return [norm(x).permute(0, 3, 1, 2) for norm, x in zip(self.norms, maps, strict=True)]


class MultiLevelDeiT(nn.Module):
    """A DeiT of timm's, and mmsegmentation's multi-level neck: four blocks' patches at 4, 2, 1 and 1/2 times their grid.

    Attributes:
        channels: of the maps, finest first.
    """

    def __init__(self, name: str, size: Size, *, out: int, table: Size = (512, 512)) -> None:
        """Args: out: channels of the maps.    table: size of the images that the position table is for; it is resampled."""
        super().__init__()
        self.trunk = _timm(name, num_classes=0, img_size=table, dynamic_img_size=True)
        self.trunk.norm = nn.Identity()  # the blocks' own outputs are taken
        depth = len(self.trunk.blocks)
        self.taps = [depth * part // 4 - 1 for part in (1, 2, 3, 4)]
        width = self.trunk.embed_dim
        self.laterals = nn.ModuleList(nn.Conv2d(width, out, 1) for _ in STRIDES)
        self.convs = nn.ModuleList(nn.Conv2d(out, out, 3, padding=1) for _ in STRIDES)
        self.channels = (out,) * len(STRIDES)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images (B, 3, H, W) to four maps (B, C, h, w), finest first."""
        taken: list[Tensor] = self.trunk.forward_intermediates(images, indices=self.taps, intermediates_only=True, norm=False)
        maps = []
        for x, lateral, conv, times in zip(taken, self.laterals, self.convs, (4.0, 2.0, 1.0, 0.5), strict=True):
            x = lateral(x)
            if times != 1:
                x = F.interpolate(x, scale_factor=times, mode="bilinear", align_corners=False)
            maps.append(conv(x))
        return maps


def _timm(name: str, **options: Any) -> Any:
    import timm

    return timm.create_model(name, pretrained=False, **options)


def _resnet(name: str) -> Callable[[Size], nn.Module]:
    return lambda size: DeepStemResNet(name, stem_type="deep", stem_width=32)


def _swin(name: str, **options: Any) -> Callable[[Size], nn.Module]:
    return lambda size: NormedStages(name, size, windowed=True, **options)


def _convnext(name: str, **options: Any) -> Callable[[Size], nn.Module]:
    return lambda size: NormedStages(name, size, **options)


def _sized(build: Callable[..., nn.Module], *given: Any, **options: Any) -> Callable[[Size], nn.Module]:
    return lambda size: build(*given, **options)


_NAT = partial(_sized, NAT)
_VMAMBA = partial(_sized, VMamba)

# each builds the trunk for images of a size (H, W)
TRUNKS: Mapping[str, Callable[[Size], nn.Module]] = {
    "resnet50": lambda size: DeepStemResNet("resnet50"),
    "resnet101": lambda size: DeepStemResNet("resnet101"),
    "resnet50_deep": _resnet("resnet50"),
    "resnet101_deep": _resnet("resnet101"),
    "deit_s_mln": lambda size: MultiLevelDeiT("deit_small_patch16_224", size, out=384),
    "deit_b_mln": lambda size: MultiLevelDeiT("deit_base_patch16_224", size, out=768),
    "swin_t": _swin("swin_tiny_patch4_window7_224"),
    "swin_s": _swin("swin_small_patch4_window7_224"),
    "swin_b": _swin("swin_base_patch4_window7_224"),
    "convnext_t": _convnext("convnext_tiny"),
    "convnext_s": _convnext("convnext_small"),
    "convnext_b": _convnext("convnext_base"),
    "nat_t": _NAT(64, (3, 4, 18, 5), (2, 4, 8, 16), ratio=3),
    "nat_s": _NAT(96, (3, 4, 18, 5), (3, 6, 12, 24), ratio=2, scale=1e-5),
    "nat_b": _NAT(128, (3, 4, 18, 5), (4, 8, 16, 32), ratio=2, scale=1e-5),
    "replknet_31b": _sized(RepLKNet, (128, 256, 512, 1024), (2, 2, 18, 2), (31, 29, 27, 13)),
    "vim_s": _sized(Vim, 384, 24, (5, 11, 17, 23)),
    "vmamba_t": _VMAMBA(96, (2, 2, 8, 2), ratio=1.0),
    "vmamba_s": _VMAMBA(96, (2, 2, 15, 2), ratio=2.0),
    "vmamba_b": _VMAMBA(128, (2, 2, 15, 2), ratio=2.0),
}


def trunk(name: str, size: Sequence[int]) -> nn.Module:
    """Build a trunk with random weights; its `channels` are those of the four maps.

    Args: size: (H, W) of the images.

    Raises: ValueError for an unknown name.
    """
    if name not in TRUNKS:
        raise ValueError(f"unknown trunk `{name}`; choose from {', '.join(TRUNKS)}")
    return TRUNKS[name]((size[0], size[1]))
