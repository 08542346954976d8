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
from mfuser.ops.inputs import check_shapes, check_types, constant


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = ...,
    *,
    z: Tensor | None = ...,
    delta_bias: Tensor | None = ...,
    delta_softplus: bool = ...,
    initial_state: Tensor | None = ...,
    return_final_state: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = ...,
    *,
    z: Tensor | None = ...,
    delta_bias: Tensor | None = ...,
    delta_softplus: bool = ...,
    initial_state: Tensor | None = ...,
    return_final_state: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


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
    """Compute an input-dependent linear recurrence along L (S6; Gu & Dao 2023, Alg. 2).

        h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t],    y[t] = (C[t] h[t] + D u[t]) silu(z[t])

    Args:
        u, delta, z: (B, L, D); without z there is no gate.
        A: (D, N), real, negative.    B, C: (B, L, N).    D: (D,).
        delta_bias: (D,), added to delta before the softplus.
        delta_softplus: delta becomes softplus(delta + bias); else it must be positive already.
        initial_state: h before the first step, (B, D, N); zero if absent.
        return_final_state: also return h after the last step.
        backend: "auto" or a name from `available("selective_scan")`; a named backend runs or raises.
    Returns: y (B, L, D) in u's dtype; the final state is (B, D, N) in fp32, in which the state is kept (fp64 for fp64). Of an
        empty batch or sequence y is empty, the final state a copy of the first one, and every other gradient zero.
    Raises:
        TypeError: a tensor that is not fp32, bf16, fp16 or fp64.
        ValueError: shapes that do not fit, or tensors on several devices.
        BackendError: no backend, or not the named one, can take these tensors (the reason is in the message).
    """
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    _check(*tensors)
    chosen = resolve("selective_scan", backend, *tensors).name
    if u.numel() == 0:
        return _empty(*tensors) if return_final_state else _empty(*tensors)[0]
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


_NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def _check(u: Tensor, *rest: Tensor | None) -> None:
    check_types("selective_scan", _NAMES, (u, *rest))
    A = rest[1]
    assert A is not None
    if u.dim() != 3 or A.dim() != 2 or A.shape[1] == 0:
        shapes = f"{tuple(u.shape)} and {tuple(A.shape)}"
        raise ValueError(f"selective_scan needs u (B, L, D) and A (D, N) with a state at least, got {shapes}")
    batch, length, dim = u.shape
    state = A.shape[1]
    tokens, states, channels = (batch, length, dim), (batch, length, state), (dim,)
    expected = (tokens, tokens, (dim, state), states, states, channels, tokens, channels, (batch, dim, state))
    check_shapes("selective_scan", _NAMES, (u, *rest), expected)


def _empty(u: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the results for no tokens."""
    A, initial = rest[1], rest[-1]
    assert A is not None
    y = constant(torch.zeros_like(u), u, *rest)
    precise = _precise(u)
    state = u.new_zeros(u.shape[0], *A.shape, dtype=precise) if initial is None else initial.to(precise, copy=True)
    return y, constant(state, u, *rest)


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
    # a gradient of the saved tensor would be zeros of the same size
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, dstate: Tensor | None) -> list[Tensor | None]:
    """Return the gradients of the nine tensors."""
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
