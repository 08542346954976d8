"""MTEnhancer: class texts refined by the image, with MVFuser's scan (paper, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.fusion import MVFuser
from mfuser.ssm.steps import reset_steps


class TextAttention(nn.Module):
    """Attention of the class texts, among themselves or to a memory; no bias on queries, keys and values."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """(B, K, D) that look at (B, L, D) -> (B, K, D)."""
        seen = x if memory is None else memory
        given = ((self.q_proj, x), (self.k_proj, seen), (self.v_proj, seen))
        q, k, v = (project(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2) for project, tokens in given)
        out: Tensor = self.dropout(self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))
        return out


class MTEnhancerLayer(nn.Module):
    """Texts attend to each other, then are scanned before and after the image tokens, then an MLP.

    Args:
        copied: there are texts before the image tokens, too; else only those after them.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        state: int,
        dropout: float,
        backend: str,
        double_bias: bool = True,
        double_gate: bool = True,
        copied: bool = True,
    ) -> None:
        super().__init__()
        self.copied = copied
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.self_attn = TextAttention(dim, heads, dropout)
        self.cross_attn = MVFuser(
            dim, state=state, dropout=dropout, backend=backend, double_bias=double_bias, double_gate=double_gate
        )
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, text: Tensor, memory: Tensor) -> Tensor:
        """text (B, K, D), memory (B, L, D) -> text (B, K, D)."""
        text = text + self.self_attn(self.norm1(text))
        queries, classes = self.norm2(text), text.shape[1]
        mixed = self.cross_attn.mix(torch.cat([queries, memory, queries] if self.copied else [memory, queries], 1))
        # the first copy has seen no image yet, the last one all of it
        text = text + mixed[:, :classes] + mixed[:, -classes:] if self.copied else text + mixed[:, -classes:]
        out: Tensor = text + self.dropout(self.mlp(self.norm3(text)))
        return out


class MTEnhancer(nn.Module):
    """Class texts refined by what the image shows (paper, section 3.3).

    Args:
        text_dim: width of text and image embeddings.    dim: width inside.    heads: of the texts' self-attention.
        double_bias, double_gate: as MVFuser's.
        mamba_steps: the scan's steps start log-uniform in 1e-3..1e-1, as Mamba's; else all at 0.69, as the release's.
        copied: as MTEnhancerLayer's.
    """

    def __init__(
        self,
        text_dim: int,
        *,
        dim: int = 256,
        heads: int = 4,
        layers: int = 1,
        state: int = 16,
        dropout: float = 0.1,
        backend: str = "auto",
        double_bias: bool = True,
        double_gate: bool = True,
        mamba_steps: bool = False,
        copied: bool = True,
    ) -> None:
        super().__init__()
        self.memory_proj = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, dim), nn.LayerNorm(dim))
        self.text_proj = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, dim))
        self.decoder = nn.ModuleList(
            MTEnhancerLayer(dim, heads, state, dropout, backend, double_bias, double_gate, copied) for _ in range(layers)
        )
        self.out_proj = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, text_dim))
        for module in self.modules():
            # the release initialises every linear layer so, its scan's step sizes with them (softplus(0) = 0.69)
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if mamba_steps and isinstance(module, MVFuser):
                reset_steps(module.dt_proj)

    def forward(self, text: Tensor, visual: Tensor) -> Tensor:
        """Return what to add to the texts: text (B, K, D), visual (B, L, D), global token first -> (B, K, D)."""
        memory, refined = self.memory_proj(visual), self.text_proj(text)
        for layer in self.decoder:
            refined = layer(refined, memory)
        out: Tensor = self.out_proj(refined)
        return out
