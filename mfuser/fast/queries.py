"""A layer of the mask decoder with what is around it: the mask that it attends by, the norm, and the masks of its queries.

What all layers read of a map, its keys and values, is made once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mfuser.decoder.mask_decoder import MaskDecoder, advanced


class Memories(nn.Module):
    """`MaskDecoder.memories`: of each map (B, D, H, W) values and keys (B, L, D), in the type in which products take them."""

    def __init__(self, decoder: MaskDecoder, dtype: torch.dtype) -> None:
        super().__init__()
        self.level_embed, self.dtype = decoder.level_embed, dtype

    def forward(self, maps: Sequence[Tensor], places: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Take what it takes."""
        found = []
        for m, place, level in zip(maps, places, self.level_embed.weight, strict=True):
            tokens = m.flatten(2).transpose(1, 2) + level
            found.append((tokens.to(self.dtype), (tokens + place).to(self.dtype)))
        return found


class Advance(nn.Module):
    """One step of a mask decoder: as `MaskDecoder.advance`, for one layer, of what `Memories` made."""

    def __init__(self, decoder: MaskDecoder, layer: nn.Module) -> None:
        super().__init__()
        self.heads, self.layer, self.post_norm, self.mask_embed = decoder.heads, layer, decoder.post_norm, decoder.mask_embed

    def forward(self, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Take what `MaskDecoder.advance` takes behind the layer's number, with keys for places, and return what it does."""
        return advanced(self, self._read, *given)

    def _read(self, queries: Tensor, position: Tensor, memory: Tensor, keys: Tensor, blocked: Tensor) -> Tensor:
        layer: Any = self.layer
        read: Tensor = layer.read(queries, queries + position, position, keys, memory, blocked)
        return read


def take(model: nn.Module, dtype: torch.dtype) -> bool:
    """Make the steps of every mask decoder, and what they read, layers of their own, in place; False for a model without one."""
    found = [part for part in model.modules() if isinstance(part, MaskDecoder)]
    for decoder in found:
        d: Any = decoder
        d.steps, d.reading = nn.ModuleList(Advance(decoder, layer) for layer in decoder.layers), Memories(decoder, dtype)
        vars(d)["advance"] = lambda i, *given, d=d: d.steps[i](*given)
        vars(d)["memories"] = d.reading
    return bool(found)
