"""Transformer decoder: queries that read the maps where their last masks were.

Masked attention and the shared prediction head are Mask2Former's (Cheng et al., CVPR 2022). Queries are made in `queries`,
or by a method itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.decoder.pixel_decoder import sine_encoding

# class logits (B, Q, K + 1), the last column "no object", and mask logits (B, Q, h, w)
Output = tuple[Tensor, Tensor]


class MaskDecoderLayer(nn.Module):
    """Masked cross-attention, self-attention, FFN; a norm after each."""

    def __init__(self, dim: int, heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.cross_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.self_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.ReLU(), nn.Linear(ffn_dim, dim))
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, queries: Tensor, query_position: Tensor, memory: Tensor, key_position: Tensor, blocked: Tensor) -> Tensor:
        """(B, Q, D) -> (B, Q, D); memory is (B, L, D), blocked (B * M, Q, L) is True where a query must not look."""
        return self.read(queries, queries + query_position, query_position, memory + key_position, memory, blocked)

    def read(
        self, queries: Tensor, placed: Tensor, query_position: Tensor, keys: Tensor, memory: Tensor, blocked: Tensor
    ) -> Tensor:
        """Do as `forward`, with the positions added to queries and keys already."""
        attended, _ = self.cross_attn(placed, keys, memory, attn_mask=blocked, need_weights=False)
        queries = self.norm1(queries + attended)
        attended, _ = self.self_attn(queries + query_position, queries + query_position, queries, need_weights=False)
        queries = self.norm2(queries + attended)
        out: Tensor = self.norm3(queries + self.ffn(queries))
        return out


class MaskDecoder(nn.Module):
    """Class and mask logits of Q queries, before the first layer and after each.

    Args:
        query_parts: modules of a subclass that makes queries, kept under their names before the decoder's own.
        classes: K.    dim: D.    scales: how many maps it reads.
    """

    def __init__(
        self,
        query_parts: Mapping[str, nn.Module] | None = None,
        *,
        classes: int = 19,
        dim: int = 256,
        layers: int = 9,
        heads: int = 8,
        ffn_dim: int = 2048,
        scales: int = 3,
    ) -> None:
        super().__init__()
        self.heads = heads
        for name, part in (query_parts or {}).items():
            self.add_module(name, part)
        self.level_embed = nn.Embedding(scales, dim)
        self.layers = nn.ModuleList(MaskDecoderLayer(dim, heads, ffn_dim) for _ in range(layers))
        self.post_norm = nn.LayerNorm(dim)
        self.cls_embed = nn.Linear(dim, classes + 1)
        self.mask_embed = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))

    def forward(
        self, maps: Sequence[Tensor], mask_features: Tensor, queries: Tensor, positions: Tensor, *, last: bool = False
    ) -> list[Output]:
        """Decode.

        Args:
            maps: three (B, D, H, W), coarsest first.    mask_features: (B, D, h, w).
            queries: (B, Q, D).    positions: the queries' own, (Q, D) or (B, Q, D).
            last: only the last output, without the classes of those before, which training alone asks for.
        Returns: per output, class logits (B, Q, K + 1), the last column "no object", and mask logits (B, Q, h, w).
        """
        sizes = [(m.shape[2], m.shape[3]) for m in maps]
        dim, kind = mask_features.shape[1], self.level_embed.weight.dtype
        places = [sine_encoding(h, w, dim, device=mask_features.device).to(kind) for h, w in sizes]
        memories = self.memories(maps, places)
        normed = self.post_norm(queries)
        masks = masks_of(self, normed, mask_features)
        outputs = [] if last else [(self._classes(normed, masks, mask_features), masks)]
        for i in range(len(self.layers)):
            scale = i % len(maps)
            given = (queries, positions, *memories[scale], masks, sizes[scale], mask_features)
            queries, normed, masks = self.advance(i, *given)
            if not last:
                outputs.append((self._classes(normed, masks, mask_features), masks))
        return outputs or [(self._classes(normed, masks, mask_features), masks)]

    def memories(self, maps: Sequence[Tensor], places: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return what layers read of each map (B, D, H, W): its tokens (B, L, D) with their level, and their places (L, D)."""
        levels = zip(maps, self.level_embed.weight, strict=True)
        return list(zip((m.flatten(2).transpose(1, 2) + level for m, level in levels), places, strict=True))

    def advance(
        self,
        i: int,
        queries: Tensor,
        positions: Tensor,
        memory: Tensor,
        place: Tensor,
        masks: Tensor,
        size: tuple[int, int],
        mask_features: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, normed queries and masks behind the i-th layer, which reads a map of (H, W) where the masks were."""
        return advanced(self, self.layers[i], queries, positions, memory, place, masks, size, mask_features)

    def _classes(self, normed: Tensor, masks: Tensor, mask_features: Tensor) -> Tensor:
        """Return class logits (B, Q, K + 1) of queries (B, Q, D); a subclass can use their masks (B, Q, h, w) as well."""
        logits: Tensor = self.cls_embed(normed)
        return logits


def advanced(
    head: Any,
    layer: Callable[..., Tensor],
    queries: Tensor,
    positions: Tensor,
    memory: Tensor,
    place: Tensor,
    masks: Tensor,
    size: tuple[int, int],
    mask_features: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do as `MaskDecoder.advance` by a layer; `head` is the decoder, or has its `heads`, `post_norm` and `mask_embed`."""
    queries = layer(queries, positions, memory, place, blocked_by(masks, size, head.heads))
    normed = head.post_norm(queries)
    return queries, normed, masks_of(head, normed, mask_features)


def masks_of(head: Any, normed: Tensor, mask_features: Tensor) -> Tensor:
    """Return the mask logits (B, Q, h, w) of normed queries (B, Q, D) on features (B, D, h, w)."""
    return torch.einsum("bqd,bdhw->bqhw", head.mask_embed(normed), mask_features)


@torch.no_grad()
def blocked_by(mask_logits: Tensor, size: tuple[int, int], heads: int) -> Tensor:
    """Return (B * M, Q, L): True where a mask says background; a query that would see nothing sees everything."""
    resized = F.interpolate(mask_logits.detach(), size, mode="bilinear", align_corners=False).flatten(2)
    blocked = resized.sigmoid() < 0.5
    blocked &= ~blocked.all(-1, keepdim=True)
    return blocked.repeat_interleave(heads, 0)


def class_scores(class_logits: Tensor, mask_logits: Tensor) -> Tensor:
    """Per-pixel class scores (B, K, h, w): the masks weighted by their queries' class probabilities, "no object" left out."""
    return torch.einsum("bqk,bqhw->bkhw", class_logits.softmax(-1)[..., :-1], mask_logits.sigmoid())
