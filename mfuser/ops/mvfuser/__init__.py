"""MVFuser's block between two additions: one differentiable operator, `mfuser::mvfuser`.

It is what `mfuser.fusion.MVFuser` composes of modules, as matrix products, the selective scan of a backend and five
kernels for all that lies between (`prepare`, `conv_forward`, `norm_forward` and their backward, see `cuda_backend.py`).
The modules' own composition is what runs under the names without kernels, and the truth for the others.

Precision is the composition's: under autocast, activations between the products have autocast's type; A, D, the steps'
bias, the convolutions' and the norm's weights, the scale and all sums are fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mfuser.ops.dispatch import lookup, resolve, running

KERNELS = ("cuda", "triton")  # the backends that have the kernels

_WEIGHTS = ("in_proj", "conv_x", "conv_z", "x_proj", "dt_proj", "dt_bias", "A_log", "D", "norm", "out_proj", "scale")
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
    # u, delta, B, C are still to come: the weight stands for them
    return name, resolve("selective_scan", requested, weight, weight, A_log, weight, weight).name


def mvfuser(
    joint: Tensor, in_proj: Tensor, conv_x: Tensor, conv_z: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor,
    A_log: Tensor, D: Tensor, norm: Tensor, out_proj: Tensor, scale: Tensor, *, eps: float, sane: bool,
    backends: tuple[str, str],
) -> Tensor:  # fmt: skip
    """The block's output, times its scale, before the dropout (which commutes with the scale).

    Args:
        joint: (B, L, C).    scale: ().
        in_proj: (2 h, C).    conv_x, conv_z: (h, 1, 3).    x_proj: (R + 2 N, h).    dt_proj: (h, R).    dt_bias: (h,).
        A_log: (h, N).    D, norm: (h,).    out_proj: (C, h).    eps: of the norm.
        sane: as MVFuser's.    backends: from `plan`.
    Returns: (B, L, C) in joint's dtype, or in autocast's where it is on.
    Raises: ValueError for shapes or dtypes that do not fit.
    """
    weights = (in_proj, conv_x, conv_z, x_proj, dt_proj, dt_bias, A_log, D, norm, out_proj, scale)
    kind = joint.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else joint.dtype
    _check(joint, weights)
    if joint.numel() == 0:
        return joint.new_empty(joint.shape, dtype=dtype)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (joint, *weights))
    options = (eps, sane, dtype, *backends)
    if _watched():
        return _mvfuser(joint, weights, *options, keep)[0]
    if not keep:
        return _forward(joint, weights, *options, keep)[0]
    out: Tensor = _Eager.apply(options, joint, *weights)
    return out


def flops(batch: int, length: int, width: int, half: int, rank: int, state: int) -> int:
    """Multiply-adds of one forward: four projections, two convolutions and the scan."""
    projections = 2 * half * width + half * (rank + 2 * state) + rank * half + width * half
    return batch * length * (projections + 6 * half + half * (4 * state + 1))


def _check(joint: Tensor, weights: Sequence[Tensor]) -> None:
    in_proj, _, _, _, dt_proj, _, A_log, *_ = weights
    if joint.dim() != 3 or A_log.dim() != 2 or dt_proj.dim() != 2:
        shapes = [tuple(t.shape) for t in (joint, A_log, dt_proj)]
        raise ValueError("mvfuser needs joint (B, L, C), A_log (h, N) and dt_proj (h, R), got {}, {}, {}".format(*shapes))
    width, (half, state), rank = joint.shape[2], A_log.shape, dt_proj.shape[1]
    taps, row = (half, 1, 3), (half,)
    expected = (
        (2 * half, width), taps, taps, (rank + 2 * state, half), (half, rank), row, (half, state), row, row, (width, half), (),
    )  # fmt: skip
    for name, tensor, shape in zip(_WEIGHTS, weights, expected, strict=True):
        if tensor.shape != shape:
            raise ValueError(f"mvfuser: {name} is {tuple(tensor.shape)}, expected {shape}")
    # autocast casts all but fp64
    if joint.dtype != in_proj.dtype and (joint.dtype == torch.float64 or not torch.is_autocast_enabled(joint.device.type)):
        raise ValueError(f"mvfuser: tokens are {joint.dtype}, weights {in_proj.dtype}")


def _forward(
    joint: Tensor, weights: Sequence[Tensor], eps: float, sane: bool, dtype: torch.dtype, backend: str, scan: str, keep: bool
) -> list[Tensor]:
    """Return the output and, where a backward will follow, what it takes as `kept`."""
    kernels, scanner = running("mvfuser", backend), running("selective_scan", scan)
    in_proj, conv_x, conv_z, x_proj, dt_proj, dt_bias, A_log, D, norm, out_proj, scale = weights
    (batch, length, width), half, rank = joint.shape, D.shape[0], dt_proj.shape[1]
    given = [
        (t if t.dtype == dtype else t.float()).contiguous()
        for t in (joint.reshape(-1, width), in_proj, x_proj, dt_proj, out_proj)
    ]
    conv_x, conv_z, dt_bias, A_log, D, norm, scale = map(_fp32, (conv_x, conv_z, dt_bias, A_log, D, norm, scale))
    # the linear layer adds its bias, and the scan adds it again; here the scan adds both
    tokens, (w_in, w_x, w_dt, w_out), A, bias = kernels.prepare(given[0], given[1:], A_log, dt_bias, 2.0 - sane, dtype)
    xz = _product(tokens, w_in.t(), dtype).view(batch, length, 2 * half)
    x, z = kernels.conv_forward(xz, conv_x, conv_z, not sane)
    joined = _product(x.view(-1, half), w_x.t(), dtype)  # (M, R + 2 N)
    delta = _product(joined[:, :rank], w_dt.t(), dtype).view(batch, length, half)
    B, C = joined.view(batch, length, -1)[..., rank:].chunk(2, -1)
    y, _, saved = scanner.forward(x, delta, A, B, C, D, None, bias, None, True, keep)
    out = _product(kernels.norm_forward(y, z, norm, scale, eps), w_out.t(), dtype).view(joint.shape)
    if not keep:
        return [out]
    # an operator returns no tensor that it was given: an empty one says that the backward has it already
    changed = [c if c.dtype != g.dtype else c.new_empty(0) for c, g in zip((tokens, w_in, w_x, w_dt, w_out), given, strict=True)]
    return [out, xz, x, z, joined, delta, y, A, bias, saved, *changed]


_mvfuser = torch.library.custom_op("mfuser::mvfuser", _forward, mutates_args=())


@_mvfuser.register_fake
def _(
    joint: Tensor, weights: Sequence[Tensor], eps: float, sane: bool, dtype: torch.dtype, backend: str, scan: str, keep: bool
) -> list[Tensor]:
    in_proj, _, _, x_proj, dt_proj, _, A_log, _, _, out_proj, _ = weights
    (batch, length, width), half = joint.shape, A_log.shape[0]

    def made(*shape: int) -> Tensor:
        return joint.new_empty(shape, dtype=dtype)

    if not keep:
        return [made(batch, length, width)]
    x, A = made(batch, length, half), torch.empty_like(A_log, dtype=torch.float32)
    saved = A.new_empty(lookup("selective_scan", scan).load().saved_shape(x, A))
    given = (joint.reshape(-1, width), in_proj, x_proj, dt_proj, out_proj)
    changed = [made(*g.shape) if g.dtype != dtype else made(0) for g in given]
    z, delta, y = (torch.empty_like(x) for _ in range(3))
    xz, joined = made(batch, length, 2 * half), made(batch * length, x_proj.shape[0])
    return [made(batch, length, width), xz, x, z, joined, delta, y, A, A.new_empty(half), saved, *changed]


def _backward(
    dout: Tensor, joint: Tensor, weights: Sequence[Tensor], kept: Sequence[Tensor], eps: float, sane: bool,
    dtype: torch.dtype, backend: str, scan: str, needed: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of joint and weights; that of a product which is not `needed` is empty."""
    kernels, scanner = running("mvfuser", backend), running("selective_scan", scan)
    in_proj, conv_x, conv_z, x_proj, dt_proj, _, _, D, norm, out_proj, scale = weights
    xz, x, z, joined, delta, y, A, bias, saved, *changed = kept
    (batch, length, width), half, rank = joint.shape, D.shape[0], dt_proj.shape[1]
    given = (joint.reshape(-1, width), in_proj, x_proj, dt_proj, out_proj)
    tokens, w_in, w_x, w_dt, w_out = (c if c.numel() else g for c, g in zip(changed, given, strict=True))
    conv_x, conv_z, D, norm, scale = map(_fp32, (conv_x, conv_z, D, norm, scale))
    take = dict(zip(("joint", *_WEIGHTS), needed, strict=True))

    def product(name: str, dresult: Tensor, factor: Tensor) -> Tensor:
        return _product(dresult.t(), factor, in_proj.dtype) if take[name] else in_proj.new_empty(0)

    dout = _rows(dout, dtype)
    dy, dz, g, norm_sums = kernels.norm_backward(_product(dout, w_out, dtype), y, z, norm, scale, eps)
    dout_proj = product("out_proj", dout, g)
    B, C = joined.view(batch, length, -1)[..., rank:].chunk(2, -1)
    du, ddelta, dA, dB, dC, dD, _, dbias, _ = scanner.backward(
        dy, None, x, delta, A, B, C, D, None, bias, None, True, saved
    )  # fmt: skip
    ddelta, djoined = _rows(ddelta, dtype), torch.empty_like(joined)
    torch.mm(ddelta, w_dt, out=djoined[:, :rank])
    kernels.join(dB.contiguous(), dC.contiguous(), djoined[:, rank:])
    ddt_proj = product("dt_proj", ddelta, joined[:, :rank])
    dx_proj = product("x_proj", djoined, x.view(-1, half))
    dx = _product(djoined, w_x, dtype)
    dxz, conv_sums = kernels.conv_backward(xz, conv_x, conv_z, _rows(du, dtype), dx, dz, not sane)
    dxz = dxz.view(-1, 2 * half)
    din_proj = product("in_proj", dxz, tokens)
    djoint = _product(dxz, w_in, joint.dtype).view(joint.shape) if take["joint"] else joint.new_empty(0)
    dconv_x, dconv_z, dnorm, dscale, dA_log, ddt_bias = kernels.finish(
        conv_sums, norm_sums, dA.contiguous(), A, dbias.contiguous(), 2.0 - sane
    )
    grads = (din_proj, dconv_x, dconv_z, dx_proj, ddt_proj, ddt_bias, dA_log, dD, dnorm, dout_proj, dscale)
    return [djoint, *(grad.to(weight.dtype) for grad, weight in zip(grads, weights, strict=True))]


_mvfuser_bwd = torch.library.custom_op("mfuser::mvfuser_bwd", _backward, mutates_args=())


@_mvfuser_bwd.register_fake
def _(
    dout: Tensor, joint: Tensor, weights: Sequence[Tensor], kept: Sequence[Tensor], eps: float, sane: bool,
    dtype: torch.dtype, backend: str, scan: str, needed: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    given = zip(("joint", *_WEIGHTS), (joint, *weights), needed, strict=True)
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
    compute: Callable[..., list[Tensor]] = _mvfuser_bwd if _watched() else _backward
    grads = compute(dout, joint, rest[: len(_WEIGHTS)], rest[len(_WEIGHTS) :], *ctx.options, needed)
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


def _watched() -> bool:
    """Whether someone looks at operators: a compiler, or a mode such as one that counts or fakes them."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`. With `out`, autocast leaves the product alone."""
    if a.dtype != dtype and a.is_cuda and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1])).to(dtype)


def _rows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, L, D) -> (M, D), contiguous."""
    return tensor.to(dtype).contiguous().view(-1, tensor.shape[-1])


def _fp32(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous()
