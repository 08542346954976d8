"""VMamba (Liu et al., "VMamba: Visual State Space Model", NeurIPS 2024): four stages of blocks that scan maps in four ways.

This is the authors' later design, of their tables for segmentation and detection: no gate in the scanned branch, a 3x3
convolution before it, and an MLP after it. Maps are (B, H, W, C) inside.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.towers.scan import TokenScan, rank_of


class CrossScan(nn.Module):
    """The 2-D selective scan: along rows and along columns, each both ways, with weights of their own, added up.

    Args:
        dim: C.    ratio: D / C, of the width that is scanned.    state: N.    backend: of the scan.
    """

    def __init__(self, dim: int, *, ratio: float, state: int, backend: str = "auto") -> None:
        super().__init__()
        inner = int(ratio * dim)
        self.in_proj = nn.Linear(dim, inner, bias=False)
        self.conv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.scans = nn.ModuleList(TokenScan(inner, state=state, rank=rank_of(dim), backend=backend) for _ in range(4))
        self.norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        x = F.silu(self.conv(self.in_proj(x).permute(0, 3, 1, 2)))  # (B, D, H, W)
        height, width = x.shape[-2:]
        rows = x.flatten(2).transpose(1, 2).contiguous()  # (B, L, D)
        columns = x.transpose(2, 3).flatten(2).transpose(1, 2).contiguous()
        across, down, back, up = self.scans
        y = across(rows) + back(rows.flip(1)).flip(1)
        other = down(columns) + up(columns.flip(1)).flip(1)
        y = y.unflatten(1, (height, width)) + other.unflatten(1, (width, height)).transpose(1, 2)
        out: Tensor = self.out_proj(self.norm(y))
        return out


class VMambaBlock(nn.Module):
    """A scan and an MLP of four times the width, each behind a norm and beside a residual."""

    def __init__(self, dim: int, *, ratio: float, state: int, backend: str = "auto") -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.scan = CrossScan(dim, ratio=ratio, state=state, backend=backend)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        x = x + self.scan(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class VMamba(nn.Module):
    """A trunk of four maps of strides 4, 8, 16 and 32, each with a norm of its own.

    Args:
        dim: width of the finest map; each stage doubles it.    depths: blocks of the stages.
        ratio: of scanned width to width.    state: N.    backend: of the scan.
        levels: of the maps, those that get their norm; the others are given as they are.

    Attributes:
        channels: of the maps, finest first.
    """

    def __init__(
        self,
        dim: int,
        depths: Sequence[int],
        *,
        ratio: float = 1.0,
        state: int = 1,
        levels: Sequence[int] = (0, 1, 2, 3),
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.channels = tuple(dim * 2**stage for stage in range(len(depths)))
        half = dim // 2
        self.stem = nn.ModuleList((Down(3, half), Down(half, dim)))
        self.stages = nn.ModuleList(
            nn.Sequential(*(VMambaBlock(width, ratio=ratio, state=state, backend=backend) for _ in range(depth)))
            for width, depth in zip(self.channels, depths, strict=True)
        )
        self.downs = nn.ModuleList(Down(width, 2 * width) for width in self.channels[:-1])
        self.norms = nn.ModuleList(
            nn.LayerNorm(width) if level in levels else nn.Identity() for level, width in enumerate(self.channels)
        )
        self.apply(_initialise)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images (B, 3, H, W) to four maps (B, C, h, w), finest first."""
        first, second = self.stem
        x = second(F.gelu(first(images.permute(0, 2, 3, 1))))
        maps = []
        for stage, blocks in enumerate(self.stages):
            x = blocks(x)
            maps.append(self.norms[stage](x).permute(0, 3, 1, 2))
            if stage < len(self.downs):
                x = self.downs[stage](x)
        return maps


class Down(nn.Module):
    """A 3x3 convolution of stride 2 and a norm, (B, H, W, C) -> (B, H/2, W/2, C'), rounded up."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(dim, out, 3, 2, 1), nn.LayerNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return out


@torch.no_grad()
def _initialise(module: nn.Module) -> None:
    """Draw linear layers as the authors do; a scan's steps keep their own start."""
    if isinstance(module, CrossScan | VMambaBlock):
        for part in (*module.children(), *(getattr(module, "mlp", ()))):
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
