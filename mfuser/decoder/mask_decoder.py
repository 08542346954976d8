"""Transformer decoder: one query a class, initialised from its text, that reads the maps where its last mask was.

Masked attention and the shared prediction head are Mask2Former's (Cheng et al., CVPR 2022); text queries are tqdm's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.decoder.pixel_decoder import sine_encoding


class MaskDecoderLayer(nn.Module):
    """Masked cross-attention, self-attention, FFN; a norm after each."""

    def __init__(self, dim: int, heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.cross_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.self_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.ReLU(), nn.Linear(ffn_dim, dim))
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, queries: Tensor, query_position: Tensor, memory: Tensor, key_position: Tensor, blocked: Tensor) -> Tensor:
        """(B, K, D) -> (B, K, D); memory is (B, L, D), blocked (B * M, K, L) is True where a query must not look."""
        attended, _ = self.cross_attn(
            queries + query_position, memory + key_position, memory, attn_mask=blocked, need_weights=False
        )
        queries = self.norm1(queries + attended)
        attended, _ = self.self_attn(queries + query_position, queries + query_position, queries, need_weights=False)
        queries = self.norm2(queries + attended)
        out: Tensor = self.norm3(queries + self.ffn(queries))
        return out


class MaskDecoder(nn.Module):
    """Class and mask logits for one query a class, before the first layer and after each.

    Args:
        text_dim: width of the text embeddings.    classes: K, the number of queries.    dim: D.
    """

    def __init__(
        self,
        text_dim: int,
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
        self.text_proj = nn.Sequential(nn.Linear(text_dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.query_embed = nn.Embedding(classes, dim)
        self.level_embed = nn.Embedding(scales, dim)
        self.layers = nn.ModuleList(MaskDecoderLayer(dim, heads, ffn_dim) for _ in range(layers))
        self.post_norm = nn.LayerNorm(dim)
        self.cls_embed = nn.Linear(dim, classes + 1)
        self.mask_embed = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))

    def forward(
        self, maps: Sequence[Tensor], mask_features: Tensor, text: Tensor, *, last: bool = False
    ) -> list[tuple[Tensor, Tensor]]:
        """Decode.

        Args:
            maps: three (B, D, H, W), coarsest first.    mask_features: (B, D, h, w).    text: (B, K, text_dim).
            last: only the last output, without the classes of those before, which training alone asks for.
        Returns: per output, class logits (B, K, K + 1), the last column "no object", and mask logits (B, K, h, w).
        """
        memories = [m.flatten(2).transpose(1, 2) + level for m, level in zip(maps, self.level_embed.weight, strict=True)]
        sizes = [(m.shape[2], m.shape[3]) for m in maps]
        dim, kind = mask_features.shape[1], self.level_embed.weight.dtype
        positions = [sine_encoding(h, w, dim, device=mask_features.device).to(kind) for h, w in sizes]
        queries = self.text_proj(text)
        normed = self.post_norm(queries)
        masks = self._masks(normed, mask_features)
        outputs = [] if last else [(self.cls_embed(normed), masks)]
        for i, layer in enumerate(self.layers):
            scale = i % len(maps)
            blocked = self._blocked(masks, sizes[scale])
            queries = layer(queries, self.query_embed.weight, memories[scale], positions[scale], blocked)
            normed = self.post_norm(queries)
            masks = self._masks(normed, mask_features)
            if not last:
                outputs.append((self.cls_embed(normed), masks))
        return outputs or [(self.cls_embed(normed), masks)]

    def _masks(self, normed: Tensor, mask_features: Tensor) -> Tensor:
        return torch.einsum("bkd,bdhw->bkhw", self.mask_embed(normed), mask_features)

    @torch.no_grad()
    def _blocked(self, mask_logits: Tensor, size: tuple[int, int]) -> Tensor:
        """(B * M, K, L): True where the mask says background; a query that would see nothing sees everything."""
        resized = F.interpolate(mask_logits.detach(), size, mode="bilinear", align_corners=False).flatten(2)
        blocked = resized.sigmoid() < 0.5
        blocked &= ~blocked.all(-1, keepdim=True)
        return blocked.repeat_interleave(self.heads, 0)


def class_scores(class_logits: Tensor, mask_logits: Tensor) -> Tensor:
    """Per-pixel class scores (B, K, h, w): the masks weighted by their queries' class probabilities, "no object" left out."""
    return torch.einsum("bqk,bqhw->bkhw", class_logits.softmax(-1)[..., :-1], mask_logits.sigmoid())
