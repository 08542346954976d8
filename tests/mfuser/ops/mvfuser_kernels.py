"""The launchers of cuda/mvfuser_*.cu one by one, which the block's own launcher calls in their order.

h is half the width, M = B L. All tensors are contiguous, but for the rows of xz.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from mfuser.ops import compiled

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FORWARD_TOKENS, _BACKWARD_TOKENS, _NORM_BLOCKS = 32, 64, 264


def prepare(
    tokens: Tensor, weights: Sequence[Tensor], A_log: Tensor, bias: Tensor, times: float, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """Return tokens and weights in `dtype` (themselves if they are), A = -exp(A_log) and times * bias in fp32."""
    pieces = []

    def changed(source: Tensor, dtype: torch.dtype, factor: float = 1.0, exponential: bool = False) -> Tensor:
        target = torch.empty_like(source, dtype=dtype)
        size, types = source.numel(), (_TYPES[source.dtype], _TYPES[dtype])
        pieces.append(_CastPiece(source.data_ptr(), target.data_ptr(), 1, size, 0, 0, 0, factor, *types, exponential))
        return target

    cast = [t if t.dtype == dtype else changed(t, dtype) for t in (tokens, *weights)]
    A, steps = changed(A_log, torch.float32, -1.0, True), changed(bias, torch.float32, times)
    compiled.library().run("mfuser_mvfuser_cast", _Cast(tuple(pieces), len(pieces)), like=tokens)
    return cast[0], cast[1:], A, steps


def join(first: Tensor, second: Tensor, out: Tensor) -> None:
    """Write two (B, L, N) into out (M, 2 N), whose rows may be part of longer ones."""
    (tokens, size), stride, to = (out.shape[0], first.shape[2]), out.stride(0), out.data_ptr()
    types = (_TYPES[first.dtype], _TYPES[out.dtype])
    pieces = (
        _CastPiece(first.data_ptr(), to, tokens, size, size, stride, 0, 1.0, *types, False),
        _CastPiece(second.data_ptr(), to + size * out.element_size(), tokens, size, size, stride, 0, 1.0, *types, False),
    )
    compiled.library().run("mfuser_mvfuser_cast", _Cast(pieces, len(pieces)), like=out)


def conv_forward(xz: Tensor, wx: Tensor, wz: Tensor, gate: bool) -> tuple[Tensor, Tensor]:
    """xz (B, L, 2 h), w (h, 1, 3) in fp32 -> x = silu(conv(xz's first half)), z = conv(the other), with SiLU if `gate`."""
    batch, length, _ = xz.shape
    x, z = (xz.new_empty(batch, length, wx.shape[0]) for _ in range(2))
    params = _Conv(
        xz.data_ptr(),
        wx.data_ptr(),
        wz.data_ptr(),
        x.data_ptr(),
        z.data_ptr(),
        None,
        None,
        None,
        None,
        None,
        *xz.stride()[:2],
        batch,
        length,
        wx.shape[0],
        _FORWARD_TOKENS,
        gate,
        _TYPES[xz.dtype],
    )
    compiled.library().run("mfuser_mvfuser_conv_fwd", params, like=xz)
    return x, z


def conv_backward(xz: Tensor, wx: Tensor, wz: Tensor, du: Tensor, dx: Tensor, dz: Tensor, gate: bool) -> tuple[Tensor, Tensor]:
    """Gradients du + dx of x, dz of z -> dxz (B, L, 2 h), and what adds up to the gradients of wx and wz: (rows, 6 h)."""
    batch, length, channels = xz.shape
    block = _BACKWARD_TOKENS
    dxz = xz.new_empty(batch, length, channels)
    partial = torch.empty(batch * -(-length // block), 3 * channels, dtype=torch.float32, device=xz.device)
    params = _Conv(
        xz.data_ptr(),
        wx.data_ptr(),
        wz.data_ptr(),
        None,
        None,
        du.data_ptr(),
        dx.data_ptr(),
        dz.data_ptr(),
        dxz.data_ptr(),
        partial.data_ptr(),
        *xz.stride()[:2],
        batch,
        length,
        wx.shape[0],
        block,
        gate,
        _TYPES[xz.dtype],
    )
    compiled.library().run("mfuser_mvfuser_conv_bwd", params, like=xz)
    return dxz, partial


def norm_forward(y: Tensor, z: Tensor, weight: Tensor, scale: Tensor, eps: float) -> Tensor:
    """y, z (B, L, h), weight (h,), scale () in fp32 -> g = scale * y / rms(y) * weight * silu(z) (M, h)."""
    half = y.shape[2]
    g = y.new_empty(y.numel() // half, half)
    params = _Norm(
        y.data_ptr(),
        z.data_ptr(),
        weight.data_ptr(),
        scale.data_ptr(),
        g.data_ptr(),
        None,
        None,
        None,
        None,
        g.shape[0],
        half,
        0,
        eps,
        _TYPES[y.dtype],
    )
    compiled.library().run("mfuser_mvfuser_norm_fwd", params, like=y)
    return g


def norm_backward(
    dg: Tensor, y: Tensor, z: Tensor, weight: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the gradient of g / scale: dy, dz (B, L, h), g again, and what adds up to weight's and scale's: (rows, h + 1)."""
    g, dy, dz = torch.empty_like(dg), torch.empty_like(y), torch.empty_like(z)
    tokens, half = dg.shape
    blocks = min(_NORM_BLOCKS, tokens)
    partial = torch.empty(blocks, half + 1, dtype=torch.float32, device=y.device)
    params = _Norm(
        y.data_ptr(),
        z.data_ptr(),
        weight.data_ptr(),
        scale.data_ptr(),
        g.data_ptr(),
        dg.data_ptr(),
        dy.data_ptr(),
        dz.data_ptr(),
        partial.data_ptr(),
        tokens,
        half,
        blocks,
        eps,
        _TYPES[y.dtype],
    )
    compiled.library().run("mfuser_mvfuser_norm_bwd", params, like=y)
    return dy, dz, g, partial


def finish(
    conv: Tensor, norm: Tensor, dA: Tensor, A: Tensor, dbias: Tensor, times: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients in fp32 of wx (h, 1, 3), wz, the norm's weight (h,), scale (), A_log (h, N) and bias (h,).

    From the sums of `conv_backward` and `norm_backward` and the scan's gradients of A and of times * bias.
    """
    half = norm.shape[1] - 1
    empty = conv.new_empty
    wx, wz, weight, scale = empty(half, 1, 3), empty(half, 1, 3), empty(half), empty(())
    A_log, bias = torch.empty_like(dA), torch.empty_like(dbias)
    sums, single = conv.data_ptr(), norm.data_ptr()
    pieces = (
        _SumPiece(sums, None, wx.data_ptr(), 6 * half, conv.shape[0], 3 * half, 1.0),
        _SumPiece(sums + 4 * 3 * half, None, wz.data_ptr(), 6 * half, conv.shape[0], 3 * half, 1.0),
        _SumPiece(single, None, weight.data_ptr(), half + 1, norm.shape[0], half, 1.0),
        _SumPiece(single + 4 * half, None, scale.data_ptr(), half + 1, norm.shape[0], 1, 1.0),
        _SumPiece(dA.data_ptr(), A.data_ptr(), A_log.data_ptr(), 0, 1, A.numel(), 1.0),
        _SumPiece(dbias.data_ptr(), None, bias.data_ptr(), 0, 1, half, times),
    )
    compiled.library().run("mfuser_mvfuser_sum", _Sum(pieces, len(pieces)), like=conv)
    return wx, wz, weight, scale, A_log, bias


class _Conv(ctypes.Structure):
    """`MvfuserConvParams` of mvfuser.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("xz", "wx", "wz", "x", "z", "du", "dx", "dz", "dxz", "partial")),
        *((name, ctypes.c_longlong) for name in ("batch_stride", "token_stride")),
        *((name, ctypes.c_int) for name in ("batch", "length", "half", "block_tokens", "gate", "type")),
    )


class _Norm(ctypes.Structure):
    """`MvfuserNormParams` of mvfuser.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("y", "z", "weight", "scale", "g", "dg", "dy", "dz", "partial")),
        ("tokens", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in ("half", "blocks")),
        ("eps", ctypes.c_float),
        ("type", ctypes.c_int),
    )


class _CastPiece(ctypes.Structure):
    """`MvfuserCastPiece` of mvfuser.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("source", "target")),
        *((name, ctypes.c_longlong) for name in ("rows", "columns", "source_stride", "target_stride", "blocks")),
        ("factor", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("source_type", "target_type", "exponential", "vectors")),
    )


class _Cast(ctypes.Structure):
    """`MvfuserCastParams` of mvfuser.h."""

    _fields_ = (("piece", _CastPiece * 8), ("pieces", ctypes.c_int))


class _SumPiece(ctypes.Structure):
    """`MvfuserSumPiece` of mvfuser.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("source", "times", "target")),
        ("stride", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in ("rows", "columns")),
        ("factor", ctypes.c_float),
        ("blocks", ctypes.c_int),
    )


class _Sum(ctypes.Structure):
    """`MvfuserSumParams` of mvfuser.h."""

    _fields_ = (("piece", _SumPiece * 8), ("pieces", ctypes.c_int))
