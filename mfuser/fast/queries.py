"""A layer of the mask decoder with what is around it: the mask that it attends by, the norm, and the masks of its queries."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mfuser.decoder.mask_decoder import MaskDecoder, advanced


class Advance(nn.Module):
    """One step of a mask decoder: as `MaskDecoder.advance`, for one layer."""

    def __init__(self, decoder: MaskDecoder, layer: nn.Module) -> None:
        super().__init__()
        self.heads, self.layer, self.post_norm, self.mask_embed = decoder.heads, layer, decoder.post_norm, decoder.mask_embed

    def forward(self, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Take what `MaskDecoder.advance` takes behind the layer's number, and return what it does."""
        return advanced(self, self.layer, *given)


def take(model: nn.Module) -> bool:
    """Make the steps of every mask decoder layers of their own, in place; False for a model without one."""
    found = [part for part in model.modules() if isinstance(part, MaskDecoder)]
    for decoder in found:
        d: Any = decoder
        d.steps = nn.ModuleList(Advance(decoder, layer) for layer in decoder.layers)
        vars(d)["advance"] = lambda i, *given, d=d: d.steps[i](*given)
    return bool(found)
