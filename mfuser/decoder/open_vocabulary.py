"""Classes by text: what a query sees is embedded where the words are, and the nearest word decides (as in FC-CLIP and CLOUDS)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.decoder.mask_decoder import MaskDecoder


class PooledMaskDecoder(MaskDecoder):
    """A mask decoder that gives class embeddings (B, Q, E) in place of class logits: of a query and of what its mask covers.

    `text_logits` makes class logits of them, with the learned `logit_scale`.

    Args:
        text_dim: E.    others: as MaskDecoder's.
    """

    def __init__(
        self, text_dim: int, *, dim: int = 256, layers: int = 9, heads: int = 8, ffn_dim: int = 2048, scales: int = 3
    ) -> None:
        super().__init__(dim=dim, layers=layers, heads=heads, ffn_dim=ffn_dim, scales=scales)
        self.pool_proj = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim))
        self.cls_embed = nn.Sequential(  # type: ignore[assignment]
            nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, text_dim)
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def _classes(self, normed: Tensor, masks: Tensor, mask_features: Tensor) -> Tensor:
        embedded: Tensor = self.cls_embed(self.pool_proj(mask_pooling(mask_features, masks)) + normed)
        return embedded


def mask_pooling(features: Tensor, mask_logits: Tensor) -> Tensor:
    """Mean (B, Q, C) of features (B, C, h, w) where each mask (B, Q, h, w) is above 0; no gradient goes to the masks."""
    inside = (mask_logits.detach() > 0).to(mask_logits.dtype)
    share = inside / (inside.sum((-1, -2), keepdim=True) + 1e-8)
    return torch.einsum("bchw,bqhw->bqc", features, share)


def text_logits(embeddings: Tensor, text: Tensor, words: Sequence[int], logit_scale: Tensor) -> Tensor:
    """Class logits (B, Q, K + 1): scaled cosines, of each class that of its nearest word; the last one is "no object".

    Args:
        embeddings: (B, Q, E).    text: (W + 1, E), of length 1: the words, class by class, and "no object".
        words: how many of them each of the K classes has.    logit_scale: the logarithm of the scale, which is at most 100.
    """
    cosines = F.normalize(embeddings, dim=-1) @ text.t()
    logits = logit_scale.exp().clamp(max=100) * cosines
    nearest = [part.max(-1).values for part in logits.split([*words, 1], -1)]
    return torch.stack(nearest, -1)
