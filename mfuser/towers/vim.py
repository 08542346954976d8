"""Vim (Zhu et al., "Vision Mamba", ICML 2024): a plain trunk of patches whose blocks scan them forwards and backwards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.decoder.neck import upsampling
from mfuser.towers.scan import TokenScan, rank_of


class VimBlock(nn.Module):
    """A norm and Vim's mixer of both directions, beside a residual, (B, L, C) -> (B, L, C).

    Args:
        dim: C; twice that is scanned.    state: N.    backend: of the scan.
    """

    def __init__(self, dim: int, *, state: int, backend: str = "auto") -> None:
        super().__init__()
        inner = 2 * dim
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        # causal: what the padding adds at the end is cut off
        self.convs = nn.ModuleList(nn.Conv1d(inner, inner, 4, padding=3, groups=inner) for _ in range(2))
        self.scans = nn.ModuleList(TokenScan(inner, state=state, rank=rank_of(dim), backend=backend) for _ in range(2))
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner, gate = self.in_proj(self.norm(x)).chunk(2, -1)
        forwards = self._scanned(0, inner, gate)
        backwards = self._scanned(1, inner.flip(1), gate.flip(1)).flip(1)
        out: Tensor = x + self.out_proj((forwards + backwards) / 2)
        return out

    def _scanned(self, direction: int, x: Tensor, gate: Tensor) -> Tensor:
        mixed = F.silu(self.convs[direction](x.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
        scanned: Tensor = self.scans[direction](mixed, gate.contiguous())
        return scanned


class Vim(nn.Module):
    """A trunk of four maps of strides 4, 8, 16 and 32: four blocks' patches, up- and downsampled by the neck of its release.

    Args:
        dim: C.    depth: blocks.    taps: the four blocks, counted from 0, whose maps are given.    state: N.
        grid: (rows, columns) of the position table; it is resampled for images of other sizes.    patch: pixels of a side.
        levels: of the four maps, those that are given.    backend: of the scan.

    Attributes:
        channels: of the maps, finest first.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        taps: Sequence[int],
        *,
        state: int = 16,
        grid: tuple[int, int] = (32, 32),
        patch: int = 16,
        levels: Sequence[int] = (0, 1, 2, 3),
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.channels, self.taps, self.grid, self.levels = (dim,) * len(levels), tuple(taps), grid, tuple(levels)
        self.patch_embed = nn.Conv2d(3, dim, patch, patch)
        self.pos_embed = nn.Parameter(torch.empty(1, dim, *grid))
        self.blocks = nn.ModuleList(VimBlock(dim, state=state, backend=backend) for _ in range(depth))
        self.fpn1, self.fpn2 = (neck if level in self.levels else None for level, neck in enumerate(upsampling(dim)))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images (B, 3, H, W) to maps (B, C, h, w), finest first."""
        x = self.patch_embed(images)
        grid = x.shape[-2:]
        places: Tensor = self.pos_embed
        if tuple(grid) != self.grid:
            places = F.interpolate(places, tuple(grid), mode="bicubic", align_corners=False)
        x = (x + places).flatten(2).transpose(1, 2)
        maps = []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in self.taps:
                maps.append(x.transpose(1, 2).unflatten(2, grid))
        necks = (self.fpn1, self.fpn2, nn.Identity(), nn.MaxPool2d(2))
        return [
            neck(x) for level, (neck, x) in enumerate(zip(necks, maps, strict=True)) if neck is not None and level in self.levels
        ]
