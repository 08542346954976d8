"""The selective scan as a loop over time, with its backward written out: the truth that other backends are tested by.

    delta = softplus(delta_raw + bias)  (both optional)
    h[t] = exp(delta[t] A) h[t-1] + delta[t] u[t] B[t],    y[t] = C[t] h[t] + D u[t]      (Gu & Dao 2023, Alg. 2)

Backward, with g[t] = dL/dh[t]:
    g[t] = C[t] dy[t] + exp(delta[t+1] A) g[t+1]
    dB[t] = sum_D g[t] delta[t] u[t]        dC[t] = sum_D dy[t] h[t]        dA = sum_t g[t] h[t-1] exp(delta[t] A) delta[t]
    ddelta[t] = sum_N g[t] (u[t] B[t] + h[t-1] exp(delta[t] A) A)           du[t] = sum_N g[t] delta[t] B[t] + D dy[t]
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def saved_shape(u: Tensor, A: Tensor) -> tuple[int, ...]:
    """Shape of what `forward` keeps for `backward` besides the inputs: nothing."""
    return (0,)


def forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, bias: Tensor | None, softplus: bool
) -> tuple[Tensor, Tensor]:
    """Return y (B, D, L) in u's dtype and an empty tensor. Shapes as in `selective_scan`; computes in fp32 or fp64."""
    precise = torch.float64 if u.dtype == torch.float64 else torch.float32
    step = _step(delta.to(precise), bias, softplus)
    x, A, B, C = (tensor.to(precise) for tensor in (u, A, B, C))
    h = x.new_zeros(u.shape[0], u.shape[1], A.shape[1])  # (B, D, N)
    y = torch.empty_like(x)
    for t in range(u.shape[2]):
        h = torch.exp(step[:, :, t, None] * A) * h + (step[:, :, t] * x[:, :, t])[..., None] * B[:, None, :, t]
        y[:, :, t] = (h * C[:, None, :, t]).sum(-1)
    if D is not None:
        y = y + D.to(precise)[:, None] * x
    out = torch.empty_like(u)
    out.copy_(y)
    return out, x.new_empty(saved_shape(u, A))


def backward(
    dy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
    saved: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of (u, delta, A, B, C, D, bias) in fp32 or fp64; those of absent inputs are None."""
    precise = torch.float64 if u.dtype == torch.float64 else torch.float32
    step = _step(delta.to(precise), bias, softplus)
    dy, x, A, B, C = (tensor.to(precise) for tensor in (dy, u, A, B, C))
    batch, dim, length = u.shape
    states = [x.new_zeros(batch, dim, A.shape[1])]  # states[t] is h[t-1]
    for t in range(length):
        decay = torch.exp(step[:, :, t, None] * A)
        states.append(decay * states[-1] + (step[:, :, t] * x[:, :, t])[..., None] * B[:, None, :, t])

    du, dstep, dA, dB, dC = (torch.zeros_like(tensor) for tensor in (x, step, A, B, C))
    g = torch.zeros_like(states[0])  # exp(delta[t+1] A) g[t+1]
    for t in reversed(range(length)):
        s, v, b = step[:, :, t, None], x[:, :, t, None], B[:, None, :, t]  # (B, D, 1), (B, D, 1), (B, 1, N)
        decay = torch.exp(s * A)
        g = g + C[:, None, :, t] * dy[:, :, t, None]
        dC[:, :, t] = (dy[:, :, t, None] * states[t + 1]).sum(1)
        dB[:, :, t] = (g * s * v).sum(1)
        du[:, :, t] = (g * s * b).sum(-1)
        dstep[:, :, t] = (g * (v * b + states[t] * decay * A)).sum(-1)
        dA += (g * states[t] * decay * s).sum(0)
        g = decay * g

    dD = None
    if D is not None:
        du = du + D.to(precise)[:, None] * dy
        dD = (dy * x).sum((0, 2))
    # softplus'(z) = sigmoid(z) = 1 - exp(-softplus(z))
    ddelta = dstep * -torch.expm1(-step) if softplus else dstep
    return du, ddelta, dA, dB, dC, dD, None if bias is None else ddelta.sum((0, 2))


def _step(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    if bias is not None:
        delta = delta + bias.to(delta.dtype)[:, None]
    return F.softplus(delta) if softplus else delta
