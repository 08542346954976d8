"""Vision towers from timm, stepped block by block.

One class serves all: DINOv2 and 3, EVA02-CLIP, CLIP and SigLIP at full size, tiny towers that train on a CPU, and by
`timm:<model>` whatever else timm has of the same build. A tower is built for one grid; resampling of positions and patch
kernels happens when weights are loaded, never in `forward`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.towers.meta import unfilled
from mfuser.towers.table import plain, tower


class ConvStem(nn.Module):
    """Patch embedding by stride-2 convolutions with residual blocks instead of one large kernel.

    From scratch and in few steps, convolutions learn what takes a patch projection and several transformer blocks far
    longer (Xiao et al., "Early Convolutions Help Transformers See Better", NeurIPS 2021). Has the face of timm's PatchEmbed.
    """

    def __init__(
        self, img_size: tuple[int, int], patch_size: int, in_chans: int = 3, embed_dim: int = 96, *, norm: bool = True, **_: Any
    ) -> None:
        """Build; without `norm`, convolutions have a bias in place of a batch norm, see `folded`."""
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (img_size[0] // patch_size, img_size[1] // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        halvings = patch_size.bit_length() - 1
        widths = [in_chans, *(min(embed_dim, (3 * embed_dim) >> (halvings - i)) for i in range(halvings))]
        layers: list[nn.Module] = []
        for stage, (a, b) in enumerate(itertools.pairwise(widths)):
            layers += [*convolution(a, b, 2, norm), nn.ReLU(inplace=True)]
            # at half the image's size a block costs the most and sees the least
            layers += [ResidualBlock(b, norm)] if stage else []
        self.proj = nn.Sequential(*layers, nn.Conv2d(widths[-1], embed_dim, 1))


def convolution(channels: int, dim: int, stride: int, norm: bool) -> tuple[nn.Module, nn.Module]:
    """Build a 3x3 convolution and its batch norm; without `norm`, a bias and nothing."""
    return nn.Conv2d(channels, dim, 3, stride, 1, bias=not norm), nn.BatchNorm2d(dim) if norm else nn.Identity()


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a skip (He et al., CVPR 2016), (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, dim: int, norm: bool = True) -> None:
        super().__init__()
        self.branch = nn.Sequential(*convolution(dim, dim, 1, norm), nn.ReLU(inplace=True), *convolution(dim, dim, 1, norm))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.branch(x))


class VisionEncoder(nn.Module):
    """A timm tower whose blocks are called one at a time.

    Attributes:
        dim, depth: width and number of blocks.    grid: (rows, columns) of patch tokens.
        prefix: class and register tokens, which come before the patches.    classes: class tokens among them, 0 or 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        image_size: tuple[int, int],
        *,
        patch: int | None = None,
        class_token_twice: bool = True,
        drop_path: bool = True,
        **options: Any,
    ) -> None:
        """Build with random weights.

        Args:
            name: a row of TOWERS, or `timm:<model>`.
            image_size: (H, W) of the images; the grid is their number of whole patches.
            patch: another patch size than the row's.    options: further arguments of timm's constructor.
            class_token_twice: add the class embedding a second time where the row says so (CLIP), as the release does.
            drop_path: stochastic depth in training where the row has it (CLIP), as in the release.

        Raises: ValueError for an unknown name, a size without a patch, or a model that cannot be stepped block by block.
        """
        super().__init__()
        from timm.models.vision_transformer import VisionTransformer

        row = tower(name)
        if row.channels:
            raise ValueError(f"`{name}` is {row.described}, not a plain transformer; choose from {', '.join(plain())}")
        self.name, self.patch = name, patch or row.patch
        self.grid = (image_size[0] // self.patch, image_size[1] // self.patch)
        covered = (self.grid[0] * self.patch, self.grid[1] * self.patch)
        if 0 in self.grid:
            raise ValueError(f"image size {tuple(image_size)} holds no whole patch of `{name}`, {self.patch}")
        own = {name: value for name, value in row.options.items() if drop_path or name != "drop_path_rate"}
        settings = {**own, **options}
        if row.timm is None:
            if any(side % self.patch for side in image_size):
                raise ValueError(f"image size {image_size} is not a multiple of the patch of `{name}`, {self.patch}")
            if not row.scratch and self.patch != row.patch:
                raise ValueError(f"`{name}` has patches of {row.patch} pixels, and its stem fits no other; got {self.patch}")
            stem = partial(ConvStem, norm=settings.pop("norm_in_stem", True))
            self.trunk: Any = VisionTransformer(
                img_size=covered, patch_size=self.patch, num_classes=0, embed_layer=stem, **settings
            )
        else:
            # large: its parameters stay on the meta device until they are loaded, or drawn by `loading.fill`
            with unfilled():
                self.trunk = _created(name, row.timm, img_size=covered, patch_size=self.patch, **settings)
        self.dim: int = self.trunk.embed_dim
        self.depth = len(self.trunk.blocks)
        self.prefix: int = self.trunk.num_prefix_tokens
        self.classes = int(self.trunk.cls_token is not None)
        self.class_token_twice = row.class_token_twice and class_token_twice
        self.register_buffer("mean", torch.tensor(row.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(row.std).view(3, 1, 1), persistent=False)

    @property
    def norm(self) -> nn.Module:
        """The tower's final norm; `finish` applies it."""
        # models that classify by the mean of their tokens keep it behind the mean
        norm: nn.Module = self.trunk.fc_norm if isinstance(self.trunk.norm, nn.Identity) else self.trunk.norm
        return norm

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to the tokens that enter block 0, (B, prefix + rows * columns, dim)."""
        # the convolution itself, not PatchEmbed: 512 is no multiple of 14, and the release leaves the rest unused
        normalised = (images - self.mean) / self.std
        kind = images.device.type
        if kind == "meta" or not torch.is_autocast_enabled(kind):  # on shapes alone there is no autocast
            # of a model in 16 bits or fp64, whatever the images have
            normalised = normalised.to(next(self.trunk.patch_embed.proj.parameters()).dtype)
        patches = self.trunk.patch_embed.proj(normalised)
        self.check_grid(images, (patches.shape[2], patches.shape[3]))
        out: Tensor = self.trunk.norm_pre(self.positioned(patches.flatten(2).transpose(1, 2)))
        return out

    def check_grid(self, images: Tensor, grid: tuple[int, int]) -> None:
        """Raise ValueError where images (B, 3, H, W) give another grid of patches than the tower's."""
        if grid != self.grid:
            raise ValueError(
                f"images of {tuple(images.shape[-2:])} give `{self.name}` a grid of {grid}; it was built for {self.grid}"
            )

    def positioned(self, patches: Tensor) -> Tensor:
        """Return projected patches (B, rows * columns, dim) with their positions, behind class and registers."""
        tokens: Any = self.trunk._pos_embed(patches)
        if isinstance(tokens, tuple):  # EVA's class returns its rotary table, too, see `rope`
            tokens = tokens[0]
        if self.class_token_twice:
            # the release adds it to the class position, too, when it loads CLIP
            tokens = torch.cat([tokens[:, :1] + self.trunk.cls_token, tokens[:, 1:]], 1)
        out: Tensor = tokens
        return out

    def rope(self) -> Tensor | None:
        """Return the rotary table of a pass, which goes into each `block`; None for a tower without.

        The caller keeps it: a learned table has a graph, and what a module keeps of a pass is in every copy of it.
        """
        rope = getattr(self.trunk, "rope", None)
        return None if rope is None else rope.get_embed()

    def block(self, index: int, tokens: Tensor, rope: Tensor | None = None) -> Tensor:
        """One transformer block, (B, L, dim) -> (B, L, dim).

        Args:
            rope: from `rope`, called once a pass; else it is called here, which takes a while where the table is learned.
        """
        block = self.trunk.blocks[index]
        rope = self.rope() if rope is None else rope
        if rope is None:
            out: Tensor = block(tokens)
        else:
            # some models learn a table for each block
            out = block(tokens, rope=rope[index] if self.trunk.rope_mixed else rope)
        return out

    def tapped(self, images: Tensor, taps: Sequence[int], after: Callable[[int, Tensor], Tensor] | None = None) -> list[Tensor]:
        """Return maps (B, dim, rows, columns) of the blocks `taps`, counted from 0, without the final norm.

        Args:
            after: after(i, patches) changes the patch tokens (B, N, dim) of block i before they go on; class and registers stay.
        """
        tokens, rope, maps = self.embed(images), self.rope(), []
        for i in range(self.depth):
            tokens = self.block(i, tokens, rope)
            if after is not None:
                tokens = torch.cat([tokens[:, : self.prefix], after(i, tokens[:, self.prefix :])], 1)
            maps += [self.as_map(tokens)] * tuple(taps).count(i)
        return maps

    def finish(self, tokens: Tensor) -> Tensor:
        """Return the final norm."""
        out: Tensor = self.norm(tokens)
        return out

    def as_map(self, tokens: Tensor) -> Tensor:
        """Patch tokens (B, L, C), class and registers dropped, as a map (B, C, rows, columns)."""
        return tokens[:, self.prefix :].transpose(1, 2).unflatten(2, self.grid)


def _created(name: str, model: str, **settings: Any) -> Any:
    """Return a model of timm's for one grid, without a head.

    Raises: ValueError for a model of a plain family that is not plain itself.
    """
    import timm
    from timm.layers import PatchEmbed
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    # DINOv3 would take any grid and lay its tokens out otherwise
    trunk = timm.create_model(model, pretrained=False, num_classes=0, dynamic_img_size=False, **settings)
    plain = any(type(trunk).forward_features is known.forward_features for known in (VisionTransformer, Eva))
    if not plain or type(trunk.patch_embed) is not PatchEmbed:
        raise ValueError(f"`{name}` is a {type(trunk).__name__} that cannot be stepped block by block")
    # its pooling is never asked: parameters without a gradient
    trunk.attn_pool = None
    return trunk
