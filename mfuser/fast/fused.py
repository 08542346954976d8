"""What MFuser makes of both towers' tokens: its maps, and class texts that have seen the image, each in a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mfuser.decoder.neck import four_scales
from mfuser.towers.vit import VisionEncoder


class Tap(nn.Module):
    """A map of both towers' tokens, (B, L1, C1), (B, L2, C2) -> (B, C1 + C2, rows, columns), a view of cells in a type.

    All that reads a map rounds it to the products' type, or takes the largest of its values first, which rounds as well after.
    """

    def __init__(self, vfm: VisionEncoder, vlm: VisionEncoder, dtype: torch.dtype) -> None:
        super().__init__()
        self.prefixes, self.grid, self.dtype = (vfm.prefix, vlm.prefix), vfm.grid, dtype

    def forward(self, d: Tensor, v: Tensor) -> Tensor:
        """Apply it."""
        cells = [each[:, prefix:].to(self.dtype) for each, prefix in zip((d, v), self.prefixes, strict=True)]
        return torch.cat(cells, -1).transpose(1, 2).unflatten(2, self.grid)


class Halve(nn.Module):
    """`decoder.neck.halved`, of a map that is a view of cells to another."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H // 2, W // 2)."""
        rows, columns = x.shape[2] // 2, x.shape[3] // 2
        cells = x[:, :, : 2 * rows, : 2 * columns].permute(0, 2, 3, 1).unflatten(2, (columns, 2)).unflatten(1, (rows, 2))
        return cells.amax((2, 4)).permute(0, 3, 1, 2)


class Describe(nn.Module):
    """`MFuser.described` of a model of two towers with a context decoder."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vfm, self.vlm, self.embedding = model.vfm, model.vlm, model.embedding
        self.context_decoder, self.gamma = model.context_decoder, model.gamma

    def forward(self, text: Tensor, d: Tensor, v: Tensor) -> Tensor:
        """Class texts (B, K, D) and the last tokens (B, L, C) of both towers to texts (B, K, D)."""
        global_, visual = self.embedding(self.vfm, self.vlm, d, v)
        # itself, not what `compile_layers` makes of it alone
        refined: Tensor = text + self.gamma * self.context_decoder.forward(text, torch.cat([global_, visual], 1))
        return refined


def take(model: nn.Module, dtype: torch.dtype) -> bool:
    """Make layers of what a model of two towers has as `tap`, `scales` and `described`, in place; False for another model."""
    m: Any = model
    if not all(isinstance(getattr(m, name, None), VisionEncoder) for name in ("vfm", "vlm")) or not hasattr(m, "tap"):
        return False
    m.tapping, m.halve = Tap(m.vfm, m.vlm, dtype), Halve()
    vars(m)["tap"] = m.tapping
    vars(m)["scales"] = lambda maps: four_scales(maps, m.fpn1, m.fpn2, m.halve)
    if m.context_decoder is not None:
        m.describe = Describe(m)
        vars(m)["described"] = lambda d, v: m.describe(m.plain_texts(len(v)), d, v)
    return True
