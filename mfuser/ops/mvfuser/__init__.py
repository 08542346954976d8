"""MVFuser's block between two additions: one differentiable operator, `mfuser::mvfuser`.

It is what `mfuser.fusion.MVFuser` composes of modules, as matrix products, the selective scan and a few kernels for all
that lies between. The modules' own composition is what runs under the names without kernels, and the truth for the others.

A backend's module has
    forward(joint, weights, eps, double_bias, double_gate, dtype, scan, keep) -> [output, *what its backward takes as `kept`]
    backward(dout, joint, weights, kept, eps, double_bias, double_gate, dtype, scan, needed) -> gradients of joint and weights
    kept(joint, weights, dtype, scan) -> empty tensors of the shapes and types of what `forward` keeps

Precision is the composition's: under autocast, activations between the products have autocast's type; A, D, the steps'
bias, the convolutions' and the norm's weights, the scale and all sums are fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mfuser.ops.dispatch import BackendError, lookup, named, resolve, running, watched
from mfuser.ops.inputs import check_shapes, check_types, constant

KERNELS = ("cuda", "triton")  # the backends that have the kernels

WEIGHTS = ("in_proj", "conv_x", "conv_z", "x_proj", "dt_proj", "dt_bias", "A_log", "D", "norm", "out_proj", "scale")
_NAMES = ("joint", *WEIGHTS)
# whose gradient is a matrix product, left out where nobody wants it
_PRODUCTS = ("joint", "in_proj", "x_proj", "dt_proj", "out_proj")


def plan(requested: str, weight: Tensor, A_log: Tensor) -> tuple[str, str] | None:
    """Return the backends of the block's kernels and of its scan; None where the block's modules run one by one.

    Args:
        requested: "auto" or a backend's name, of both.
        weight: any projection's.

    Raises: BackendError as `resolve` does.
    """
    name = resolve("mvfuser", requested, weight, A_log).name
    if name not in KERNELS:
        return None
    if name == "cuda":
        # the scan is part of the block, which has answered for both
        scan = named("selective_scan", requested)
        if scan in ("auto", name):
            return name, name
        if named("mvfuser", requested) == "auto":
            return None
        raise BackendError(f"no backend for mvfuser: cuda: its scan is cuda, too, not {scan}")
    # u, delta, B, C are still to come: the weight stands for them
    return name, resolve("selective_scan", requested, weight, weight, A_log, weight, weight).name


def mvfuser(
    joint: Tensor,
    in_proj: Tensor,
    conv_x: Tensor,
    conv_z: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm: Tensor,
    out_proj: Tensor,
    scale: Tensor,
    *,
    eps: float,
    double_bias: bool,
    double_gate: bool,
    backends: tuple[str, str],
) -> Tensor:
    """Return the block's output, times its scale, before the dropout (which commutes with the scale).

    Args:
        joint: (B, L, C).    scale: ().
        in_proj: (2 h, C).    conv_x, conv_z: (h, 1, 3).    x_proj: (R + 2 N, h).    dt_proj: (h, R).    dt_bias: (h,).
        A_log: (h, N).    D, norm: (h,).    out_proj: (C, h).    eps: of the norm.
        double_bias, double_gate: as MVFuser's.    backends: from `plan`.
    Returns: (B, L, C) in joint's dtype, or in autocast's where it is on.
    Raises: as `check` does.
    """
    weights = (in_proj, conv_x, conv_z, x_proj, dt_proj, dt_bias, A_log, D, norm, out_proj, scale)
    check(joint, weights)
    dtype = _dtype(joint)
    if joint.numel() == 0:
        return empty(joint, weights)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (joint, *weights))
    options = (eps, double_bias, double_gate, dtype, *backends)
    if watched():
        # as autocast does for a linear layer: the compiler makes it part of what comes before, and no wide one is kept
        return _mvfuser(joint.to(dtype), weights, *options, keep)[0]
    if not keep:
        return _forward(joint, weights, *options, keep)[0]
    out: Tensor = _Eager.apply(options, joint, *weights)
    return out


def check(joint: Tensor, weights: Sequence[Tensor]) -> None:
    """Return what the block asks of its tensors, whoever computes it.

    Raises: TypeError for a tensor that is not fp32, bf16, fp16 or fp64; ValueError for shapes, dtypes or devices that do not fit.
    """
    check_types("mvfuser", _NAMES, (joint, *weights))
    in_proj, _, _, _, dt_proj, _, A_log, *_ = weights
    if joint.dim() != 3 or A_log.dim() != 2 or dt_proj.dim() != 2:
        shapes = [tuple(t.shape) for t in (joint, A_log, dt_proj)]
        raise ValueError("mvfuser needs joint (B, L, C), A_log (h, N) and dt_proj (h, R), got {}, {}, {}".format(*shapes))
    width, (half, state), rank = joint.shape[2], A_log.shape, dt_proj.shape[1]
    taps, row = (half, 1, 3), (half,)
    expected = [
        (2 * half, width),
        taps,
        taps,
        (rank + 2 * state, half),
        (half, rank),
        row,
        (half, state),
        row,
        row,
        (width, half),
        (),
    ]
    check_shapes("mvfuser", WEIGHTS, weights, expected)
    # autocast casts all but fp64
    if joint.dtype is not in_proj.dtype and (joint.dtype is torch.float64 or not _autocast(joint)):
        raise ValueError(f"mvfuser: tokens are {joint.dtype}, weights {in_proj.dtype}")


def empty(joint: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Return the output of no tokens: every gradient is zero."""
    return constant(joint.new_zeros(joint.shape, dtype=_dtype(joint)), joint, *weights)


def _dtype(joint: Tensor) -> torch.dtype:
    """Return the output's type."""
    return torch.get_autocast_dtype(joint.device.type) if _autocast(joint) else joint.dtype


def _autocast(joint: Tensor) -> bool:
    kind = joint.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)  # on shapes alone there is no autocast


def _forward(
    joint: Tensor,
    weights: Sequence[Tensor],
    eps: float,
    double_bias: bool,
    double_gate: bool,
    dtype: torch.dtype,
    backend: str,
    scan: str,
    keep: bool,
) -> list[Tensor]:
    """Return the output and, where a backward will follow, what it takes as `kept`."""
    kernels, _ = running("mvfuser", backend), running("selective_scan", scan)
    results: list[Tensor] = kernels.forward(joint, weights, eps, double_bias, double_gate, dtype, scan, keep)
    return results


_mvfuser = torch.library.custom_op("mfuser::mvfuser", _forward, mutates_args=())


@_mvfuser.register_fake
def _(
    joint: Tensor,
    weights: Sequence[Tensor],
    eps: float,
    double_bias: bool,
    double_gate: bool,
    dtype: torch.dtype,
    backend: str,
    scan: str,
    keep: bool,
) -> list[Tensor]:
    out = joint.new_empty(joint.shape, dtype=dtype)
    return [out, *lookup("mvfuser", backend).load().kept(joint, weights, dtype, scan)] if keep else [out]


def _backward(
    dout: Tensor,
    joint: Tensor,
    weights: Sequence[Tensor],
    kept: Sequence[Tensor],
    eps: float,
    double_bias: bool,
    double_gate: bool,
    dtype: torch.dtype,
    backend: str,
    scan: str,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Return the gradients of joint and weights; that of a product which is not `needed` is empty."""
    kernels, _ = running("mvfuser", backend), running("selective_scan", scan)
    grads: list[Tensor] = kernels.backward(dout, joint, weights, kept, eps, double_bias, double_gate, dtype, scan, needed)
    return grads


_mvfuser_bwd = torch.library.custom_op("mfuser::mvfuser_bwd", _backward, mutates_args=())


@_mvfuser_bwd.register_fake
def _(
    dout: Tensor,
    joint: Tensor,
    weights: Sequence[Tensor],
    kept: Sequence[Tensor],
    eps: float,
    double_bias: bool,
    double_gate: bool,
    dtype: torch.dtype,
    backend: str,
    scan: str,
    needed: Sequence[bool],
) -> list[Tensor]:
    given = zip(_NAMES, (joint, *weights), needed, strict=True)
    return [t.new_empty(0 if name in _PRODUCTS and not take else t.shape) for name, t, take in given]


def _keep(ctx: Any, joint: Tensor, weights: Sequence[Tensor], options: tuple[Any, ...], results: list[Tensor]) -> None:
    ctx.options = options
    ctx.save_for_backward(joint, *weights, *results[1:])
    # the gradients of what is kept would be tensors of zeros as large as it
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor | None, needed: list[bool]) -> list[Tensor | None]:
    """Of joint and the weights."""
    if dout is None:
        return [None] * len(needed)
    joint, *rest = ctx.saved_tensors
    # the operator also says that it has no second derivative
    compute: Callable[..., list[Tensor]] = _mvfuser_bwd if watched() or torch.is_grad_enabled() else _backward
    grads = compute(dout, joint, rest[: len(WEIGHTS)], rest[len(WEIGHTS) :], *ctx.options, needed)
    return [grad if take else None for grad, take in zip(grads, needed, strict=True)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    joint, weights, *options, _ = inputs
    _keep(ctx, joint, weights, tuple(options), output)


def _autograd(ctx: Any, dresults: list[Tensor | None]) -> tuple[Any, ...]:
    joint, weights, *options = ctx.needs_input_grad  # False for each option
    djoint, *dweights = _gradients(ctx, dresults[0], [joint, *weights])
    return djoint, dweights, *(None for _ in options)


_mvfuser.register_autograd(_autograd, setup_context=_setup)


class _Eager(torch.autograd.Function):
    """The operator without the dispatcher, which takes longer than a small batch's launches."""

    @staticmethod
    def forward(ctx: Any, options: tuple[Any, ...], joint: Tensor, *weights: Tensor) -> Tensor:
        results = _forward(joint, weights, *(*options, True))
        _keep(ctx, joint, weights, options, results)
        return results[0]

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *_gradients(ctx, dout, list(ctx.needs_input_grad[1:]))
