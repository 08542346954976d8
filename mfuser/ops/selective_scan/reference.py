"""The selective scan as a loop over time, with its backward written out: the reference for tests of other backends.

    delta = softplus(delta_raw + bias)  (both optional)
    h[t] = exp(delta[t] A) h[t-1] + delta[t] u[t] B[t]                                     (Gu & Dao 2023, Alg. 2)
    y[t] = (C[t] h[t] + D u[t]) silu(z[t])                                                 (D and z optional)

Backward, with dy the gradient of what is gated and g[t] = dL/dh[t]:
    g[t] = C[t] dy[t] + exp(delta[t+1] A) g[t+1]
    dB[t] = sum_D g[t] delta[t] u[t]        dC[t] = sum_D dy[t] h[t]        dA = sum_t g[t] h[t-1] exp(delta[t] A) delta[t]
    ddelta[t] = sum_N g[t] (u[t] B[t] + h[t-1] exp(delta[t] A) A)           du[t] = sum_N g[t] delta[t] B[t] + D dy[t]
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def saved_shape(u: Tensor, A: Tensor) -> tuple[int, ...]:
    """Return the shape of what `forward` stores for `backward`: nothing."""
    return (0,)


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    initial: Tensor | None,
    softplus: bool,
    keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (B, L, D) in u's dtype, the final state (B, D, N) and an empty tensor; computes in fp32 or fp64.

    keep: whether a backward will follow; without it nothing need be kept.
    """
    precise = torch.float64 if u.dtype == torch.float64 else torch.float32
    step = _step(delta.to(precise), bias, softplus)
    x, A, B, C = (tensor.to(precise) for tensor in (u, A, B, C))
    h = x.new_zeros(u.shape[0], *A.shape) if initial is None else initial.to(precise)  # (B, D, N)
    y = torch.empty_like(x)
    for t in range(u.shape[1]):
        h = torch.exp(step[:, t, :, None] * A) * h + (step[:, t] * x[:, t])[..., None] * B[:, t, None]
        y[:, t] = (h * C[:, t, None]).sum(-1)
    if D is not None:
        y = y + D.to(precise) * x
    if z is not None:
        y = y * F.silu(z.to(precise))
    return y.to(u.dtype, memory_format=torch.contiguous_format), h.clone(), x.new_empty(saved_shape(u, A))


def backward(
    dy: Tensor,
    dstate: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    initial: Tensor | None,
    softplus: bool,
    saved: Tensor,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of (u, delta, A, B, C, D, z, bias, initial) in fp32 or fp64; None for absent inputs.

    dy is (B, L, D); dstate, the final state's gradient, is (B, D, N) or absent.
    """
    precise = torch.float64 if u.dtype == torch.float64 else torch.float32
    step = _step(delta.to(precise), bias, softplus)
    dy, x, A, B, C = (tensor.to(precise) for tensor in (dy, u, A, B, C))
    first = x.new_zeros(u.shape[0], *A.shape) if initial is None else initial.to(precise)
    states = [first]  # states[t] is h[t-1], (B, D, N)
    for t in range(u.shape[1]):
        decay = torch.exp(step[:, t, :, None] * A)
        states.append(decay * states[-1] + (step[:, t] * x[:, t])[..., None] * B[:, t, None])

    dz = None
    if z is not None:
        gate, share = z.to(precise), torch.sigmoid(z.to(precise))
        y = torch.stack([(h * C[:, t, None]).sum(-1) for t, h in enumerate(states[1:])], 1)
        y = y if D is None else y + D.to(precise) * x
        dz = dy * y * share * (1 + gate * (1 - share))
        dy = dy * gate * share

    du, dstep, dA, dB, dC = (torch.zeros_like(tensor) for tensor in (x, step, A, B, C))
    g = torch.zeros_like(first) if dstate is None else dstate.to(precise)  # exp(delta[t+1] A) g[t+1]
    for t in reversed(range(u.shape[1])):
        s, v, b = step[:, t, :, None], x[:, t, :, None], B[:, t, None]  # (B, D, 1), (B, D, 1), (B, 1, N)
        decay = torch.exp(s * A)
        g = g + C[:, t, None] * dy[:, t, :, None]
        dC[:, t] = (dy[:, t, :, None] * states[t + 1]).sum(1)
        dB[:, t] = (g * s * v).sum(1)
        du[:, t] = (g * s * b).sum(-1)
        dstep[:, t] = (g * (v * b + states[t] * decay * A)).sum(-1)
        dA += (g * states[t] * decay * s).sum(0)
        g = decay * g

    dD = None
    if D is not None:
        du = du + D.to(precise) * dy
        dD = (dy * x).sum((0, 1))
    # softplus'(z) = sigmoid(z) = 1 - exp(-softplus(z))
    ddelta = dstep * -torch.expm1(-step) if softplus else dstep
    dbias = None if bias is None else ddelta.sum((0, 1))
    return du, ddelta, dA, dB, dC, dD, dz, dbias, None if initial is None else g


def _step(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    if bias is not None:
        delta = delta + bias.to(delta.dtype)
    return F.softplus(delta) if softplus else delta
