"""The two passes of the backward, from the last step to the first, and the sum of partial gradients (see `triton_backend`)."""

from __future__ import annotations

import triton
import triton.language as tl

from mfuser.ops.selective_scan.triton_parts_backend import (
    _LN2,
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
def _backward_ends(
    dy,
    delta,
    A,
    C,
    z,
    bias,
    laters,
    sums,
    length,
    dim,
    sdy,
    sdelta,
    sC,
    sz,
    chunks,
    chunk_length,
    zero,
    STATES: tl.constexpr,
    N: tl.constexpr,
    CHANNELS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):
    """Compute in the first pass what a chunk's outputs add to the gradient of the state before it, and its sum of steps."""
    blocks = tl.cdiv(dim, CHANNELS)
    program = tl.program_id(0)
    batch, chunk, block = program // (blocks * chunks), program // blocks % chunks, program % blocks
    # nothing comes before the first
    if chunk == 0:
        return
    n, d, t = tl.arange(0, N), block * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, 4)[:, None]
    in_n, in_d = n < STATES, d < dim
    in_rows_n, in_rows_d, in_tile = in_n[None, :], in_d[None, :], in_n[:, None] & in_d[None, :]
    tile = n[:, None] * dim + d[None, :] + zero  # as in the forward
    a = tl.load(A + tile, mask=in_tile, other=0.0) * _LOG2E
    shift = _bias(bias, d, in_d, CHANNELS)
    later = tl.zeros((N, CHANNELS), tl.float32)
    total = tl.zeros((4, CHANNELS), tl.float32)

    start, row = chunk * chunk_length, batch.to(tl.int64) * length
    stop = tl.minimum(start + chunk_length, length)
    last = start + (stop - 1 - start) // 4 * 4
    live = last + t < stop
    g_next = _load(dy, row + last, sdy, d, live & in_rows_d)
    delta_next = _load(delta, row + last, sdelta, d, live & in_rows_d)
    c_next = _load(C, row + last, sC, n, live & in_rows_n)
    if z is not None:
        gate_next = _load(z, row + last, sz, d, live & in_rows_d)
    for first in range(last, start - 1, -4):
        g, c = g_next.to(tl.float32), c_next.to(tl.float32)
        step = _steps(delta_next, shift, live, SOFTPLUS)
        # the four before are on their way while these are computed
        live = (first - 4 + t >= start) & (first - 4 + t < stop)
        g_next = _load(dy, row + first - 4, sdy, d, live & in_rows_d)
        delta_next = _load(delta, row + first - 4, sdelta, d, live & in_rows_d)
        c_next = _load(C, row + first - 4, sC, n, live & in_rows_n)
        if z is not None:
            gate = gate_next.to(tl.float32)
            gate_next = _load(z, row + first - 4, sz, d, live & in_rows_d)
            g *= gate * _sigmoid(gate)
        total += step
        s0, s1, s2, s3, g0, g1, g2, g3 = _split_both(step, g)
        c0, c1, c2, c3 = _split(c)
        later = _retreat(later, a, s3, g3, c3)
        later = _retreat(later, a, s2, g2, c2)
        later = _retreat(later, a, s1, g1, c1)
        later = _retreat(later, a, s0, g0, c0)

    at = (batch * chunks + chunk).to(tl.int64)
    tl.store(laters + at * STATES * dim + tile, later, mask=in_tile)
    tl.store(sums + at * dim + d, tl.sum(total, 0), mask=in_d)


@triton.jit
def _backward(
    dy,
    dstate,
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    bias,
    saved,
    laters,
    sums,
    scratch,
    du,
    ddelta,
    dz,
    dinitial,
    of_tokens,
    of_channels,
    plane,
    length,
    dim,
    sdy,
    su,
    sdelta,
    sB,
    sC,
    sz,
    chunks,
    chunk_length,
    PIECE: tl.constexpr,
    STATES: tl.constexpr,
    N: tl.constexpr,
    CHANNELS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):
    """Recompute in the second pass each piece's states, four steps at a time, then all gradients from its end to its start."""
    blocks = tl.cdiv(dim, CHANNELS)
    program = tl.program_id(0)
    batch, chunk, block = program // (blocks * chunks), program // blocks % chunks, program % blocks
    n, d, t = tl.arange(0, N), block * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, 4)[:, None]
    in_n, in_d = n < STATES, d < dim
    in_rows_n, in_rows_d, in_tile = in_n[None, :], in_d[None, :], in_n[:, None] & in_d[None, :]
    tile = n[:, None] * dim + d[None, :]
    a = tl.load(A + tile, mask=in_tile, other=0.0) * _LOG2E
    shift = _bias(bias, d, in_d, CHANNELS)
    later = tl.zeros((N, CHANNELS), tl.float32)  # exp(delta[t+1] A) g[t+1]
    if dstate is not None:
        later = tl.load(dstate + batch.to(tl.int64) * STATES * dim + tile, mask=in_tile, other=0.0)
    for after in range(chunks - 1, chunk, -4):
        at = (batch * chunks + after).to(tl.int64)
        e0, s0 = _end(laters, sums, at, dim, STATES, d, tile, in_d, in_tile, True)
        e1, s1 = _end(laters, sums, at - 1, dim, STATES, d, tile, in_d, in_tile, after - 1 > chunk)
        e2, s2 = _end(laters, sums, at - 2, dim, STATES, d, tile, in_d, in_tile, after - 2 > chunk)
        e3, s3 = _end(laters, sums, at - 3, dim, STATES, d, tile, in_d, in_tile, after - 3 > chunk)
        later = _join(_join(_join(_join(later, a, e0, s0), a, e1, s1), a, e2, s2), a, e3, s3)

    start, row = chunk * chunk_length, batch.to(tl.int64) * length
    stop = tl.minimum(start + chunk_length, length)
    pieces = tl.cdiv(length, PIECE)
    inner = n[:, None] * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    slots = scratch + program.to(tl.int64) * (PIECE // 4) * N * CHANNELS + inner  # the states before every fourth step
    dA = tl.zeros((N, CHANNELS), tl.float32)
    dD = tl.zeros((4, CHANNELS), tl.float32)
    dbias = tl.zeros((4, CHANNELS), tl.float32)
    for piece in range(tl.cdiv(stop, PIECE) - 1, start // PIECE - 1, -1):
        h = tl.load(saved + (batch * pieces + piece).to(tl.int64) * STATES * dim + tile, mask=in_tile, other=0.0)
        tl.store(slots, h)
        quarters = tl.cdiv(tl.minimum(stop - piece * PIECE, PIECE), 4)
        for i in range(1, quarters):
            first = piece * PIECE + (i - 1) * 4
            live = first + t < stop
            x = _load(u, row + first, su, d, live & in_rows_d).to(tl.float32)
            step = _steps(_load(delta, row + first, sdelta, d, live & in_rows_d), shift, live, SOFTPLUS)
            b = _load(B, row + first, sB, n, live & in_rows_n).to(tl.float32)
            s0, s1, s2, s3, f0, f1, f2, f3 = _split_both(step, step * x)
            b0, b1, b2, b3 = _split(b)
            h = _advance(h, a, s0, f0, b0)
            h = _advance(h, a, s1, f1, b1)
            h = _advance(h, a, s2, f2, b2)
            h = _advance(h, a, s3, f3, b3)
            tl.store(slots + i * N * CHANNELS, h)
        # the slots are read again
        tl.debug_barrier()
        for i in range(quarters - 1, -1, -1):
            first = piece * PIECE + i * 4
            live = first + t < stop
            here = live & in_rows_d
            h0 = tl.load(slots + i * N * CHANNELS)
            x = _load(u, row + first, su, d, here).to(tl.float32)
            raw = _load(delta, row + first, sdelta, d, here)
            step = _steps(raw, shift, live, SOFTPLUS)
            g = _load(dy, row + first, sdy, d, here).to(tl.float32)
            b = _load(B, row + first, sB, n, live & in_rows_n).to(tl.float32)
            c = _load(C, row + first, sC, n, live & in_rows_n).to(tl.float32)
            if z is not None:
                gate = _load(z, row + first, sz, d, here).to(tl.float32)
                share, dgated = _sigmoid(gate), g
                g *= gate * share
            s0, s1, s2, s3, f0, f1, f2, f3 = _split_both(step, step * x)
            b0, b1, b2, b3, c0, c1, c2, c3 = _split_both(b, c)
            g0, g1, g2, g3 = _split(g)
            h1 = _advance(h0, a, s0, f0, b0)
            h2 = _advance(h1, a, s1, f1, b1)
            h3 = _advance(h2, a, s2, f2, b2)
            h4 = _advance(h3, a, s3, f3, b3)
            later, dA, df3, ds3, db3, dc3 = _back(later, dA, h3, h4, a, s3, f3, g3, b3, c3)
            later, dA, df2, ds2, db2, dc2 = _back(later, dA, h2, h3, a, s2, f2, g2, b2, c2)
            later, dA, df1, ds1, db1, dc1 = _back(later, dA, h1, h2, a, s1, f1, g1, b1, c1)
            later, dA, df0, ds0, db0, dc0 = _back(later, dA, h0, h1, a, s0, f0, g0, b0, c0)

            dinflow = _stack(df0, df1, df2, df3)
            dx, dstep = dinflow * step, dinflow * x + _stack(ds0, ds1, ds2, ds3)
            if SOFTPLUS:
                dstep *= _sigmoid(raw.to(tl.float32) + shift[None, :])
            dbias += tl.where(here, dstep, 0.0)
            to = (row + first) * dim + t * dim + d[None, :]
            if D is not None:
                skip = tl.load(D + d, mask=in_d, other=0.0).to(tl.float32)[None, :]
                dx += g * skip
                dD += g * x
            if z is not None:
                out = _stack(
                    tl.sum(h1 * c0[:, None], 0),
                    tl.sum(h2 * c1[:, None], 0),
                    tl.sum(h3 * c2[:, None], 0),
                    tl.sum(h4 * c3[:, None], 0),
                )
                if D is not None:
                    out += x * skip
                dgate = dgated * out * share * (1 + gate * (1 - share))
                tl.store(dz + to, dgate.to(dz.dtype.element_ty), mask=here)
            tl.store(du + to, dx.to(du.dtype.element_ty), mask=here)
            tl.store(ddelta + to, dstep.to(ddelta.dtype.element_ty), mask=here)
            to = block.to(tl.int64) * 2 * plane + (row + first) * STATES + t * STATES + n[None, :]
            tl.store(of_tokens + to, _stack(db0, db1, db2, db3), mask=live & in_rows_n)
            tl.store(of_tokens + to + plane, _stack(dc0, dc1, dc2, dc3), mask=live & in_rows_n)
        # the slots are written again
        tl.debug_barrier()

    at = (batch * chunks + chunk).to(tl.int64) * (STATES + 2) * dim
    tl.store(of_channels + at + tile, dA, mask=in_tile)
    tl.store(of_channels + at + STATES * dim + d, tl.sum(dD, 0), mask=in_d)
    tl.store(of_channels + at + (STATES + 1) * dim + d, tl.sum(dbias, 0), mask=in_d)
    if dinitial is not None:
        to = batch.to(tl.int64) * dim * STATES + d[None, :] * STATES + n[:, None]
        tl.store(dinitial + to, later.to(dinitial.dtype.element_ty), mask=in_tile & (chunk == 0))


@triton.jit
def _retreat(later, A, step, g, c):
    """Compute exp(delta[t+1] A) dL/dh[t+1] at t from that at t + 1, (N, X)."""
    return tl.exp2(step[None, :] * A) * (later + c[:, None] * g[None, :])


@triton.jit
def _back(later, dA, before, after, A, step, inflow, g, b, c):
    """Go one step back, with the states before and after it: later, dA and the gradients of inflow, step, b and c."""
    dh = later + c[:, None] * g[None, :]
    later = tl.exp2(step[None, :] * A) * dh
    carried = later * before
    # A is in units of log 2
    dstep = tl.sum(carried * A, 0) * _LN2
    dA += carried * step[None, :]
    dinflow = tl.sum(dh * b[:, None], 0)
    return later, dA, dinflow, dstep, tl.sum(dh * inflow[None, :], 1), tl.sum(after * g[None, :], 1)


@triton.jit
def _add(
    of_tokens,
    of_channels,
    dB,
    dC,
    dA,
    dD,
    dbias,
    tokens,
    channels,
    blocks,
    chunks,
    dim,
    states,
    first_programs,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add partial sums: (blocks, tokens) to dB and dC, (chunks, channels) to dA, dD and dbias."""
    program = tl.program_id(0)
    if program < first_programs:
        at = program.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        total, half = _total(of_tokens, at, blocks, tokens, ROWS, COLUMNS), tokens // 2
        tl.store(dB + at, total.to(dB.dtype.element_ty), mask=at < half)
        tl.store(dC + at - half, total.to(dC.dtype.element_ty), mask=(at >= half) & (at < tokens))
    else:
        at = (program - first_programs).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        total = _total(of_channels, at, chunks, channels, ROWS, COLUMNS)
        n, d = at // dim, at % dim
        tl.store(dA + d * states + n, total.to(dA.dtype.element_ty), mask=n < states)
        if dD is not None:
            tl.store(dD + d, total.to(dD.dtype.element_ty), mask=n == states)
        if dbias is not None:
            tl.store(dbias + d, total.to(dbias.dtype.element_ty), mask=n == states + 1)


@triton.jit
def _total(parts, at, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum over the rows of (rows, columns), for the columns `at`."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, rows, ROWS):
        r = first + tl.arange(0, ROWS)[:, None]
        total += tl.load(parts + r.to(tl.int64) * columns + at[None, :], mask=(r < rows) & (at < columns)[None, :], other=0.0)
    return tl.sum(total, 0)
