"""Deformable attention: a token attends to a few positions around its own, which it predicts.

The pixel decoder runs it over the scales of a pyramid, and a fuser over the grids of two towers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mfuser.by_size import by_size
from mfuser.ops import ms_deform_attn


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (Zhu et al., ICLR 2021, eq. 3) over a concatenation of maps.

    Args:
        dim: D.    heads, scales, points: M heads, each with P points in each of S maps.    backend: of the sampling.

    Raises: ValueError for heads that do not divide D.
    """

    def __init__(self, dim: int, heads: int, scales: int, points: int, *, backend: str = "auto") -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not divisible by heads {heads}")
        self.heads, self.scales, self.points, self.backend = heads, scales, points, backend
        self.sampling_offsets = nn.Linear(dim, heads * scales * points * 2)
        self.attention_weights = nn.Linear(dim, heads * scales * points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set offsets to one direction per head, 1..P cells away, and all attention weights equal."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angle = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        distance = torch.arange(1, self.points + 1, dtype=torch.float32)
        offsets = direction[:, None, None] * distance[:, None]  # (M, 1, P, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.scales, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, query: Tensor, tokens: Tensor, reference: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """Attend from every query to all maps.

        Args:
            query: (B, Q, D), with position embedding.    tokens: (B, L, D), the maps one after the other, without.
            reference: (Q, 2), each query's own position as (x, y) in 0..1.    shapes: (H, W) of each map.
        Returns: (B, Q, D), without a residual.
        """
        (batch, length, dim), queries = tokens.shape, query.shape[1]
        value = self.value_proj(tokens).view(batch, length, self.heads, dim // self.heads)
        offsets = self.sampling_offsets(query).view(batch, queries, self.heads, self.scales, self.points, 2)
        weights = self.attention_weights(query).view(batch, queries, self.heads, self.scales * self.points).softmax(-1)
        weights = weights.view(batch, queries, self.heads, self.scales, self.points)
        extent = extents(tuple(shapes), device=tokens.device)
        locations = reference[:, None, None, None] + offsets.float() / extent[:, None]
        attended = ms_deform_attn(value, list(shapes), locations, weights, backend=self.backend)
        out: Tensor = self.output_proj(attended)
        return out


@by_size
def extents(shapes: tuple[tuple[int, int], ...], *, device: torch.device | None = None) -> Tensor:
    """Return the sides of maps (H, W) as (S, 2) of (W, H) in fp32."""
    sides = [(float(w), float(h)) for h, w in shapes]
    if torch.compiler.is_compiling() or (device is not None and device.type == "cuda"):
        # constants of kernels: a tensor of numbers is copied from the host, which costs a compiled layer a wait in every call,
        # and which a CUDA graph cannot hold
        rows = [torch.stack([torch.full((), side, dtype=torch.float32, device=device) for side in row]) for row in sides]
        return torch.stack(rows)
    return torch.tensor(sides, dtype=torch.float32, device=device)


@by_size
def cell_centres(height: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """Return reference points of a map's own tokens, (H * W, 2) of (x, y) in 0..1, row by row."""
    y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
    x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1).flatten(0, 1)
