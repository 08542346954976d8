"""A layer of the mask decoder with what is around it: the mask that it attends by, the norm, and the masks of its queries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mfuser.decoder.mask_decoder import MaskDecoder, blocked_by


class Advance(nn.Module):
    """One step of a mask decoder: as `MaskDecoder.advance`, for one layer."""

    def __init__(self, decoder: MaskDecoder, layer: nn.Module) -> None:
        super().__init__()
        self.heads, self.layer, self.post_norm, self.mask_embed = decoder.heads, layer, decoder.post_norm, decoder.mask_embed

    def forward(
        self,
        queries: Tensor,
        positions: Tensor,
        memory: Tensor,
        place: Tensor,
        masks: Tensor,
        size: tuple[int, int],
        mask_features: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, normed queries, and masks (B, Q, h, w)."""
        queries = self.layer(queries, positions, memory, place, blocked_by(masks, size, self.heads))
        normed = self.post_norm(queries)
        return queries, normed, torch.einsum("bqd,bdhw->bqhw", self.mask_embed(normed), mask_features)


def take(model: nn.Module) -> bool:
    """Make the steps of every mask decoder layers of their own, in place; False for a model without one."""
    found = [part for part in model.modules() if isinstance(part, MaskDecoder)]
    for decoder in found:
        d: Any = decoder
        d.steps = nn.ModuleList(Advance(decoder, layer) for layer in decoder.layers)
        vars(d)["advance"] = lambda i, *given, d=d: d.steps[i](*given)
    return bool(found)
