"""What the kernels of both directions share: how rows change lanes, and one step of the scan. X is channels or states."""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_LOG2E_LOW = tl.constexpr(1.92596299e-8)  # log2(e) less _LOG2E in fp32
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _split(tile):
    """Return the four rows of (4, X)."""
    even, odd = tl.split(tl.permute(tl.reshape(tile, (2, 2, tile.shape[1])), (2, 0, 1)))
    r0, r2 = tl.split(even)
    r1, r3 = tl.split(odd)
    return r0, r1, r2, r3


@triton.jit
def _split_both(a, b):
    """Return the four rows of a and those of b, both (4, X), which change lanes together."""
    n: tl.constexpr = a.shape[1]
    r0, r1, r2, r3 = _split(tl.reshape(tl.join(a, b), (4, 2 * n)))
    a0, b0 = tl.split(tl.reshape(r0, (n, 2)))
    a1, b1 = tl.split(tl.reshape(r1, (n, 2)))
    a2, b2 = tl.split(tl.reshape(r2, (n, 2)))
    a3, b3 = tl.split(tl.reshape(r3, (n, 2)))
    return a0, a1, a2, a3, b0, b1, b2, b3


@triton.jit
def _stack(r0, r1, r2, r3):
    """Return (4, X) of four rows."""
    return tl.reshape(tl.permute(tl.join(tl.join(r0, r2), tl.join(r1, r3)), (1, 2, 0)), (4, r0.shape[0]))


@triton.jit
def _load(base, row, stride, columns, mask):
    """Return rows row..row+3 of `columns`, (4, X); `mask` is of the same shape."""
    at = row * stride + tl.arange(0, 4)[:, None] * stride + columns[None, :]
    return tl.load(base + at, mask=mask, other=0.0)


@triton.jit
def _exp_minus_abs(x):
    """Return exp(-|x|), accurate for tiny results: the exponent in base 2 is rounded, and the remainder is added back."""
    m = -tl.abs(x)
    whole = m * _LOG2E
    rest = tl.fma(m, _LOG2E, -whole) + m * _LOG2E_LOW
    e = tl.exp2(whole)
    return tl.fma(e, rest * _LN2, e)


@triton.jit
def _sigmoid(x):
    e = _exp_minus_abs(x)
    return tl.where(x >= 0, 1.0, e) / (1 + e)


@triton.jit
def _steps(delta, bias, live, SOFTPLUS: tl.constexpr):
    """Return delta made positive, (4, X); zero, which changes no state, where `live` (4, 1) is false."""
    x = delta.to(tl.float32) + bias[None, :]
    if SOFTPLUS:
        # max(x, 0) + log(1 + e); the logarithm is 2 artanh(s) by its series for s <= 1/3, so that small steps keep their digits
        e = _exp_minus_abs(x)
        s = e / (2 + e)
        q = s * s
        series = 1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q / 13)))))
        x = tl.maximum(x, 0) + 2 * s * series
    return tl.where(live, x, 0.0)


@triton.jit
def _bias(bias, channels, present, CHANNELS: tl.constexpr):
    shift = tl.zeros((CHANNELS,), tl.float32)
    if bias is not None:
        shift = tl.load(bias + channels, mask=present, other=0.0).to(tl.float32)
    return shift


@triton.jit
def _advance(h, A, step, inflow, b):
    """Compute h[t] from h[t-1], (N, X)."""
    return tl.exp2(step[None, :] * A) * h + inflow[None, :] * b[:, None]


@triton.jit
def _end(ends, sums, at, dim, STATES: tl.constexpr, channels, tile, mask_channels, mask_tile, live):
    """Return a chunk's last state and its sum of steps; zero, which changes no state, where `live` is false."""
    end = tl.load(ends + at * STATES * dim + tile, mask=mask_tile & live, other=0.0)
    return end, tl.load(sums + at * dim + channels, mask=mask_channels & live, other=0.0)


@triton.jit
def _join(h, A, end, total):
    """Return the state after a chunk from that before it."""
    return tl.exp2(total[None, :] * A) * h + end
