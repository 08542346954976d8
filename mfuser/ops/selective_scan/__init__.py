"""Selective scan: one differentiable operator, `mfuser::selective_scan`, whatever backend computes it.

Inputs are checked here and the backend is resolved here, once per call; its name travels with the operator, so that a
compiler sees one node and the backward runs where the forward ran. A backend's module has `forward`, `backward` and
`saved_shape` with the signatures of `reference.py`.

Tokens come before channels, (B, L, D), as every linear layer has them: a GPU reads a token's channels in one piece, and
nothing is transposed on the way in or out (Mamba's own interface is (B, D, L)).
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from mfuser.ops.dispatch import lookup, resolve, running, watched


@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = ..., *, z: Tensor | None = ...,
    delta_bias: Tensor | None = ..., delta_softplus: bool = ..., initial_state: Tensor | None = ...,
    return_final_state: Literal[False] = ..., backend: str = ...,
) -> Tensor: ...  # fmt: skip


@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = ..., *, z: Tensor | None = ...,
    delta_bias: Tensor | None = ..., delta_softplus: bool = ..., initial_state: Tensor | None = ...,
    return_final_state: Literal[True], backend: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Input-dependent linear recurrence along L (S6; Gu & Dao 2023, Alg. 2).

        h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t],    y[t] = (C[t] h[t] + D u[t]) silu(z[t])

    Args:
        u, delta, z: (B, L, D); without z there is no gate.
        A: (D, N), real, negative.    B, C: (B, L, N).    D: (D,).
        delta_bias: (D,), added to delta before the softplus.
        delta_softplus: delta becomes softplus(delta + bias); else it must be positive already.
        initial_state: h before the first step, (B, D, N); zero if absent.
        return_final_state: also return h after the last step.
        backend: "auto" or a name from `available("selective_scan")`; a named backend runs or raises.
    Returns: y (B, L, D) in u's dtype; the final state is (B, D, N) in fp32, in which the state is kept (fp64 for fp64).
    Raises:
        ValueError: shapes that do not fit.
        BackendError: no backend, or not the named one, can take these tensors (the reason is in the message).
    """
    _check(u, delta, A, B, C, D, z, delta_bias, initial_state)
    if u.numel() == 0:
        state = u.new_zeros(u.shape[0], *A.shape, dtype=_precise(u)) if initial_state is None else initial_state.to(_precise(u))
        return (torch.zeros_like(u), state) if return_final_state else torch.zeros_like(u)
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    chosen = resolve("selective_scan", backend, *tensors).name
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if watched():
        y, state, _ = _scan(*tensors, delta_softplus, keep, chosen)
    elif keep:
        y, state = _Eager.apply(delta_softplus, chosen, *tensors)
    else:
        y, state, _ = running("selective_scan", chosen).forward(*tensors, delta_softplus, keep)
    return (y, state) if return_final_state else y


def _precise(u: Tensor) -> torch.dtype:
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def _check(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, bias: Tensor | None,
    initial: Tensor | None,
) -> None:  # fmt: skip
    if u.dim() != 3 or A.dim() != 2:
        raise ValueError(f"selective_scan needs u (B, L, D) and A (D, N), got {tuple(u.shape)} and {tuple(A.shape)}")
    batch, length, dim = u.shape
    state = A.shape[1]
    tokens, states, channels = (batch, length, dim), (batch, length, state), (dim,)
    expected = (
        ("delta", delta, tokens), ("B", B, states), ("C", C, states), ("D", D, channels), ("z", z, tokens),
        ("delta_bias", bias, channels), ("initial_state", initial, (batch, dim, state)),
    )  # fmt: skip
    for name, tensor, shape in expected:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"selective_scan: {name} is {tuple(tensor.shape)}, expected {shape}")
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"selective_scan: {name} must be real and floating point, got {tensor.dtype}")
    if not A.is_floating_point():
        raise ValueError(f"selective_scan: A must be real and floating point, got {A.dtype}")


@torch.library.custom_op("mfuser::selective_scan", mutates_args=())
def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = running("selective_scan", backend)
    y, state, saved = kernel.forward(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, keep)
    return y, state, saved


@_scan.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel, precise = lookup("selective_scan", backend).load(), _precise(u)
    state = u.new_empty(u.shape[0], *A.shape, dtype=precise)
    return u.new_empty(u.shape), state, u.new_empty(kernel.saved_shape(u, A) if keep else (0,), dtype=precise)


@torch.library.custom_op("mfuser::selective_scan_bwd", mutates_args=())
def _scan_bwd(
    dy: Tensor,
    dstate: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    saved: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    kernel = running("selective_scan", backend)
    grads = kernel.backward(dy, dstate, u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, saved)
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    # an operator returns tensors only: an absent input's gradient is an empty one
    results = [
        u.new_empty(0) if t is None else g if g.dtype == t.dtype and g.is_contiguous() else t.new_empty(t.shape).copy_(g)
        for g, t in zip(grads, inputs, strict=True)
    ]
    return tuple(results)  # type: ignore[return-value]


@_scan_bwd.register_fake
def _(
    dy: Tensor,
    dstate: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    saved: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    return tuple(u.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs)  # type: ignore[return-value]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.softplus, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[2])
    # the gradient of what was saved would be a tensor of zeros as large as it
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, dstate: Tensor | None) -> list[Tensor | None]:
    """Of the nine tensors."""
    *tensors, saved = ctx.saved_tensors
    if dy is None:
        if dstate is None:
            return [None] * 9
        dy = torch.zeros_like(tensors[0])
    # the operator also says that it has no second derivative
    if watched() or torch.is_grad_enabled():
        grads = _scan_bwd(dy, dstate, *tensors, ctx.softplus, saved, ctx.backend)
    else:
        grads = running("selective_scan", ctx.backend).backward(dy, dstate, *tensors, ctx.softplus, saved)
    return [None if t is None else g for g, t in zip(grads, tensors, strict=True)]


def _backward(ctx: Any, dy: Tensor | None, dstate: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_gradients(ctx, dy, dstate), None, None, None


_scan.register_autograd(_backward, setup_context=_setup)


class _Eager(torch.autograd.Function):
    """The operator without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, softplus: bool, backend: str, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        y, state, saved = running("selective_scan", backend).forward(*tensors, softplus, True)
        ctx.softplus, ctx.backend = softplus, backend
        ctx.save_for_backward(*tensors, saved)
        ctx.set_materialize_grads(False)
        return y, state

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *_gradients(ctx, dy, dstate)
