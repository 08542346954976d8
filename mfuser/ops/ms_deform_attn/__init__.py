"""Multi-scale deformable attention: one differentiable operator, `mfuser::ms_deform_attn`, with several backends.

A backend's module has `forward` and `backward` with the signatures of `reference.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor

from mfuser.ops.dispatch import resolve, running, watched
from mfuser.ops.inputs import check_types, constant


def ms_deform_attn(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Sum values sampled bilinearly at a few points of each scale (Zhu et al. 2021, eq. 3); zero outside a map.

    A location that is infinite or NaN counts as outside: its point adds nothing and has no gradient.

    Args:
        value: (B, sum of H W, M, D), the scales' cells one after the other, row by row.
        shapes: (H, W) of each scale.
        locations: (B, Q, M, S, P, 2) as (x, y), 0..1 from edge to edge of a map. Of any type, but preferably fp32: they are
            converted to fp32 at least, and 16 bits are too coarse for the cells of a large map.
        weights: (B, Q, M, S, P).
        backend: "auto" or a name from `available("ms_deform_attn")`; a named backend runs or raises.
    Returns: (B, Q, M * D) in value's dtype; sums are accumulated in fp32 (fp64 for fp64 inputs).
    Raises:
        TypeError: a tensor that is not fp32, bf16, fp16 or fp64, or a side of a map that is no integer.
        ValueError: shapes that do not fit, or tensors on several devices.
        BackendError: no backend, or not the named one, can take these tensors (the reason is in the message).
    """
    flat = _check(value, shapes, locations, weights)
    chosen = resolve("ms_deform_attn", backend, value, locations, weights).name
    if 0 in (value.shape[0], value.shape[3], weights.numel()):
        nothing = value.new_zeros(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])
        return constant(nothing, value, locations, weights)
    out: Tensor
    if watched():
        out = _attend(value, flat, locations, weights, chosen)
    elif torch.is_grad_enabled() and (value.requires_grad or locations.requires_grad or weights.requires_grad):
        out = _Eager.apply(flat, chosen, value, locations, weights)
    else:
        out = running("ms_deform_attn", chosen).forward(value, flat, locations, weights)
    return out


def _check(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> list[int]:
    """Return the maps' sides one after the other, [H_0, W_0, H_1, ...]."""
    check_types("ms_deform_attn", ("value", "locations", "weights"), (value, locations, weights))
    flat = [index(side) for shape in shapes for side in shape]
    if not flat or min(flat) < 1 or any(len(shape) != 2 for shape in shapes):
        raise ValueError(f"ms_deform_attn: shapes are {list(shapes)}, expected one (H, W) or more, none of them empty")
    cells = sum(height * width for height, width in zip(flat[::2], flat[1::2], strict=True))
    if value.dim() != 4 or value.shape[1] != cells:
        raise ValueError(f"ms_deform_attn: value is {tuple(value.shape)}, expected (B, {cells}, M, D) for {list(shapes)}")
    points = locations.shape[1:5:3] if locations.dim() == 6 else ("Q", "P")
    expected = (value.shape[0], points[0], value.shape[2], len(shapes), points[1], 2)
    if locations.shape != expected:
        raise ValueError(f"ms_deform_attn: locations are {tuple(locations.shape)}, expected {expected}")
    if weights.shape != expected[:-1]:
        raise ValueError(f"ms_deform_attn: weights are {tuple(weights.shape)}, expected {expected[:-1]}")
    return flat


@torch.library.custom_op("mfuser::ms_deform_attn", mutates_args=())
def _attend(value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor, backend: str) -> Tensor:
    out: Tensor = running("ms_deform_attn", backend).forward(value, shapes, locations, weights)
    return out


@_attend.register_fake
def _(value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor, backend: str) -> Tensor:
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


@torch.library.custom_op("mfuser::ms_deform_attn_bwd", mutates_args=())
def _attend_bwd(
    dout: Tensor, value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = running("ms_deform_attn", backend)
    inputs = (value, locations, weights)
    grads = kernel.backward(dout, value, shapes, locations, weights)
    return tuple(_like(g, t) for g, t in zip(grads, inputs, strict=True))  # type: ignore[return-value]


def _like(gradient: Tensor, tensor: Tensor) -> Tensor:
    """Return `gradient` in the type and layout that the fake kernel promises; a copy only if it has another."""
    if gradient.dtype == tensor.dtype and gradient.stride() == torch.empty_like(tensor, device="meta").stride():
        return gradient
    return torch.empty_like(tensor).copy_(gradient)


@_attend_bwd.register_fake
def _(
    dout: Tensor, value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(value), torch.empty_like(locations), torch.empty_like(weights)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.shapes, locations, weights, ctx.backend = inputs
    ctx.save_for_backward(value, locations, weights)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    value, locations, weights = ctx.saved_tensors
    dvalue, dlocations, dweights = _attend_bwd(dout, value, ctx.shapes, locations, weights, ctx.backend)
    return dvalue, None, dlocations, dweights, None


_attend.register_autograd(_backward, setup_context=_setup)


class _Eager(torch.autograd.Function):
    """The operator without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, shapes: list[int], backend: str, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        out: Tensor = running("ms_deform_attn", backend).forward(value, shapes, locations, weights)
        ctx.shapes, ctx.backend = shapes, backend
        ctx.save_for_backward(value, locations, weights)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        value, locations, weights = ctx.saved_tensors
        # the operator also says that it has no second derivative
        if watched() or torch.is_grad_enabled():
            return None, None, *_attend_bwd(dout, value, ctx.shapes, locations, weights, ctx.backend)
        return None, None, *running("ms_deform_attn", ctx.backend).backward(dout, value, ctx.shapes, locations, weights)
