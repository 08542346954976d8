"""Vision towers from timm, stepped block by block.

One class serves all: DINOv2, EVA02-CLIP, CLIP and SigLIP at full size, and tiny towers that train on a CPU. A tower is
built for one grid; resampling of positions and patch kernels happens when weights are loaded, never in `forward`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.pretrained import unfilled

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Tower:
    """One row of ENCODERS: how timm builds it and what its images look like."""

    timm: str | None  # model name; None: built from `options` alone
    patch: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    options: dict[str, Any] = field(default_factory=dict)
    class_token_twice: bool = False  # the class embedding is also part of the class position, see `embed`


ENCODERS: dict[str, Tower] = {
    "dinov2_l": Tower("vit_large_patch14_dinov2", 14, *_IMAGENET),
    "eva02": Tower("eva02_large_patch14_clip_336", 14, *_CLIP),
    # the release adapts CLIP's 14-pixel patches to 16, and DINOv2's with them
    "clip": Tower("vit_large_patch14_clip_quickgelu_336", 16, *_CLIP, {"drop_path_rate": 0.1}, class_token_twice=True),
    # its pooling head is asked in a way of our own, see methods/mfuser.py
    "siglip": Tower("vit_large_patch16_siglip_384", 16, *_HALF, {"act_layer": "gelu_tanh", "global_pool": ""}),
    # trained from scratch on streets-*: on a CPU in minutes, and on one GPU
    "tiny": Tower(None, 8, *_IMAGENET, {"embed_dim": 64, "depth": 3, "num_heads": 2}),
    "small": Tower(None, 8, *_IMAGENET, {"embed_dim": 256, "depth": 8, "num_heads": 4}),
}


class ConvStem(nn.Module):
    """Patch embedding by stride-2 convolutions with residual blocks instead of one large kernel.

    From scratch and in few steps, convolutions learn what takes a patch projection and several transformer blocks far
    longer (Xiao et al., "Early Convolutions Help Transformers See Better", NeurIPS 2021). Has the face of timm's PatchEmbed.
    """

    def __init__(self, img_size: tuple[int, int], patch_size: int, in_chans: int = 3, embed_dim: int = 96,
                 **_: Any) -> None:  # fmt: skip
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (img_size[0] // patch_size, img_size[1] // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        halvings = patch_size.bit_length() - 1
        widths = [in_chans, *(min(embed_dim, (3 * embed_dim) >> (halvings - i)) for i in range(halvings))]
        layers: list[nn.Module] = []
        for stage, (a, b) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
            # at half the image's size a block costs the most and sees the least
            layers += [ResidualBlock(b)] if stage else []
        self.proj = nn.Sequential(*layers, nn.Conv2d(widths[-1], embed_dim, 1))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a skip (He et al., CVPR 2016), (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(dim, dim, 3, 1, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU(inplace=True),
            nn.Conv2d(dim, dim, 3, 1, 1, bias=False), nn.BatchNorm2d(dim),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.branch(x))


class VisionEncoder(nn.Module):
    """A timm tower whose blocks are called one at a time.

    Attributes:
        dim, depth: width and number of blocks.    grid: (rows, columns) of patch tokens.
        prefix: class and register tokens, which come before the patches.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, image_size: tuple[int, int], *, patch: int | None = None, **options: Any) -> None:
        """Build with random weights.

        Args:
            name: a row of ENCODERS.    image_size: (H, W) of the images; the grid is their number of whole patches.
            patch: another patch size than the row's.    options: further arguments of timm's constructor.

        Raises: ValueError for an unknown name.
        """
        super().__init__()
        import timm
        from timm.models.vision_transformer import VisionTransformer

        if name not in ENCODERS:
            raise ValueError(f"unknown vision tower `{name}`; choose from {', '.join(sorted(ENCODERS))}")
        row = ENCODERS[name]
        self.name, self.patch = name, patch or row.patch
        self.grid = (image_size[0] // self.patch, image_size[1] // self.patch)
        covered = (self.grid[0] * self.patch, self.grid[1] * self.patch)
        settings = {**row.options, **options}
        if row.timm is None:
            if any(side % self.patch for side in image_size):
                raise ValueError(f"image size {image_size} is not a multiple of the patch of `{name}`, {self.patch}")
            self.trunk: Any = VisionTransformer(
                img_size=covered, patch_size=self.patch, num_classes=0, embed_layer=ConvStem, **settings
            )
        else:
            # large: its parameters stay on the meta device until they are loaded, or drawn by `pretrained.fill`
            with unfilled():
                self.trunk = timm.create_model(
                    row.timm, pretrained=False, img_size=covered, patch_size=self.patch, num_classes=0, **settings
                )
        self.dim: int = self.trunk.embed_dim
        self.depth = len(self.trunk.blocks)
        self.prefix: int = self.trunk.num_prefix_tokens
        self.class_token_twice = row.class_token_twice
        self._rope: Tensor | None = None
        self.register_buffer("mean", torch.tensor(row.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(row.std).view(3, 1, 1), persistent=False)

    @property
    def norm(self) -> nn.Module:
        """The tower's final norm; `finish` applies it."""
        norm: nn.Module = self.trunk.norm
        return norm

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to the tokens that enter block 0, (B, prefix + rows * columns, dim)."""
        # the convolution itself, not PatchEmbed: 512 is no multiple of 14, and the release leaves the rest unused
        patches = self.trunk.patch_embed.proj((images - self.mean) / self.std)
        if patches.shape[-2:] != self.grid:
            raise ValueError(
                f"images of {tuple(images.shape[-2:])} give `{self.name}` a grid of {tuple(patches.shape[-2:])}; "
                f"it was built for {self.grid}"
            )
        tokens = self.trunk._pos_embed(patches.flatten(2).transpose(1, 2))
        if isinstance(tokens, tuple):  # EVA's class returns its rotary table, too
            tokens, self._rope = tokens
        if self.class_token_twice:
            # the release adds it to the class position, too, when it loads CLIP
            tokens = torch.cat([tokens[:, :1] + self.trunk.cls_token, tokens[:, 1:]], 1)
        out: Tensor = self.trunk.norm_pre(tokens)
        return out

    def block(self, index: int, tokens: Tensor) -> Tensor:
        """One transformer block, (B, L, dim) -> (B, L, dim)."""
        block = self.trunk.blocks[index]
        out: Tensor = block(tokens) if self._rope is None else block(tokens, rope=self._rope)
        return out

    def finish(self, tokens: Tensor) -> Tensor:
        """The final norm."""
        out: Tensor = self.norm(tokens)
        return out

    def as_map(self, tokens: Tensor) -> Tensor:
        """Patch tokens (B, L, C), class tokens dropped, as a map (B, C, rows, columns)."""
        return tokens[:, self.prefix :].transpose(1, 2).unflatten(2, self.grid)
