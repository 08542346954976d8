"""The two passes of the forward, from the first step to the last (see `triton_backend`)."""

from __future__ import annotations

import triton
import triton.language as tl

from mfuser.ops.selective_scan.triton_parts_backend import (
    _LOG2E,
    _advance,
    _bias,
    _end,
    _join,
    _load,
    _sigmoid,
    _split,
    _split_both,
    _stack,
    _steps,
)


@triton.jit(do_not_specialize=["zero"])
def _forward_ends(
    u,
    delta,
    A,
    B,
    bias,
    ends,
    sums,
    length,
    dim,
    su,
    sdelta,
    sB,
    chunks,
    chunk_length,
    zero,
    STATES: tl.constexpr,
    N: tl.constexpr,
    CHANNELS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):
    """Compute in the first pass a chunk's last state from a first of zero, and its sum of steps."""
    blocks = tl.cdiv(dim, CHANNELS)
    program = tl.program_id(0)
    batch, chunk, block = program // (blocks * chunks), program // blocks % chunks, program % blocks
    # nothing comes after the last
    if chunk == chunks - 1:
        return
    n, d, t = tl.arange(0, N), block * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, 4)[:, None]
    in_n, in_d = n < STATES, d < dim
    in_rows_n, in_rows_d, in_tile = in_n[None, :], in_d[None, :], in_n[:, None] & in_d[None, :]
    # if rows were known to be aligned, a lane would load and hold four channels
    tile = n[:, None] * dim + d[None, :] + zero
    a = tl.load(A + tile, mask=in_tile, other=0.0) * _LOG2E
    shift = _bias(bias, d, in_d, CHANNELS)
    h = tl.zeros((N, CHANNELS), tl.float32)
    total = tl.zeros((4, CHANNELS), tl.float32)

    start, row = chunk * chunk_length, batch.to(tl.int64) * length
    stop = start + chunk_length
    live = start + t < stop
    x_next = _load(u, row + start, su, d, live & in_rows_d)
    delta_next = _load(delta, row + start, sdelta, d, live & in_rows_d)
    b_next = _load(B, row + start, sB, n, live & in_rows_n)
    for first in range(start, stop, 4):
        x, b = x_next.to(tl.float32), b_next.to(tl.float32)
        step = _steps(delta_next, shift, live, SOFTPLUS)
        # the next four are on their way while these are computed
        live = first + 4 + t < stop
        x_next = _load(u, row + first + 4, su, d, live & in_rows_d)
        delta_next = _load(delta, row + first + 4, sdelta, d, live & in_rows_d)
        b_next = _load(B, row + first + 4, sB, n, live & in_rows_n)
        total += step
        s0, s1, s2, s3, f0, f1, f2, f3 = _split_both(step, step * x)
        b0, b1, b2, b3 = _split(b)
        h = _advance(h, a, s0, f0, b0)
        h = _advance(h, a, s1, f1, b1)
        h = _advance(h, a, s2, f2, b2)
        h = _advance(h, a, s3, f3, b3)

    at = (batch * chunks + chunk).to(tl.int64)
    tl.store(ends + at * STATES * dim + tile, h, mask=in_tile)
    tl.store(sums + at * dim + d, tl.sum(total, 0), mask=in_d)


@triton.jit(do_not_specialize=["zero"])
def _forward(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    bias,
    initial,
    y,
    state,
    saved,
    ends,
    sums,
    length,
    dim,
    su,
    sdelta,
    sB,
    sC,
    sz,
    chunks,
    chunk_length,
    zero,
    PIECE: tl.constexpr,
    STATES: tl.constexpr,
    N: tl.constexpr,
    CHANNELS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):
    """Compute in the second pass y, the state before every piece, and the final state."""
    blocks = tl.cdiv(dim, CHANNELS)
    program = tl.program_id(0)
    batch, chunk, block = program // (blocks * chunks), program // blocks % chunks, program % blocks
    n, d, t = tl.arange(0, N), block * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, 4)[:, None]
    in_n, in_d = n < STATES, d < dim
    in_rows_n, in_rows_d, in_tile = in_n[None, :], in_d[None, :], in_n[:, None] & in_d[None, :]
    tile = n[:, None] * dim + d[None, :] + zero  # as in the first pass
    a = tl.load(A + tile, mask=in_tile, other=0.0) * _LOG2E
    shift = _bias(bias, d, in_d, CHANNELS)
    h = tl.zeros((N, CHANNELS), tl.float32)
    if initial is not None:
        h = tl.load(initial + batch.to(tl.int64) * STATES * dim + tile, mask=in_tile, other=0.0)
    for before in range(0, chunk, 4):
        # four at a time, so that their loads overlap
        at = (batch * chunks + before).to(tl.int64)
        e0, s0 = _end(ends, sums, at, dim, STATES, d, tile, in_d, in_tile, True)
        e1, s1 = _end(ends, sums, at + 1, dim, STATES, d, tile, in_d, in_tile, before + 1 < chunk)
        e2, s2 = _end(ends, sums, at + 2, dim, STATES, d, tile, in_d, in_tile, before + 2 < chunk)
        e3, s3 = _end(ends, sums, at + 3, dim, STATES, d, tile, in_d, in_tile, before + 3 < chunk)
        h = _join(_join(_join(_join(h, a, e0, s0), a, e1, s1), a, e2, s2), a, e3, s3)

    start, row = chunk * chunk_length, batch.to(tl.int64) * length
    stop = tl.minimum(start + chunk_length, length)
    pieces = tl.cdiv(length, PIECE)
    live = start + t < stop
    x_next = _load(u, row + start, su, d, live & in_rows_d)
    delta_next = _load(delta, row + start, sdelta, d, live & in_rows_d)
    b_next = _load(B, row + start, sB, n, live & in_rows_n)
    c_next = _load(C, row + start, sC, n, live & in_rows_n)
    if z is not None:
        gate_next = _load(z, row + start, sz, d, live & in_rows_d)
    for first in range(start, stop, 4):
        x, b, c = x_next.to(tl.float32), b_next.to(tl.float32), c_next.to(tl.float32)
        step = _steps(delta_next, shift, live, SOFTPLUS)
        here = live & in_rows_d
        # the next four are on their way while these are computed
        live = first + 4 + t < stop
        x_next = _load(u, row + first + 4, su, d, live & in_rows_d)
        delta_next = _load(delta, row + first + 4, sdelta, d, live & in_rows_d)
        b_next = _load(B, row + first + 4, sB, n, live & in_rows_n)
        c_next = _load(C, row + first + 4, sC, n, live & in_rows_n)
        if saved is not None:
            piece = (batch * pieces + first // PIECE).to(tl.int64)
            if first % PIECE == 0:
                tl.store(saved + piece * STATES * dim + tile, h, mask=in_tile)
        s0, s1, s2, s3, f0, f1, f2, f3 = _split_both(step, step * x)
        b0, b1, b2, b3, c0, c1, c2, c3 = _split_both(b, c)
        h = _advance(h, a, s0, f0, b0)
        y0 = tl.sum(h * c0[:, None], 0)
        h = _advance(h, a, s1, f1, b1)
        y1 = tl.sum(h * c1[:, None], 0)
        h = _advance(h, a, s2, f2, b2)
        y2 = tl.sum(h * c2[:, None], 0)
        h = _advance(h, a, s3, f3, b3)
        y3 = tl.sum(h * c3[:, None], 0)
        out = _stack(y0, y1, y2, y3)
        if D is not None:
            out += x * tl.load(D + d, mask=in_d, other=0.0).to(tl.float32)[None, :]
        if z is not None:
            gate = gate_next.to(tl.float32)
            gate_next = _load(z, row + first + 4, sz, d, live & in_rows_d)
            out *= gate * _sigmoid(gate)
        tl.store(y + (row + first) * dim + t * dim + d[None, :], out.to(y.dtype.element_ty), mask=here)

    if chunk == chunks - 1:
        tl.store(state + batch.to(tl.int64) * dim * STATES + d[None, :] * STATES + n[:, None], h, mask=in_tile)
