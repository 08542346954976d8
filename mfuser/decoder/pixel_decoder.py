"""Pixel decoder: a deformable-attention encoder over three maps, then one FPN step.

It follows Mask2Former's pixel decoder (Cheng et al., CVPR 2022), where wanted with tqdm's cross-attention to the class
texts (Pak et al., ECCV 2024) in every layer, as MFuser's release runs it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.by_size import by_size
from mfuser.deformable import DeformableAttention, cell_centres


@by_size
def sine_encoding(height: int, width: int, dim: int, *, device: torch.device | None = None) -> Tensor:
    """Sine position encoding of a map, (H * W, dim) in fp32 (Carion et al. 2020, normalised to 2 pi).

    The first half of the channels encodes the row, the second the column; sine and cosine are interleaved.
    """
    half = dim // 2
    k = torch.arange(half, device=device, dtype=torch.float32)
    divisor = 10000 ** (2 * (k // 2) / half)
    axes = []
    for size in (height, width):
        position = torch.arange(1, size + 1, device=device, dtype=torch.float32) / (size + 1e-6) * (2 * math.pi)
        angle = position[:, None] / divisor
        axes.append(torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], -1).flatten(1))  # (size, half)
    rows = axes[0][:, None].expand(height, width, half)
    columns = axes[1][None].expand(height, width, half)
    return torch.cat([rows, columns], -1).flatten(0, 1)


class ConvNorm(nn.Module):
    """Convolution and group norm, initialised as mmcv's ConvModule."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, *, groups: int, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=bias)
        # named as the release names it: its optimizer exempts "norm" from weight decay, and not this one
        self.gn = nn.GroupNorm(groups, out_channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.gn(self.conv(x))
        return out


class PixelDecoderLayer(nn.Module):
    """Deformable self-attention, cross-attention to text, FFN; a norm after each.

    Without `text` there is neither cross-attention nor its norm, `norm2`.
    """

    def __init__(
        self, dim: int, heads: int, scales: int, points: int, ffn_dim: int, *, text: bool = True, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.self_attn = DeformableAttention(dim, heads, scales, points, backend=backend)
        if text:
            self.cross_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.ReLU(), nn.Linear(ffn_dim, dim))
        self.norm1 = nn.LayerNorm(dim)
        if text:
            self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(
        self,
        tokens: Tensor,
        position: Tensor,
        reference: Tensor,
        shapes: Sequence[tuple[int, int]],
        text: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """(B, L, D) -> (B, L, D); text is (B, K, D) with its positions (K, D)."""
        tokens = self.norm1(tokens + self.self_attn(tokens + position, tokens, reference, shapes))
        if text is not None:
            values, text_position = text
            attended, _ = self.cross_attn(tokens + position, values + text_position, values, need_weights=False)
            tokens = self.norm2(tokens + attended)
        out: Tensor = self.norm3(tokens + self.ffn(tokens))
        return out


class PixelDecoder(nn.Module):
    """Four feature maps, and the class texts if wanted, to multi-scale maps and mask features.

    Args:
        in_channels: channels of every feature map, or of each, finest first.
        text_dim: width of the text embeddings that every layer looks at; None: no text, as in Mask2Former.
        classes: K, the number of texts.    dim: D, the decoder's width.    groups: of the group norms.

    Raises: ValueError for another number of maps than four.
    """

    SCALES = 3

    def __init__(
        self,
        in_channels: int | Sequence[int],
        text_dim: int | None = None,
        *,
        classes: int = 19,
        dim: int = 256,
        layers: int = 6,
        heads: int = 8,
        points: int = 4,
        ffn_dim: int = 2048,
        groups: int = 32,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        channels = [in_channels] * (self.SCALES + 1) if isinstance(in_channels, int) else list(in_channels)
        if len(channels) != self.SCALES + 1:
            raise ValueError(
                f"in_channels are {channels}, expected those of {self.SCALES + 1} maps, finest first, or one for all"
            )
        self.input_convs = nn.ModuleList(ConvNorm(c, dim, 1, groups=groups, bias=True) for c in reversed(channels[1:]))
        self.level_encoding = nn.Embedding(self.SCALES, dim)
        self.text_dim = text_dim
        if text_dim is not None:
            self.text_proj = nn.Linear(text_dim, dim)
            self.text_pos_embed = nn.Embedding(classes, dim)
        self.layers = nn.ModuleList(
            PixelDecoderLayer(dim, heads, self.SCALES, points, ffn_dim, text=text_dim is not None, backend=backend)
            for _ in range(layers)
        )
        # after the last layer's own: tqdm's encoder has it, Mask2Former's has not
        self.post_norm = nn.Identity() if text_dim is None else nn.LayerNorm(dim)
        self.lateral_conv = ConvNorm(channels[0], dim, 1, groups=groups, bias=False)
        self.output_conv = ConvNorm(dim, dim, 3, groups=groups, bias=False)
        self.mask_feature = nn.Conv2d(dim, dim, 1)

    def forward(self, features: Sequence[Tensor], text: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Decode.

        Args:
            features: four maps (B, C, H, W), finest first (strides 4, 2, 1 and 1/2 of the token grid).
            text: (B, K, text_dim), of a decoder that is built with a text_dim, and of no other.
        Returns: mask features (B, D, H0, W0) on the finest grid, and three maps (B, D, H, W), coarsest first.
        Raises: ValueError for a text that is missing or not asked for.
        """
        if (text is None) != (self.text_dim is None):
            given = "no text" if text is None else f"a text {tuple(text.shape)}"
            raise ValueError(f"pixel decoder: got {given}, built with text_dim={self.text_dim}; give both or neither")
        coarser = list(reversed(features[1:]))
        shapes = [(m.shape[2], m.shape[3]) for m in coarser]
        tokens = self.enter(coarser)
        position = torch.cat(
            [
                sine_encoding(h, w, tokens.shape[2], device=tokens.device).to(level.dtype) + level
                for (h, w), level in zip(shapes, self.level_encoding.weight, strict=True)
            ]
        )
        reference = torch.cat([cell_centres(h, w, device=tokens.device) for h, w in shapes])
        memory = None if text is None else (self.text_proj(text), self.text_pos_embed.weight)
        for layer in self.layers:
            tokens = layer(tokens, position, reference, shapes, memory)
        return self.leave(tokens, shapes, features[0])

    def enter(self, features: Sequence[Tensor]) -> Tensor:
        """Return the tokens (B, L, D) that enter the first layer, of three maps (B, C, H, W), coarsest first."""
        maps = [conv(feature) for conv, feature in zip(self.input_convs, features, strict=True)]
        return torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)

    def leave(self, tokens: Tensor, shapes: Sequence[tuple[int, int]], finest: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return what `forward` does, of the tokens (B, L, D) behind the last layer and the finest map (B, C, H0, W0).

        Args:
            shapes: (H, W) of the three maps whose tokens they are.
        """
        parts = self.post_norm(tokens).split([h * w for h, w in shapes], 1)
        maps = [p.transpose(1, 2).unflatten(2, shape) for p, shape in zip(parts, shapes, strict=True)]
        lateral = self.lateral_conv(finest)
        summed = lateral + F.interpolate(maps[-1], lateral.shape[-2:], mode="bilinear", align_corners=False)
        return self.mask_feature(F.relu(self.output_conv(summed))), maps
