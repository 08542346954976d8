"""The block of H3 (Fu et al., ICLR 2023): two gates around a sequence layer, with a short memory in front of the first.

    q, k, v = W_q x, W_k x, W_v x;    y = W_o (q * layer(shift(k) * v))

`shift` is a state space whose state is the last N inputs: a learned causal filter of N taps, with a skip connection.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mfuser.ssm.convolution import convolve


class Shift(nn.Module):
    """A learned causal filter over the last `taps` tokens of each channel, with a skip connection."""

    def __init__(self, channels: int, taps: int = 64) -> None:
        super().__init__()
        self.C = nn.Parameter(torch.randn(channels, taps) * taps**-0.5)
        self.D = nn.Parameter(torch.randn(channels))

    def forward(self, u: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        taps = self.C[:, : u.shape[1]]
        return convolve(u, taps) + self.D * u


class H3(nn.Module):
    """A sequence layer over (B, L, C) between two gates.

    Args:
        dim: C.    layer: takes and returns (B, L, C), its skip connection included.    taps: of the shift.
    """

    def __init__(self, dim: int, layer: nn.Module, *, taps: int = 64) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.shift, self.layer = Shift(dim, taps), layer
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C), without the residual."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        out: Tensor = self.out_proj(q * self.layer(self.shift(k) * v))
        return out
