"""What the mask decoder asks with: a query for each class made from its text, or learned queries.

A method with queries of its own gives them to `MaskDecoder` itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mfuser.decoder.mask_decoder import MaskDecoder, Output


class LearnedQueries(nn.Module):
    """Queries and positions that no image changes (Mask2Former's; Cheng et al., CVPR 2022).

    Args:
        queries: Q, how many.    dim: D, the decoder's width.
    """

    def __init__(self, queries: int = 100, dim: int = 256) -> None:
        super().__init__()
        self.query_feat = nn.Embedding(queries, dim)
        self.query_embed = nn.Embedding(queries, dim)

    def forward(self, batch: int) -> tuple[Tensor, Tensor]:
        """Queries (B, Q, D) and positions (Q, D) for `batch` images."""
        # copies: torch's FlopCounterMode fails on a module that returns a view of a parameter
        return self.query_feat.weight.repeat(batch, 1, 1), self.query_embed.weight.clone()


class TextMaskDecoder(MaskDecoder):
    """A mask decoder with a query for each class, its projected text, and a learned position (tqdm's; Pak et al., ECCV 2024).

    Args:
        text_dim: width of the text embeddings.    classes: K, the number of queries, too.    others: as MaskDecoder's.
    """

    text_proj: nn.Sequential
    query_embed: nn.Embedding

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
        queries = {
            "text_proj": nn.Sequential(nn.Linear(text_dim, dim), nn.ReLU(), nn.Linear(dim, dim)),
            "query_embed": nn.Embedding(classes, dim),
        }
        super().__init__(queries, classes=classes, dim=dim, layers=layers, heads=heads, ffn_dim=ffn_dim, scales=scales)

    def forward(  # type: ignore[override]
        self, maps: Sequence[Tensor], mask_features: Tensor, text: Tensor, *, last: bool = False
    ) -> list[Output]:
        """Decode with text (B, K, text_dim); otherwise as MaskDecoder."""
        return super().forward(maps, mask_features, self.text_proj(text), self.query_embed.weight, last=last)
