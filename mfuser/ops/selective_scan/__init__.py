"""Selective scan: one differentiable operator, `mfuser::selective_scan`, whatever backend computes it.

Inputs are checked here and the backend is resolved here, once per call; its name travels with the operator, so that a
compiler sees one node and the backward runs where the forward ran. A backend's module has `forward`, `backward` and
`saved_shape` with the signatures of `reference.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mfuser.ops.dispatch import lookup, resolve


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Input-dependent linear recurrence along L (S6; Gu & Dao 2023, Alg. 2).

        h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t],    y[t] = C[t] h[t] + D u[t]

    Args:
        u, delta: (B, D, L).    A: (D, N), real, negative.    B, C: (B, N, L).    D: (D,).
        delta_bias: (D,), added to delta before the softplus.
        delta_softplus: delta becomes softplus(delta + bias); else it must be positive already.
        backend: "auto" or a name from `available("selective_scan")`; a named backend runs or raises.
    Returns: (B, D, L) in u's dtype; the state is accumulated in fp32 (fp64 for fp64 inputs).
    Raises:
        ValueError: shapes that do not fit.
        BackendError: no backend, or not the named one, can take these tensors (the reason is in the message).
    """
    batch, dim, length = _checked(u, delta, A, B, C, D, delta_bias)
    if length == 0 or batch == 0 or dim == 0:
        return torch.zeros_like(u)
    chosen = resolve("selective_scan", backend, u, delta, A, B, C).name
    y: Tensor = _scan(u, delta, A, B, C, D, delta_bias, delta_softplus, chosen)[0]
    return y


def flops(batch: int, dim: int, length: int, state: int) -> int:
    """Multiply-adds of one forward: decay, inflow, recurrence and readout per state, plus the skip per channel."""
    return batch * length * dim * (4 * state + 1)


def _checked(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, bias: Tensor | None
) -> tuple[int, int, int]:
    if u.dim() != 3 or A.dim() != 2:
        raise ValueError(f"selective_scan needs u (B, D, L) and A (D, N), got {tuple(u.shape)} and {tuple(A.shape)}")
    batch, dim, length = u.shape
    state = A.shape[1]
    expected = {
        "delta": (delta, (batch, dim, length)),
        "A": (A, (dim, state)),
        "B": (B, (batch, state, length)),
        "C": (C, (batch, state, length)),
        "D": (D, (dim,)),
        "delta_bias": (bias, (dim,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"selective_scan: {name} is {tuple(tensor.shape)}, expected {shape}")
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"selective_scan: {name} must be real and floating point, got {tensor.dtype}")
    return batch, dim, length


@torch.library.custom_op("mfuser::selective_scan", mutates_args=())
def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    y, saved = lookup("selective_scan", backend).load().forward(u, delta, A, B, C, D, delta_bias, delta_softplus)
    return y, saved


@_scan.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = lookup("selective_scan", backend).load().saved_shape(u, A)
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    return torch.empty_like(u), u.new_empty(shape, dtype=dtype)


@torch.library.custom_op("mfuser::selective_scan_bwd", mutates_args=())
def _scan_bwd(
    dy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    saved: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    kernel = lookup("selective_scan", backend).load()
    grads = kernel.backward(dy, u, delta, A, B, C, D, delta_bias, delta_softplus, saved)
    inputs = (u, delta, A, B, C, D, delta_bias)
    results = []
    for grad, tensor in zip(grads, inputs, strict=True):
        # an operator returns tensors only: an absent input's gradient is an empty one
        result = u.new_empty(0) if tensor is None else torch.empty_like(tensor)
        results.append(result if tensor is None else result.copy_(grad))
    return tuple(results)  # type: ignore[return-value]


@_scan_bwd.register_fake
def _(
    dy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    saved: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (u, delta, A, B, C, D, delta_bias)
    return tuple(u.new_empty(0) if t is None else torch.empty_like(t) for t in inputs)  # type: ignore[return-value]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    u, delta, A, B, C, D, delta_bias, ctx.softplus, ctx.backend = inputs
    ctx.save_for_backward(u, delta, A, B, C, D, delta_bias, output[1])


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    u, delta, A, B, C, D, delta_bias, saved = ctx.saved_tensors
    grads = _scan_bwd(dy, u, delta, A, B, C, D, delta_bias, ctx.softplus, saved, ctx.backend)
    present = [None if t is None else g for g, t in zip(grads, (u, delta, A, B, C, D, delta_bias), strict=True)]
    return *present, None, None


_scan.register_autograd(_backward, setup_context=_setup)
