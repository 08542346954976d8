"""A step of two towers and the fuser between them as one call, for whoever wants to compile it or compute it again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Pair(nn.Module):
    """What `MFuser.pair` does at one depth, of the model's own modules.

    Args:
        vfm, vlm: the towers' blocks.    fuser: the fuser alone, or with the linear layers before and behind it; () adds nothing.
        dtype: that the fuser's inputs are rounded to at once, as its products would have them; None: they stay as they are.
    """

    def __init__(self, vfm: nn.Module, vlm: nn.Module, fuser: tuple[nn.Module, ...], dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.vfm, self.vlm, self.fuser, self.dtype = vfm, vlm, nn.ModuleList(fuser), dtype

    def forward(self, d: Tensor, v: Tensor, rope_d: Tensor | None, rope_v: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, L1, C), (B, L2, C) -> the same."""
        v = self.vlm(v) if rope_v is None else self.vlm(v, rope=rope_v)
        d = self.vfm(d) if rope_d is None else self.vfm(d, rope=rope_d)
        if not self.fuser:
            return d, v
        fuser, *around = self.fuser
        first, second = (d, v) if self.dtype is None else (d.to(self.dtype), v.to(self.dtype))
        dd, dv = fuser(around[0](first) if around else first, second)
        return d + (around[1](dd) if around else dd), v + dv


class Pairs:
    """The pairs of a model, called as its `pair`. They are no modules of the model: its names and tensors stay as they are."""

    def __init__(self, pairs: list[Pair]) -> None:
        self.pairs = pairs

    def __call__(self, i: int, d: Tensor, v: Tensor, rope_d: Tensor | None, rope_v: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the tokens of both towers behind step i."""
        found: tuple[Tensor, Tensor] = self.pairs[i](d, v, rope_d, rope_v)
        return found


def paired(model: nn.Module, dtype: torch.dtype | None = None) -> list[Pair]:
    """Have a model of two towers that has `pair` call it by `Pair`s, which are returned; [] for another model.

    Args:
        dtype: as that of `Pair`; of a model that has pairs already, theirs stays.
    """
    m: Any = model
    if not hasattr(model, "pair") or getattr(model, "vfm", None) is None or getattr(model, "vlm", None) is None:
        return []
    if isinstance(m.pair, Pairs):
        return m.pair.pairs
    # a table for each block is the towers' own affair
    if any(getattr(tower.trunk, "rope_mixed", False) for tower in (m.vfm, m.vlm)):
        return []
    pairs = []
    for i, (vfm, vlm) in enumerate(zip(m.vfm.trunk.blocks, m.vlm.trunk.blocks, strict=True)):
        parts = [m.adapters[i]] if m.adapters else []
        parts += [m.adapter_proj1[i], m.adapter_proj2[i]] if m.adapter_proj1 else []
        pairs.append(Pair(vfm, vlm, tuple(parts), dtype))
        pairs[-1].training = model.training  # its parts are in the modes that the model has given them
    m.pair = Pairs(pairs)
    return pairs
