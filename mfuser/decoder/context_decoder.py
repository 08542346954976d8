"""Class texts that read the image: the context decoder of DenseCLIP (Rao et al., CVPR 2022) and tqdm (Pak et al., ECCV 2024)."""

from __future__ import annotations

from torch import Tensor, nn

from mfuser.decoder.mtenhancer import TextAttention


class ContextDecoderLayer(nn.Module):
    """Texts attend to each other, then to the image tokens, then an MLP; norms before each, on the side of the texts alone."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.self_attn, self.cross_attn = TextAttention(dim, heads, dropout), TextAttention(dim, heads, dropout)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, text: Tensor, memory: Tensor) -> Tensor:
        """text (B, K, D), memory (B, L, D) -> text (B, K, D)."""
        text = text + self.self_attn(self.norm1(text))
        text = text + self.cross_attn(self.norm2(text), memory)
        out: Tensor = text + self.dropout(self.mlp(self.norm3(text)))
        return out


class ContextDecoder(nn.Module):
    """What an image changes in the embeddings of the class texts.

    Args:
        text_dim: width of text and image embeddings.    dim: width inside.
    """

    def __init__(self, text_dim: int, *, dim: int = 256, heads: int = 4, layers: int = 3, dropout: float = 0.1) -> None:
        super().__init__()
        self.memory_proj = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, dim), nn.LayerNorm(dim))
        self.text_proj = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, dim))
        self.decoder = nn.ModuleList(ContextDecoderLayer(dim, heads, dropout) for _ in range(layers))
        self.out_proj = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, text_dim))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, text: Tensor, visual: Tensor) -> Tensor:
        """Return what to add to the texts: text (B, K, D), visual (B, L, D), global token first -> (B, K, D)."""
        memory, refined = self.memory_proj(visual), self.text_proj(text)
        for layer in self.decoder:
            refined = layer(refined, memory)
        out: Tensor = self.out_proj(refined)
        return out
