"""MFuser's step of both towers as one layer: their blocks, the fuser between them, and the additions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mfuser.fast.blocks import Block


class Pair(nn.Module):
    """One step of a model that has `pair`; what goes into the fuser is rounded to the run's type at once, as its products are."""

    def __init__(self, vfm: nn.Module, vlm: nn.Module, fuser: tuple[nn.Module, ...], dtype: torch.dtype) -> None:
        """Take the blocks, and the fuser alone, or with the linear layers before and behind it; () adds nothing."""
        super().__init__()
        self.vfm, self.vlm, self.dtype = vfm, vlm, dtype
        self.fuser = nn.ModuleList(fuser)

    def forward(self, d: Tensor, v: Tensor, rope_d: Tensor | None, rope_v: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, L1, C), (B, L2, C) -> the same."""
        d, v = self.vfm(d, rope_d), self.vlm(v, rope_v)
        if not self.fuser:
            return d, v
        fuser, *around = self.fuser
        first, second = d.to(self.dtype), v.to(self.dtype)
        if around:
            first = around[0](first)
        dd, dv = fuser(first, second)
        if around:
            dd = around[1](dd)
        return d + dd, v + dv


def take(model: nn.Module, dtype: torch.dtype) -> bool:
    """Replace the steps of a model with two towers of `Block`s, in place; False for another model."""
    m: Any = model
    vfm, vlm = getattr(model, "vfm", None), getattr(model, "vlm", None)
    if not hasattr(model, "pair") or vfm is None or vlm is None:
        return False
    blocks = list(zip(m.vfm.trunk.blocks, m.vlm.trunk.blocks, strict=True))
    if not all(isinstance(block, Block) for both in blocks for block in both):
        return False
    steps = nn.ModuleList()
    for i, (first, second) in enumerate(blocks):
        parts = [m.adapters[i]] if m.adapters else []
        parts += [m.adapter_proj1[i], m.adapter_proj2[i]] if m.adapter_proj1 else []
        steps.append(Pair(first, second, tuple(parts), dtype))
    m.pairs = steps
    m.pair = lambda i, d, v, rope_d, rope_v: m.pairs[i](d, v, rope_d, rope_v)
    return True
