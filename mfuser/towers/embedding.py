"""Embedding of the last tokens of one or two towers in the text's space: a class for each kind of text encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mfuser.towers.vit import VisionEncoder


def counterparts(vfm: VisionEncoder, vlm: VisionEncoder, d: Tensor) -> Tensor:
    """Return the foundation tokens (B, L1, C) that are added to each of the other tower's tokens, (B, L2, C).

    Class token is added to class token and patch to patch. Registers have no counterpart; the mean of the patches
    replaces the class token if only the other tower has one.
    """
    if vfm.prefix == vlm.classes == vfm.classes:
        return d
    patches = d[:, vfm.prefix :]
    if not vlm.classes:
        return patches
    return torch.cat([d[:, :1] if vfm.classes else patches.mean(1, keepdim=True), patches], 1)


def _summed(vfm: VisionEncoder | None, vlm: VisionEncoder, d: Tensor | None, v: Tensor) -> Tensor:
    """Return the normed tokens (B, L2, C), those of both towers added where there are two."""
    return vlm.finish(v) if vfm is None or d is None else vlm.finish(v) + vfm.finish(counterparts(vfm, vlm, d))


class SumEmbedding(nn.Module):
    """EVA02's image embedding: both towers' normed tokens added, then the tower's linear head.

    Like the others it takes None for a foundation tower that is not there.
    """

    def __init__(self, vfm: VisionEncoder | None, vlm: VisionEncoder, dim: int) -> None:
        super().__init__()
        self.head = nn.Linear(vlm.dim, dim)

    def forward(self, vfm: VisionEncoder | None, vlm: VisionEncoder, d: Tensor | None, v: Tensor) -> tuple[Tensor, Tensor]:
        """Embed (B, L, C) tokens of both towers as global (B, 1, D) and visual (B, g*g, D) tokens."""
        embedded = self.head(_summed(vfm, vlm, d, v))
        return embedded[:, :1], embedded[:, 1:]


class ProjectedEmbedding(nn.Module):
    """CLIP's: the foundation tokens enter through a linear layer, before CLIP's own norm and projection."""

    def __init__(self, vfm: VisionEncoder | None, vlm: VisionEncoder, dim: int) -> None:
        super().__init__()
        if vfm is not None:
            self.adapter_proj3 = nn.Linear(vfm.dim, vlm.dim)
        self.head = nn.Linear(vlm.dim, dim, bias=False)

    def forward(self, vfm: VisionEncoder | None, vlm: VisionEncoder, d: Tensor | None, v: Tensor) -> tuple[Tensor, Tensor]:
        """Embed as SumEmbedding; the foundation tower's final norm is not used."""
        tokens = v if vfm is None or d is None else v + self.adapter_proj3(counterparts(vfm, vlm, d))
        embedded = self.head(vlm.finish(tokens))
        return embedded[:, :1], embedded[:, 1:]


class PooledEmbedding(nn.Module):
    """SigLIP's: its attention-pooling head, with its probe as a query, and with every token as a query."""

    def __init__(self, vfm: VisionEncoder | None, vlm: VisionEncoder, dim: int) -> None:
        super().__init__()
        if dim != vlm.dim:
            raise ValueError(f"text dim {dim} differs from the tower's width {vlm.dim}; the pooling head keeps the width")
        self.probe = nn.Parameter(torch.randn(1, 1, dim))
        self.attention = nn.MultiheadAttention(dim, dim // 64, batch_first=True)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU("tanh"), nn.Linear(4 * dim, dim))

    def forward(self, vfm: VisionEncoder | None, vlm: VisionEncoder, d: Tensor | None, v: Tensor) -> tuple[Tensor, Tensor]:
        """Embed as SumEmbedding."""
        tokens = _summed(vfm, vlm, d, v)
        return self._pool(self.probe.expand(len(tokens), -1, -1), tokens), self._pool(tokens, tokens)

    def _pool(self, queries: Tensor, tokens: Tensor) -> Tensor:
        attended, _ = self.attention(queries, tokens, tokens, need_weights=False)
        out: Tensor = attended + self.mlp(self.norm(attended))
        return out


class LinearEmbedding(nn.Module):
    """The image embedding of one tower alone, EVA02's or CLIP's: its normed tokens through its linear head.

    Args:
        tower: the image tower.    dim: width of the text's embeddings.    bias: EVA02's head has one, CLIP's has not.
    """

    def __init__(self, tower: VisionEncoder, dim: int, *, bias: bool) -> None:
        super().__init__()
        self.head = nn.Linear(tower.dim, dim, bias=bias)

    def forward(self, tower: VisionEncoder, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1 + g*g, C) tokens after the last block -> global (B, 1, D) and visual (B, g*g, D)."""
        embedded = self.head(tower.finish(tokens))
        return embedded[:, :1], embedded[:, 1:]


class VisionEmbedding(nn.Module):
    """Embedding of a foundation tower alone, which has no head to the texts' space: a new linear layer on its normed tokens."""

    def __init__(self, vfm: VisionEncoder, dim: int) -> None:
        super().__init__()
        self.head = nn.Linear(vfm.dim, dim)

    def forward(self, vfm: VisionEncoder, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, C) tokens after the last block -> global (B, 1, D) and visual (B, g*g, D); registers are left out.

        A tower without a class token has the mean of its patches in its place.
        """
        embedded = self.head(vfm.finish(tokens))
        patches = embedded[:, vfm.prefix :]
        return embedded[:, :1] if vfm.classes else patches.mean(1, keepdim=True), patches


# by the kind that the tower's row names, see `TextTower.embedding`
EMBEDDINGS: dict[str, Any] = {"sum": SumEmbedding, "projected": ProjectedEmbedding, "pooled": PooledEmbedding}
