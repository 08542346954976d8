"""Trunks that give four maps, by name: those of the published backbone tables, and tiny ones for streets.

timm builds ResNets, Swin, ConvNeXt and DeiT; NAT, RepLKNet, Vim and VMamba have files of their own here. Weights are random.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.towers.nat import NAT
from mfuser.towers.replknet import RepLKNet
from mfuser.towers.vim import Vim
from mfuser.towers.vmamba import VMamba

Size = tuple[int, int]
Levels = Sequence[int]
STRIDES = (4, 8, 16, 32)
ALL = (0, 1, 2, 3)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


class StagedResNet(nn.Module):
    """A ResNet of timm's, with its four stages' maps.

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

    def __init__(self, name: str, size: Size, *, windowed: bool = False, levels: Levels = ALL, **options: Any) -> None:
        """Build a trunk.

        Args:
            size: (H, W) of the images.    windowed: the model is Swin, which gives maps (B, H, W, C).
            levels: of the maps, those that get their norm; the others are given as they are.
        """
        super().__init__()
        if windowed:
            options["img_size"] = size
        self.trunk = _timm(name, features_only=True, **options)
        self.windowed = windowed
        self.channels = tuple(self.trunk.feature_info.channels())
        eps = 1e-5 if windowed else 1e-6
        self.norms = nn.ModuleList(
            nn.LayerNorm(width, eps=eps) if level in levels else nn.Identity() for level, width in enumerate(self.channels)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images (B, 3, H, W) to four maps (B, C, h, w), finest first."""
        maps = [x if self.windowed else x.permute(0, 2, 3, 1) for x in self.trunk(images)]
        return [norm(x).permute(0, 3, 1, 2) for norm, x in zip(self.norms, maps, strict=True)]


class MultiLevelDeiT(nn.Module):
    """A DeiT of timm's, and mmsegmentation's multi-level neck: four blocks' patches at 4, 2, 1 and 1/2 times their grid.

    Attributes:
        channels: of the maps, finest first.
    """

    def __init__(self, name: str, *, out: int, table: Size = (512, 512)) -> None:
        """Build with `out` channels, and a position table for images of `table` pixels, which is resampled for others."""
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


# what builds a trunk for images of a size (H, W), with those of its four maps that are needed
Builder = Callable[[Size, Levels], nn.Module]


def _resnet(name: str, **options: Any) -> Builder:
    return lambda size, levels: StagedResNet(name, **options)


def _deit(name: str, out: int) -> Builder:
    return lambda size, levels: MultiLevelDeiT(name, out=out)


def _swin(name: str, **options: Any) -> Builder:
    return lambda size, levels: NormedStages(name, size, windowed=True, levels=levels, **options)


def _convnext(name: str, **options: Any) -> Builder:
    return lambda size, levels: NormedStages(name, size, levels=levels, **options)


def _nat(*given: Any, **options: Any) -> Builder:
    return lambda size, levels: NAT(*given, **options)


def _vmamba(*given: Any, **options: Any) -> Builder:
    return lambda size, levels: VMamba(*given, levels=levels, **options)


def _vim(*given: Any, **options: Any) -> Builder:
    return lambda size, levels: Vim(*given, levels=levels, **options)


_DEEP = {"stem_type": "deep", "stem_width": 32}
_SCRATCH = {"drop_path_rate": 0.0}

TRUNKS: Mapping[str, Builder] = {
    "resnet50": _resnet("resnet50"),
    "resnet50_deep": _resnet("resnet50", **_DEEP),
    "resnet101_deep": _resnet("resnet101", **_DEEP),
    "deit_s_mln": _deit("deit_small_patch16_224", 384),
    "deit_b_mln": _deit("deit_base_patch16_224", 768),
    "swin_t": _swin("swin_tiny_patch4_window7_224"),
    "swin_s": _swin("swin_small_patch4_window7_224"),
    "swin_b": _swin("swin_base_patch4_window7_224"),
    "convnext_t": _convnext("convnext_tiny"),
    "convnext_s": _convnext("convnext_small"),
    "convnext_b": _convnext("convnext_base"),
    "nat_t": _nat(64, (3, 4, 18, 5), (2, 4, 8, 16), ratio=3),
    "nat_s": _nat(96, (3, 4, 18, 5), (3, 6, 12, 24), ratio=2, scale=1e-5),
    "nat_b": _nat(128, (3, 4, 18, 5), (4, 8, 16, 32), ratio=2, scale=1e-5),
    "replknet_31b": lambda size, levels: RepLKNet((128, 256, 512, 1024), (2, 2, 18, 2), (31, 29, 27, 13)),
    "vim_s": _vim(384, 24, (5, 11, 17, 23)),
    "vmamba_t": _vmamba(96, (2, 2, 8, 2), ratio=1.0),
    "vmamba_s": _vmamba(96, (2, 2, 15, 2), ratio=2.0),
    "vmamba_b": _vmamba(128, (2, 2, 15, 2), ratio=2.0),
    # trained from scratch on streets-*; with ERM's decoder each costs what `tiny_resnet` does, give or take 1 %
    "tiny_swin": _swin(
        "swin_tiny_patch4_window7_224",
        embed_dim=32,
        depths=(1, 1, 2, 1),
        num_heads=(1, 2, 4, 8),
        window_size=4,
        mlp_ratio=4.25,
        strict_img_size=False,
        **_SCRATCH,
    ),
    "tiny_convnext": _convnext("convnext_tiny", depths=(2, 2, 2, 1), dims=(32, 64, 136, 272), **_SCRATCH),
    "tiny_vmamba": _vmamba(24, (2, 2, 2, 2), ratio=1.75),
    "tiny_vim": _vim(108, 6, (0, 2, 3, 5), grid=(8, 8)),
}


def trunk(name: str, size: Sequence[int], *, levels: Levels = ALL) -> nn.Module:
    """Build a trunk with random weights; its `channels` are those of its maps.

    Args:
        size: (H, W) of the images.    levels: of the four maps, those that are needed; a trunk may give others, too.

    Raises: ValueError for an unknown name.
    """
    if name not in TRUNKS:
        raise ValueError(f"unknown trunk `{name}`; choose from {', '.join(TRUNKS)}")
    return TRUNKS[name]((size[0], size[1]), levels)


class PyramidEncoder(nn.Module):
    """A trunk that is trained from scratch, on images as they are.

    Images are padded on the right and below to multiples of the largest stride, `cell`.

    Attributes:
        channels: of the maps, finest first.
    """

    mean: Tensor
    std: Tensor
    cell = STRIDES[-1]

    def __init__(self, name: str, size: Sequence[int], *, levels: Levels = ALL) -> None:
        """Build with random weights; arguments as those of `trunk`, and only maps of these levels are given."""
        super().__init__()
        self.name, self.levels = name, tuple(levels)
        self.trunk = trunk(name, [-(-side // self.cell) * self.cell for side in size], levels=self.levels)
        self.channels: tuple[int, ...] = self._chosen(self.trunk.channels)  # type: ignore[arg-type]
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) in [0, 1] to maps (B, C, h, w), finest first."""
        normalised = (images - self.mean) / self.std
        kind = images.device.type
        if kind == "meta" or not torch.is_autocast_enabled(kind):  # on shapes alone there is no autocast
            normalised = normalised.to(next(self.trunk.parameters()).dtype)
        missing = [-side % self.cell for side in images.shape[-2:]]
        if any(missing):
            normalised = F.pad(normalised, (0, missing[1], 0, missing[0]))
        return list(self._chosen(self.trunk(normalised)))

    def _chosen(self, each: Sequence[Any]) -> tuple[Any, ...]:
        """Return what belongs to the chosen levels, of a trunk that gives all levels or these alone."""
        return tuple(each) if len(each) == len(self.levels) else tuple(each[level] for level in self.levels)
