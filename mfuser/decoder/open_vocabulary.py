"""Open-vocabulary classification of queries: class logits are similarities to text embeddings (as in FC-CLIP and CLOUDS)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.decoder.mask_decoder import MaskDecoder


class PooledMaskDecoder(MaskDecoder):
    """A mask decoder that returns class embeddings (B, Q, E) in place of class logits.

    An embedding is made from the query and from the mask features pooled over its mask. `text_logits` computes class logits from
    it, with the learned `logit_scale`.

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
    """Return the mean (B, Q, C) of features (B, C, h, w) where each mask (B, Q, h, w) is above 0; masks get no gradient."""
    inside = (mask_logits.detach() > 0).to(mask_logits.dtype)
    share = inside / (inside.sum((-1, -2), keepdim=True) + 1e-8)
    return torch.einsum("bchw,bqhw->bqc", features, share)


def text_logits(embeddings: Tensor, text: Tensor, words: Sequence[int], logit_scale: Tensor) -> Tensor:
    """Return class logits (B, Q, K + 1): scaled cosine similarities, the largest of each class's words; the last is "no object".

    Args:
        embeddings: (B, Q, E).    text: (W + 1, E), normalised: the words, class by class, and "no object".
        words: the number of words of each of the K classes.    logit_scale: logarithm of the scale, which is at most 100.
    """
    cosines = F.normalize(embeddings, dim=-1) @ text.t()
    logits = logit_scale.exp().clamp(max=100) * cosines
    largest = [part.max(-1).values for part in logits.split([*words, 1], -1)]
    return torch.stack(largest, -1)
