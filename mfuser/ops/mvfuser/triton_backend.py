"""MVFuser's block of torch's matrix products, a scan of any backend, and elementwise kernels in Triton between them.

h is half the width, M = B L; every function from `prepare` to `finish` makes one launch. Their kernels are in
`triton_kernels_backend`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from mfuser.ops.dispatch import lookup, mismatch
from mfuser.ops.mvfuser.triton_kernels_backend import (
    _cast,
    _conv_backward,
    _conv_forward,
    _join,
    _norm_backward,
    _norm_forward,
    _sum,
)

_CAST = {"BLOCK": 2048, "num_warps": 4}
_JOIN = {"TOKENS": 64, "num_warps": 4}
_CONV_FORWARD = {"TOKENS": 16, "CHANNELS": 128, "num_warps": 4}
_CONV_BACKWARD = {"TOKENS": 16, "CHANNELS": 64, "REPEAT": 4, "num_warps": 4}
_NORM_FORWARD = {"TOKENS": 2, "num_warps": 4}
_NORM_BACKWARD = {"num_warps": 4}
_NORM_BLOCKS = 528  # of the norm's backward: four for each multiprocessor of an H100
_SUM = {"ROWS": 32, "COLUMNS": 32, "num_warps": 4}


def refuse(*tensors: Tensor | None) -> str | None:
    """Say why the kernels cannot take the parameters; without any, why they cannot run at all."""
    # interpreted (TRITON_INTERPRET=1), they run on a CPU, too
    return mismatch(tensors, "cuda") if isinstance(_cast, triton.JITFunction) else mismatch(tensors, "cuda", "cpu")


def forward(
    joint: Tensor,
    weights: Sequence[Tensor],
    eps: float,
    double_bias: bool,
    double_gate: bool,
    dtype: torch.dtype,
    scan: str,
    keep: bool,
) -> list[Tensor]:
    """Return the output and, if `keep`, what `backward` takes as `kept`."""
    scanner = lookup("selective_scan", scan).load()
    in_proj, conv_x, conv_z, x_proj, dt_proj, dt_bias, A_log, D, norm, out_proj, scale = weights
    (batch, length, width), half, rank = joint.shape, D.shape[0], dt_proj.shape[1]
    given = [
        (t if t.dtype == dtype else t.float()).contiguous()
        for t in (joint.reshape(-1, width), in_proj, x_proj, dt_proj, out_proj)
    ]
    conv_x, conv_z, dt_bias, A_log, D, norm, scale = map(_fp32, (conv_x, conv_z, dt_bias, A_log, D, norm, scale))
    # the linear layer adds its bias, and the scan adds it again; here the scan adds both
    tokens, (w_in, w_x, w_dt, w_out), A, bias = prepare(given[0], given[1:], A_log, dt_bias, 1.0 + double_bias, dtype)
    xz = _product(tokens, w_in.t(), dtype).view(batch, length, 2 * half)
    x, z = conv_forward(xz, conv_x, conv_z, double_gate)
    joined = _product(x.view(-1, half), w_x.t(), dtype)  # (M, R + 2 N)
    delta = _product(joined[:, :rank], w_dt.t(), dtype).view(batch, length, half)
    B, C = joined.view(batch, length, -1)[..., rank:].chunk(2, -1)
    y, _, saved = scanner.forward(x, delta, A, B, C, D, None, bias, None, True, keep)
    out = _product(norm_forward(y, z, norm, scale, eps), w_out.t(), dtype).view(joint.shape)
    if not keep:
        return [out]
    # an operator returns no tensor that it was given: an empty one says that the backward has it already
    changed = [c if c.dtype != g.dtype else c.new_empty(0) for c, g in zip((tokens, w_in, w_x, w_dt, w_out), given, strict=True)]
    return [out, xz, x, z, joined, delta, y, A, bias, saved, *changed]


def kept(joint: Tensor, weights: Sequence[Tensor], dtype: torch.dtype, scan: str) -> list[Tensor]:
    """Return empty tensors of the shapes and types of what `forward` keeps."""
    in_proj, _, _, x_proj, dt_proj, _, A_log, _, _, out_proj, _ = weights
    (batch, length, width), half = joint.shape, A_log.shape[0]

    def made(*shape: int) -> Tensor:
        return joint.new_empty(shape, dtype=dtype)

    x, A = made(batch, length, half), torch.empty_like(A_log, dtype=torch.float32)
    saved = A.new_empty(lookup("selective_scan", scan).load().saved_shape(x, A))
    given = (joint.reshape(-1, width), in_proj, x_proj, dt_proj, out_proj)
    changed = [made(*g.shape) if g.dtype != dtype else made(0) for g in given]
    z, delta, y = (torch.empty_like(x) for _ in range(3))
    xz, joined = made(batch, length, 2 * half), made(batch * length, x_proj.shape[0])
    return [xz, x, z, joined, delta, y, A, A.new_empty(half), saved, *changed]


def backward(
    dout: Tensor,
    joint: Tensor,
    weights: Sequence[Tensor],
    kept: Sequence[Tensor],
    eps: float,
    double_bias: bool,
    double_gate: bool,
    dtype: torch.dtype,
    scan: str,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Return the gradients of joint and weights; that of a product which is not `needed` is empty."""
    scanner = lookup("selective_scan", scan).load()
    in_proj, conv_x, conv_z, x_proj, dt_proj, _, _, D, norm, out_proj, scale = weights
    xz, x, z, joined, delta, y, A, bias, saved, *changed = kept
    (batch, length, width), half, rank = joint.shape, D.shape[0], dt_proj.shape[1]
    given = (joint.reshape(-1, width), in_proj, x_proj, dt_proj, out_proj)
    tokens, w_in, w_x, w_dt, w_out = (c if c.numel() else g for c, g in zip(changed, given, strict=True))
    conv_x, conv_z, D, norm, scale = map(_fp32, (conv_x, conv_z, D, norm, scale))
    take_joint, take_in, _, _, take_x, take_dt, _, _, _, _, take_out, _ = needed

    def product(take: bool, dresult: Tensor, factor: Tensor) -> Tensor:
        return _product(dresult.t(), factor, in_proj.dtype) if take else in_proj.new_empty(0)

    dout = _flat(dout, dtype)
    dy, dz, g, norm_sums = norm_backward(_product(dout, w_out, dtype), y, z, norm, scale, eps)
    dout_proj = product(take_out, dout, g)
    B, C = joined.view(batch, length, -1)[..., rank:].chunk(2, -1)
    du, ddelta, dA, dB, dC, dD, _, dbias, _ = scanner.backward(dy, None, x, delta, A, B, C, D, None, bias, None, True, saved)
    ddelta, djoined = _flat(ddelta, dtype), torch.empty_like(joined)
    torch.mm(ddelta, w_dt, out=djoined[:, :rank])
    join(dB.contiguous(), dC.contiguous(), djoined[:, rank:])
    ddt_proj = product(take_dt, ddelta, joined[:, :rank])
    dx_proj = product(take_x, djoined, x.view(-1, half))
    dx = _product(djoined, w_x, dtype)
    dxz, conv_sums = conv_backward(xz, conv_x, conv_z, _flat(du, dtype), dx, dz, double_gate)
    dxz = dxz.view(-1, 2 * half)
    din_proj = product(take_in, dxz, tokens)
    djoint = _product(dxz, w_in, joint.dtype).view(joint.shape) if take_joint else joint.new_empty(0)
    dconv_x, dconv_z, dnorm, dscale, dA_log, ddt_bias = finish(
        conv_sums, norm_sums, dA.contiguous(), A, dbias.contiguous(), 1.0 + double_bias
    )
    grads = (din_proj, dconv_x, dconv_z, dx_proj, ddt_proj, ddt_bias, dA_log, dD, dnorm, dout_proj, dscale)
    return [djoint, *(grad.to(weight.dtype) for grad, weight in zip(grads, weights, strict=True))]


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a @ b in `dtype`. With `out`, autocast leaves the product alone."""
    if a.dtype != dtype and a.is_cuda and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1])).to(dtype)


def _flat(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, L, D) -> (M, D), contiguous."""
    return tensor.to(dtype).contiguous().view(-1, tensor.shape[-1])


def _fp32(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous()


def prepare(
    tokens: Tensor, weights: Sequence[Tensor], A_log: Tensor, bias: Tensor, times: float, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """Return tokens and weights in `dtype` (themselves if they are), A = -exp(A_log) and times * bias in fp32."""
    given = [t for t in (tokens, *weights) if t.dtype != dtype]
    changed = [torch.empty_like(t, dtype=dtype) for t in given]
    A, steps = (torch.empty_like(t, dtype=torch.float32) for t in (A_log, bias))
    sources, targets = (*given, A_log, bias), (*changed, A, steps)
    sizes = tuple(t.numel() for t in sources)
    factors = (*(1.0 for _ in given), -1.0, times)
    blocks = sum(triton.cdiv(size, _CAST["BLOCK"]) for size in sizes)
    _launch(_cast, (blocks,), sources, targets, sizes, factors, len(given), **_CAST)
    cast = iter(changed)
    ready = [t if t.dtype == dtype else next(cast) for t in (tokens, *weights)]
    return ready[0], ready[1:], A, steps


def join(first: Tensor, second: Tensor, out: Tensor) -> None:
    """Write two (B, L, N) into out (M, 2 N), whose rows may be part of longer ones."""
    tokens, size = out.shape[0], first.shape[2]
    grid = (triton.cdiv(tokens, _JOIN["TOKENS"]),)
    width = triton.next_power_of_2(size)
    _launch(_join, grid, first, second, out, tokens, size, out.stride(0), WIDTH=width, **_JOIN)


def _aligned(xz: Tensor) -> Tensor:
    """xz, copied if its rows do not begin on 16 bytes: Triton would compile another kernel, which adds in another order."""
    begins = (xz.data_ptr(), *(stride * xz.element_size() for stride in xz.stride()[:2]))
    odd = any(begin % 16 for begin in begins) and (not xz.is_contiguous() or begins[0] % 16)
    return xz.clone(memory_format=torch.contiguous_format) if odd else xz


def conv_forward(xz: Tensor, wx: Tensor, wz: Tensor, gate: bool) -> tuple[Tensor, Tensor]:
    """xz (B, L, 2 h), w (h, 1, 3) in fp32 -> x = silu(conv(xz's first half)), z = conv(the other), with SiLU if `gate`."""
    xz = _aligned(xz)
    batch, length, _ = xz.shape
    half = wx.shape[0]
    x, z = (xz.new_empty(batch, length, half) for _ in range(2))
    chunks = triton.cdiv(length, _CONV_FORWARD["TOKENS"])
    grid = (batch * chunks, triton.cdiv(half, _CONV_FORWARD["CHANNELS"]), 2)
    _launch(
        _conv_forward,
        grid,
        xz,
        wx,
        wz,
        x,
        z,
        *xz.stride()[:2],
        length,
        half,
        chunks,
        GATE=gate,
        **_CONV_FORWARD,
    )
    return x, z


def conv_backward(xz: Tensor, wx: Tensor, wz: Tensor, du: Tensor, dx: Tensor, dz: Tensor, gate: bool) -> tuple[Tensor, Tensor]:
    """Gradients du + dx of x, dz of z -> dxz (B, L, 2 h), and what adds up to the gradients of wx and wz: (rows, 6 h)."""
    xz = _aligned(xz)
    batch, length, channels = xz.shape
    half = wx.shape[0]
    dxz = xz.new_empty(batch, length, channels)
    chunks = triton.cdiv(length, _CONV_BACKWARD["TOKENS"] * _CONV_BACKWARD["REPEAT"])
    partial = torch.empty(batch * chunks, 3 * channels, dtype=torch.float32, device=xz.device)
    grid = (batch * chunks, triton.cdiv(half, _CONV_BACKWARD["CHANNELS"]), 2)
    _launch(
        _conv_backward,
        grid,
        xz,
        wx,
        wz,
        du,
        dx,
        dz,
        dxz,
        partial,
        *xz.stride()[:2],
        length,
        half,
        chunks,
        GATE=gate,
        **_CONV_BACKWARD,
    )
    return dxz, partial


def norm_forward(y: Tensor, z: Tensor, weight: Tensor, scale: Tensor, eps: float) -> Tensor:
    """y, z (B, L, h), weight (h,), scale () in fp32 -> g = scale * y / rms(y) * weight * silu(z) (M, h)."""
    half = y.shape[2]
    g = y.new_empty(y.numel() // half, half)
    grid = (triton.cdiv(g.shape[0], _NORM_FORWARD["TOKENS"]),)
    width = triton.next_power_of_2(half)
    _launch(_norm_forward, grid, y, z, weight, scale, g, g.shape[0], half, eps, WIDTH=width, **_NORM_FORWARD)
    return g


def norm_backward(
    dg: Tensor, y: Tensor, z: Tensor, weight: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the gradient of g / scale: dy, dz (B, L, h), g again, and what adds up to weight's and scale's: (rows, h + 1)."""
    g, dy, dz = torch.empty_like(dg), torch.empty_like(y), torch.empty_like(z)
    tokens, half = dg.shape
    blocks = min(_NORM_BLOCKS, tokens)
    partial = torch.empty(blocks, half + 1, dtype=torch.float32, device=y.device)
    _launch(
        _norm_backward,
        (blocks,),
        dg,
        y,
        z,
        weight,
        scale,
        dy,
        dz,
        g,
        partial,
        tokens,
        half,
        eps,
        WIDTH=triton.next_power_of_2(half),
        **_NORM_BACKWARD,
    )
    return dy, dz, g, partial


def finish(
    conv: Tensor, norm: Tensor, dA: Tensor, A: Tensor, dbias: Tensor, times: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients in fp32 of wx (h, 1, 3), wz, the norm's weight (h,), scale (), A_log (h, N) and bias (h,).

    From the sums of `conv_backward` and `norm_backward` and the scan's gradients of A and of times * bias.
    """
    half = norm.shape[1] - 1
    shapes: tuple[tuple[int, ...], ...] = ((half, 1, 3), (half, 1, 3), (half,), ())
    wx, wz, weight, scale = sums = tuple(conv.new_empty(shape) for shape in shapes)
    columns = tuple(t.numel() for t in sums)
    blocks = sum(triton.cdiv(size, _SUM["COLUMNS"]) for size in columns)
    sources = (conv, conv[:, 3 * half :], norm, norm[:, half:])
    rows = (conv.shape[0], conv.shape[0], norm.shape[0], norm.shape[0])
    strides = (6 * half, 6 * half, half + 1, half + 1)
    _launch(_sum, (blocks,), sources, sums, rows, columns, strides, **_SUM)
    return wx, wz, weight, scale, dA * A, dbias * times


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run `kernel` on the device of the tensors, whichever is current."""
    like = args[0][0] if isinstance(args[0], tuple) else args[0]
    if like.is_cuda and like.device.index != torch.cuda.current_device():
        with torch.cuda.device(like.device):
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)
