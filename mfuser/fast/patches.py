"""What makes the tokens of a plain transformer, from pixels to the first block, as one layer with one product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.fast.blocks import Norm
from mfuser.padded import ALIGN
from mfuser.patch_product import is_product, pixels_of
from mfuser.towers.vit import VisionEncoder


class Patches(nn.Module):
    """A convolution whose stride is its kernel, as a product: (B, 3, H, W) -> (B, C, H // p, W // p); the rest is not seen.

    What it returns is a view of tokens: as they are wanted, nothing is copied.
    """

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__()
        self.sides = (conv.kernel_size[0], conv.kernel_size[1])
        weight = conv.weight.detach().flatten(1).to(dtype, copy=True)
        # 588 numbers of 14 x 14 pixels are rows of no multiple of 16 bytes, for which products have slow kernels
        self.more = -weight.shape[1] % ALIGN
        self.weight = nn.Parameter(F.pad(weight, (0, self.more)), requires_grad=False)
        bias = None if conv.bias is None else conv.bias.detach().to(dtype, copy=True)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, rows, columns)."""
        with torch.autocast(x.device.type, enabled=False):
            tokens = F.linear(pixels_of(x.to(self.weight.dtype), self.sides, self.more), self.weight, self.bias)
        return tokens.transpose(1, 2).unflatten(2, (x.shape[2] // self.sides[0], x.shape[3] // self.sides[1]))


class Embedding(nn.Module):
    """`VisionEncoder.embed` of an encoder in evaluation mode whose trunk `_adds` positions and nothing else.

    Args:
        stream: type of the tokens.
    """

    def __init__(self, encoder: VisionEncoder, patches: Patches, stream: torch.dtype) -> None:
        super().__init__()
        self.patches, self.stream, self.prefix = patches, stream, encoder.prefix
        self.register_buffer("mean", encoder.mean, persistent=False)
        self.register_buffer("std", encoder.std, persistent=False)
        self.register_buffer("added", _added(encoder, patches.weight), persistent=False)
        norm, wide = encoder.trunk.norm_pre, torch.promote_types(patches.weight.dtype, torch.float32)
        self.norm = Norm(norm, wide) if isinstance(norm, nn.LayerNorm) else nn.Identity()

    mean: Tensor
    std: Tensor
    added: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of the encoder's grid to its tokens, (B, prefix + rows * columns, dim)."""
        with torch.autocast(images.device.type, enabled=False):
            patches = self.patches((images - self.mean) / self.std).flatten(2).transpose(1, 2)
            tokens: Tensor = self.norm(F.pad(patches, (0, 0, self.prefix, 0)) + self.added)
            return tokens.to(self.stream).contiguous()


def take(encoder: VisionEncoder, dtype: torch.dtype, stream: torch.dtype) -> bool:
    """Replace the patch projection of an encoder, and all of `embed` where it can be a layer, in place.

    Args:
        dtype: of the product.    stream: of the tokens, in whatever form they are made; they come in one piece.

    Returns: False for a stem of several convolutions, which stays.
    """
    trunk, own = encoder.trunk, encoder.embed
    conv = trunk.patch_embed.proj
    taken = is_product(conv)
    if taken:
        trunk.patch_embed.proj = patches = Patches(conv, dtype)
    if taken and _adds(trunk):
        encoder.embedding = Embedding(encoder, patches, stream)
        encoder.embed = lambda images: _embedded(encoder, images)  # type: ignore[method-assign]
    else:
        encoder.embed = lambda images: own(images).to(stream).contiguous()  # type: ignore[method-assign]
    return taken


def _embedded(encoder: Any, images: Tensor) -> Tensor:
    high, wide = encoder.embedding.patches.sides
    encoder.check_grid(images, (images.shape[2] // high, images.shape[3] // wide))
    tokens: Tensor = encoder.embedding(images)
    return tokens


def _adds(trunk: Any) -> bool:
    """Return whether timm's code for positions adds them, and puts class and registers before the patches."""
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    known = type(trunk)._pos_embed in (Eva._pos_embed, VisionTransformer._pos_embed)
    return known and not trunk.dynamic_img_size and type(trunk.norm_pre) in (nn.Identity, *_norms())


def _norms() -> tuple[type, ...]:
    """Return layer norms whose code is that of `Norm`."""
    from timm.layers import LayerNorm

    return nn.LayerNorm, LayerNorm


def _added(encoder: VisionEncoder, like: Tensor) -> Tensor:
    """Return what is added to patches with zeros before them, (1, prefix + rows * columns, dim), in fp32 (fp64 of fp64)."""
    rows, columns = encoder.grid
    nothing = torch.zeros(
        1, rows * columns, encoder.dim, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32)
    )
    with torch.no_grad():
        return encoder.positioned(nothing)
