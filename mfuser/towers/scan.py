"""The state-space part of Mamba's blocks: a selective scan whose steps, B and C are projected from the tokens themselves."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.ops import selective_scan
from mfuser.ssm.steps import reset_steps


class TokenScan(nn.Module):
    """A scan over tokens in one direction (S6; Gu & Dao 2023, Alg. 2), (B, L, D) -> (B, L, D).

    Args:
        dim: D.    state: N.    rank: of the projection that the steps come from.    backend: of the operator.
    """

    def __init__(self, dim: int, *, state: int, rank: int, backend: str = "auto") -> None:
        super().__init__()
        self.state, self.rank, self.backend = state, rank, backend
        self.x_proj = nn.Linear(dim, rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(rank, dim)
        self.A_log = nn.Parameter(torch.arange(1, state + 1, dtype=torch.float32).log().repeat(dim, 1))
        self.D = nn.Parameter(torch.ones(dim))
        reset_steps(self.dt_proj)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Tokens, and what gates the result through SiLU, both (B, L, D), to (B, L, D)."""
        rank, B, C = self.x_proj(x).split([self.rank, self.state, self.state], -1)
        return selective_scan(
            x,
            F.linear(rank, self.dt_proj.weight),
            -self.A_log.float().exp(),
            B,
            C,
            self.D.float(),
            z=gate,
            delta_bias=self.dt_proj.bias.float(),
            delta_softplus=True,
            backend=self.backend,
        )


def rank_of(dim: int) -> int:
    """Return the usual rank of the steps' projection in a block of width `dim`: a sixteenth, rounded up."""
    return math.ceil(dim / 16)
