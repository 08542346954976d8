"""NAT (Hassani et al., "Neighborhood Attention Transformer", CVPR 2023) in plain tensor operations.

A token attends to the k x k window of tokens nearest to it: around its own place, and moved inwards at a border, so that every
token has as many keys. The windows are written out, which takes k * k times the memory of the map; kernels do without.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class NeighbourhoodAttention(nn.Module):
    """Attention within windows, with a learned bias for each relative place, (B, H, W, C) -> (B, H, W, C).

    Args:
        dim: C.    heads: of 32 channels each.    kernel: k, the window's side, odd.
    """

    def __init__(self, dim: int, heads: int, kernel: int = 7) -> None:
        super().__init__()
        self.heads, self.kernel = heads, kernel
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.rpb = nn.Parameter(torch.empty(heads, 2 * kernel - 1, 2 * kernel - 1))
        nn.init.trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map; ValueError if it is smaller than the window."""
        height, width = x.shape[1:3]
        k = self.kernel
        if height < k or width < k:
            raise ValueError(f"a map of {height}x{width} is smaller than the {k}x{k} window; give a larger image")
        rows, columns = (_window_starts(side, k, x.device) for side in (height, width))
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 4, 5, 1, 2)  # (B, heads, d, H, W) each
        scale = query.shape[2] ** -0.5
        query = (scale * query).permute(0, 1, 3, 4, 2).unsqueeze(-2)  # (B, heads, H, W, 1, d)
        scores = query @ _windows(key, rows, columns, k).transpose(-2, -1)  # (B, heads, H, W, 1, k*k)
        scores = scores + self._bias(rows, columns).unsqueeze(-2)
        mixed = (scores.softmax(-1) @ _windows(value, rows, columns, k)).squeeze(-2)  # (B, heads, H, W, d)
        out: Tensor = self.proj(mixed.permute(0, 2, 3, 1, 4).flatten(3))
        return out

    def _bias(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the bias (heads, H, W, k*k) of windows that begin at these rows and columns."""
        k = self.kernel

        def relative(starts: Tensor) -> Tensor:  # (side, k): the key's place less the query's, from 0 to 2k - 2
            own = torch.arange(len(starts), device=starts.device)
            return (starts - own)[:, None] + torch.arange(k, device=starts.device) + k - 1

        down, across = relative(rows)[:, None, :, None], relative(columns)[None, :, None, :]
        return self.rpb[:, down, across].flatten(3)


def _window_starts(side: int, kernel: int, device: torch.device) -> Tensor:
    """Return the first index of each place's window, (side,)."""
    return (torch.arange(side, device=device) - kernel // 2).clamp(0, side - kernel)


def _windows(x: Tensor, rows: Tensor, columns: Tensor, kernel: int) -> Tensor:
    """Return the window of every place, (B, heads, d, H, W) -> (B, heads, H, W, k*k, d)."""
    found = x.unfold(3, kernel, 1).unfold(4, kernel, 1)  # (B, heads, d, H - k + 1, W - k + 1, k, k)
    found = found.index_select(3, rows).index_select(4, columns)
    return found.permute(0, 1, 3, 4, 5, 6, 2).flatten(4, 5)


class NATBlock(nn.Module):
    """Neighbourhood attention and an MLP, each behind a norm and beside a residual.

    Args:
        scale: initial value of the layer scale, None for a block without one.
    """

    def __init__(self, dim: int, heads: int, *, kernel: int, ratio: float, scale: float | None) -> None:
        super().__init__()
        inner = int(ratio * dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = NeighbourhoodAttention(dim, heads, kernel)
        self.mlp = nn.Sequential(nn.Linear(dim, inner), nn.GELU(), nn.Linear(inner, dim))
        self.scales = None if scale is None else nn.ParameterList(nn.Parameter(torch.full((dim,), scale)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        attended = self.attn(self.norm1(x))
        x = x + (attended if self.scales is None else self.scales[0] * attended)
        passed = self.mlp(self.norm2(x))
        out: Tensor = x + (passed if self.scales is None else self.scales[1] * passed)
        return out


class NAT(nn.Module):
    """A trunk of four maps of strides 4, 8, 16 and 32, each with a norm of its own.

    Args:
        dim: width of the finest map; each stage doubles it.    depths, heads: of the stages.
        ratio: of the MLP's width.    scale: see `NATBlock`.    kernel: the window's side.

    Attributes:
        channels: of the maps, finest first.
    """

    def __init__(
        self,
        dim: int,
        depths: Sequence[int],
        heads: Sequence[int],
        *,
        ratio: float,
        scale: float | None = None,
        kernel: int = 7,
    ) -> None:
        super().__init__()
        self.channels = tuple(dim * 2**stage for stage in range(len(depths)))
        self.stem = nn.Sequential(nn.Conv2d(3, dim // 2, 3, 2, 1), nn.Conv2d(dim // 2, dim, 3, 2, 1))
        self.stem_norm = nn.LayerNorm(dim)
        self.stages = nn.ModuleList(
            nn.Sequential(*(NATBlock(width, count, kernel=kernel, ratio=ratio, scale=scale) for _ in range(depth)))
            for width, depth, count in zip(self.channels, depths, heads, strict=True)
        )
        self.downs = nn.ModuleList(nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False) for width in self.channels[:-1])
        self.down_norms = nn.ModuleList(nn.LayerNorm(2 * width) for width in self.channels[:-1])
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in self.channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images (B, 3, H, W) to four maps (B, C, h, w), finest first."""
        x = self.stem_norm(self.stem(images).permute(0, 2, 3, 1))
        maps = []
        for stage, blocks in enumerate(self.stages):
            x = blocks(x)
            maps.append(self.norms[stage](x).permute(0, 3, 1, 2))
            if stage < len(self.downs):
                x = self.down_norms[stage](self.downs[stage](x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return maps
