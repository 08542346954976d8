"""S6, the layer of Mamba (Gu & Dao 2023, Alg. 2): a diagonal state space whose step, B and C are functions of the token.

    step[t] = softplus(W2 W1 u[t] + bias) (D,)    B[t] = W_B u[t], C[t] = W_C u[t] (N,)
    h[t] = exp(step[t] A) h[t-1] + step[t] B[t] u[t],    y[t] = C[t] h[t] + D u[t]

No convolution computes it, since its coefficients change from token to token: it is a scan. By default that is the operator
`mfuser.ops.selective_scan`; `sequential` is the operator's reference, a loop over tokens, and `parallel` materialises all states
and scans them as a tree.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.ops import selective_scan
from mfuser.ssm.scans import blelloch
from mfuser.ssm.steps import reset_steps

MODES = ("fused", "sequential", "parallel")


class S6(nn.Module):
    """A selective state space over D channels with a skip connection; parameters have the names of mamba_ssm's `Mamba`.

    Args:
        channels: D.    states: N.
        rank: of the step's projection; default: D / 16. mamba_ssm's has a sixteenth of the block's width, half of that.
        backend: of the scan, "auto" or a name.
    """

    def __init__(self, channels: int, states: int = 16, rank: int | None = None, *, backend: str = "auto") -> None:
        super().__init__()
        self.states, self.rank = states, math.ceil(channels / 16) if rank is None else rank
        self.backend, self.mode = backend, "fused"
        self.x_proj = nn.Linear(channels, self.rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(self.rank, channels)
        self.A_log = nn.Parameter(torch.arange(1, states + 1, dtype=torch.float32).log().repeat(channels, 1))
        self.D = nn.Parameter(torch.ones(channels))
        reset_steps(self.dt_proj)

    def selected(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return step before bias and softplus (..., D), B and C (..., N) for tokens (..., D)."""
        low, B, C = self.x_proj(u).split([self.rank, self.states, self.states], -1)
        return F.linear(low, self.dt_proj.weight), B, C

    def forward(self, u: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        delta, B, C = self.selected(u)
        A = -torch.exp(self.A_log.float() if self.A_log.dtype in (torch.bfloat16, torch.float16) else self.A_log)
        if self.mode == "parallel":
            return self._as_a_tree(u, delta, A, B, C)
        backend = "reference" if self.mode == "sequential" else self.backend
        return selective_scan(u, delta, A, B, C, self.D, delta_bias=self.dt_proj.bias, delta_softplus=True, backend=backend)

    def _as_a_tree(self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        step = F.softplus(delta + self.dt_proj.bias)
        decay = torch.exp(step[..., None] * A)  # (B, L, D, N)
        inflow = (step * u)[..., None] * B[:, :, None]
        states = blelloch(decay.transpose(0, 1), inflow.transpose(0, 1)).transpose(0, 1)
        return (states @ C[..., None])[..., 0] + self.D * u

    def first_state(self, batch: int) -> Tensor:
        """Return the state before the first token, (B, D, N)."""
        return self.A_log.new_zeros(batch, *self.A_log.shape)

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Take one token (B, D) and the state before it; return its output and the state after it."""
        delta, B, C = (part.to(state.dtype) for part in self.selected(u))
        step = F.softplus(delta + self.dt_proj.bias)
        state = torch.exp(step[..., None] * -torch.exp(self.A_log)) * state + (step * u)[..., None] * B[:, None]
        return ((state @ C[..., None])[..., 0] + self.D * u).to(u.dtype), state
