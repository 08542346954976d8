"""The elementwise kernels of MVFuser's block in Triton: casts, convolutions, the gated norm, and sums of partial gradients.

h is half the width, M = B L. A program works on a tile (tokens, channels). Neighbouring tokens of a convolution are loaded
again, from the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _cast(sources, targets, sizes, factors, EXPONENTIAL: tl.constexpr, BLOCK: tl.constexpr):
    """targets = factors * sources, and factor * exp(source) for piece EXPONENTIAL; a program does a block of one piece."""
    block = tl.program_id(0)
    for i in tl.static_range(len(sources)):
        blocks = tl.cdiv(sizes[i], BLOCK)
        if (block >= 0) & (block < blocks):
            at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            value = tl.load(sources[i] + at, at < sizes[i], other=0.0).to(tl.float32)
            if i == EXPONENTIAL:
                value = tl.exp(value)
            tl.store(targets[i] + at, (factors[i] * value).to(targets[i].dtype.element_ty), at < sizes[i])
        block -= blocks


@triton.jit
def _join(first, second, out, tokens, size, stride, WIDTH: tl.constexpr, TOKENS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    c = tl.arange(0, WIDTH)[None, :]
    inside = (token < tokens) & (c < size)
    kind = out.dtype.element_ty
    tl.store(out + token * stride + c, tl.load(first + token * size + c, inside, other=0.0).to(kind), inside)
    tl.store(out + token * stride + size + c, tl.load(second + token * size + c, inside, other=0.0).to(kind), inside)


@triton.jit
def _rows(base, token, length, stride, inside):
    """Rows of a (L, h) tile as fp32; zero outside the sequence."""
    return tl.load(base + token * stride, inside & (token >= 0) & (token < length), other=0.0).to(tl.float32)


@triton.jit
def _convolved(w0, w1, w2, base, token, length, stride, inside):
    """Three rows before, at and behind each token, and their convolution."""
    before = _rows(base, token - 1, length, stride, inside)
    here = _rows(base, token, length, stride, inside)
    after = _rows(base, token + 1, length, stride, inside)
    return before, here, after, w0 * before + w1 * here + w2 * after


@triton.jit
def _conv_half(base, w, out, token, length, stride, c, half, SILU: tl.constexpr):
    inside = c < half
    w0, w1, w2 = _taps(w, c, inside)
    _, _, _, sum = _convolved(w0, w1, w2, base, token, length, stride, inside)
    if SILU:
        sum *= tl.sigmoid(sum)
    tl.store(out + token * half, sum.to(out.dtype.element_ty), inside & (token < length))


@triton.jit
def _taps(w, c, inside):
    return (
        tl.load(w + 3 * c, inside, other=0.0),
        tl.load(w + 3 * c + 1, inside, other=0.0),
        tl.load(w + 3 * c + 2, inside, other=0.0),
    )


@triton.jit
def _conv_forward(
    xz,
    wx,
    wz,
    x,
    z,
    batch_stride,
    token_stride,
    length,
    half,
    chunks,
    GATE: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    image = (tl.program_id(0) // chunks).to(tl.int64)
    token = ((tl.program_id(0) % chunks) * TOKENS + tl.arange(0, TOKENS)[:, None]).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    base, out = xz + image * batch_stride + c, image * length * half + c
    if tl.program_id(2) == 0:
        _conv_half(base, wx, x + out, token, length, token_stride, c, half, True)
    else:
        _conv_half(base + half, wz, z + out, token, length, token_stride, c, half, GATE)


@triton.jit
def _gradient(base, one, two, w0, w1, w2, token, length, stride, half, inside, SILU: tl.constexpr, TWO: tl.constexpr):
    """Return the gradient before SiLU, zero outside the sequence, and the three rows that it belongs to."""
    before, here, after, sum = _convolved(w0, w1, w2, base, token, length, stride, inside)
    da = _rows(one, token, length, half, inside)
    if TWO:
        da += _rows(two, token, length, half, inside)
    if SILU:
        share = tl.sigmoid(sum)
        da *= share * (1 + sum * (1 - share))
    return da, before, here, after


@triton.jit
def _conv_half_backward(
    base,
    w,
    one,
    two,
    dbase,
    partial,
    first,
    length,
    stride,
    c,
    half,
    SILU: tl.constexpr,
    TWO: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    REPEAT: tl.constexpr,
):
    inside = c < half
    w0, w1, w2 = _taps(w, c, inside)
    dw0, dw1, dw2 = (
        tl.zeros((1, CHANNELS), tl.float32),
        tl.zeros((1, CHANNELS), tl.float32),
        tl.zeros((1, CHANNELS), tl.float32),
    )
    for repeat in range(REPEAT):
        token = first + repeat * TOKENS + tl.arange(0, TOKENS)[:, None]
        da_before, _, _, _ = _gradient(base, one, two, w0, w1, w2, token - 1, length, stride, half, inside, SILU, TWO)
        da_after, _, _, _ = _gradient(base, one, two, w0, w1, w2, token + 1, length, stride, half, inside, SILU, TWO)
        da, before, here, after = _gradient(base, one, two, w0, w1, w2, token, length, stride, half, inside, SILU, TWO)
        dxz = w0 * da_after + w1 * da + w2 * da_before
        tl.store(dbase + token * 2 * half, dxz.to(dbase.dtype.element_ty), inside & (token < length))
        dw0 += tl.sum(da * before, 0, keep_dims=True)
        dw1 += tl.sum(da * here, 0, keep_dims=True)
        dw2 += tl.sum(da * after, 0, keep_dims=True)
    tl.store(partial + 3 * c, dw0, inside)
    tl.store(partial + 3 * c + 1, dw1, inside)
    tl.store(partial + 3 * c + 2, dw2, inside)


@triton.jit
def _conv_backward(
    xz,
    wx,
    wz,
    du,
    dx,
    dz,
    dxz,
    partial,
    batch_stride,
    token_stride,
    length,
    half,
    chunks,
    GATE: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    REPEAT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    image, first = row // chunks, (row % chunks) * TOKENS * REPEAT
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    base, d, dbase = xz + image * batch_stride + c, image * length * half + c, dxz + image * length * 2 * half + c
    sums = partial + row * 6 * half
    if tl.program_id(2) == 0:
        _conv_half_backward(
            base, wx, du + d, dx + d, dbase, sums, first, length, token_stride, c, half, True, True, TOKENS, CHANNELS, REPEAT
        )
    else:
        _conv_half_backward(
            base + half,
            wz,
            dz + d,
            dz + d,
            dbase + half,
            sums + 3 * half,
            first,
            length,
            token_stride,
            c,
            half,
            GATE,
            False,
            TOKENS,
            CHANNELS,
            REPEAT,
        )


@triton.jit
def _norm_forward(y, z, weight, scale, g, tokens, half, eps, WIDTH: tl.constexpr, TOKENS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    c = tl.arange(0, WIDTH)[None, :]
    inside = (token < tokens) & (c < half)
    at = token * half + c
    value = tl.load(y + at, inside, other=0.0).to(tl.float32)
    gate = tl.load(z + at, inside, other=0.0).to(tl.float32)
    root = tl.rsqrt(tl.sum(value * value, 1, keep_dims=True) / half + eps)
    normed = value * root * tl.load(weight + c, c < half, other=0.0)
    result = tl.load(scale) * (normed * (gate * tl.sigmoid(gate)))
    tl.store(g + at, result.to(g.dtype.element_ty), inside)


@triton.jit
def _norm_backward(dg, y, z, weight, scale, dy, dz, g, partial, tokens, half, eps, WIDTH: tl.constexpr):
    # as norm_backward in cuda/mvfuser_norm.cu; a program takes every so many-th token
    c = tl.arange(0, WIDTH)
    inside = c < half
    w, s = tl.load(weight + c, inside, other=0.0), tl.load(scale)
    dweight, dscale = tl.zeros((WIDTH,), tl.float32), 0.0
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        at = (token + tl.zeros((WIDTH,), tl.int64)) * half + c
        value = tl.load(y + at, inside, other=0.0).to(tl.float32)
        gate = tl.load(z + at, inside, other=0.0).to(tl.float32)
        d = tl.load(dg + at, inside, other=0.0).to(tl.float32)
        share = tl.sigmoid(gate)
        silu = gate * share
        along = tl.sum(d * silu * w * value, 0)
        root = tl.rsqrt(tl.sum(value * value, 0) / half + eps)
        dscale += along * root
        normed, ds = value * root * w, s * d
        tl.store(g + at, (s * (normed * silu)).to(g.dtype.element_ty), inside)
        tl.store(dz + at, (ds * normed * (share * (1 + gate * (1 - share)))).to(dz.dtype.element_ty), inside)
        dvalue = root * (ds * silu * w - value * (s * along * root * root / half))
        tl.store(dy + at, dvalue.to(dy.dtype.element_ty), inside)
        dweight += ds * silu * value * root
    row = partial + tl.program_id(0).to(tl.int64) * (half + 1)
    tl.store(row + c, dweight, inside)
    tl.store(row + half, dscale)


@triton.jit
def _sum(sources, targets, rows, columns, strides, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the sum over rows of each source, always in the same order; a program does some columns of one source."""
    block = tl.program_id(0)
    for i in tl.static_range(len(sources)):
        blocks = tl.cdiv(columns[i], COLUMNS)
        if (block >= 0) & (block < blocks):
            c = block * COLUMNS + tl.arange(0, COLUMNS)[None, :]
            total = tl.zeros((ROWS, COLUMNS), tl.float32)
            for first in range(0, rows[i], ROWS):
                row = first + tl.arange(0, ROWS)[:, None]
                at = row.to(tl.int64) * strides[i] + c
                total += tl.load(sources[i] + at, (row < rows[i]) & (c < columns[i]), other=0.0)
            tl.store(targets[i] + c, tl.sum(total, 0, keep_dims=True), c < columns[i])
        block -= blocks
