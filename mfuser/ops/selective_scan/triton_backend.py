"""The selective scan as Triton kernels.

The sequence is cut into chunks, which run side by side. A first pass takes every chunk's last state from a first state of
zero, and the sum of its steps: over a chunk a state decays by exp(A sum(delta)). The second pass joins the ends of the
chunks before into the true first state, and runs the chunk from there. It keeps a state every `_PIECE` steps for the
backward, which has the same two passes from the last chunk to the first. Where the batch alone fills the GPU there is
one chunk and no first pass. Gradients that are sums over channels, or over batch and time, are written as partial sums
and added in a fixed order by a last kernel, without atomics: the same inputs give the same bits.

A program is one warp. It holds an (N, channels) tile of states, and takes four time steps at a time as (4, ...) tiles.
Where these are cut into rows, a value goes through shared memory once for four steps; within a step the lanes
exchange nothing but sums. Which lane holds what follows from the addresses that the state's tile is loaded from:

* forward, and the backward's first pass: a lane has all states of a channel, so that the sum over states is its own;
* the backward's second pass: a lane has 4 states of 4 channels (at N = 16), the least exchange for sums in both directions.

States and sums are fp32, whatever the inputs are. Under TRITON_INTERPRET=1 the kernels run on CPU tensors, slowly.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfuser.ops.dispatch import mismatch

_MOST_STATES = 64
# tuning parameters
_TILE = 512  # states of a program, N times channels: 16 in a lane
_MOST_CHANNELS = 64  # of a program
_PIECE = 16  # steps between states that are kept for the backward; a multiple of 4
_WARPS = 8  # that a multiprocessor holds at a time, for their registers: two on each of its four schedulers
_LONE = 0.7  # time of a step with one warp on a scheduler, relative to that with two
_FIRST_PASS = 0.6  # time of the first pass, relative to the second's
_LAUNCH = 16  # time of launching the first pass, in steps
_JOIN = 0.5  # time of joining a chunk's end, averaged over chunks, in steps
_SUM_ROWS, _SUM_COLUMNS = 8, 256  # tile of the kernel that adds partial sums

_LOG2E = tl.constexpr(1.4426950408889634)
_LOG2E_LOW = tl.constexpr(1.92596299e-8)  # log2(e) less _LOG2E in fp32
_LN2 = tl.constexpr(0.6931471805599453)


def refuse(*tensors: Tensor | None) -> str | None:
    """Say why the kernels cannot take the op's tensors; without tensors, why they cannot run at all."""
    # interpreted (TRITON_INTERPRET=1), they run on a CPU, too
    devices = ("cuda",) if isinstance(_forward, triton.JITFunction) else ("cuda", "cpu")
    if problem := mismatch(tensors, *devices):
        return problem
    if len(tensors) > 2 and tensors[2] is not None and tensors[2].shape[1] > _MOST_STATES:
        return f"takes at most {_MOST_STATES} states, not {tensors[2].shape[1]}"
    return None


def saved_shape(u: Tensor, A: Tensor) -> tuple[int, ...]:
    """Return the shape of what `forward` stores for `backward`: the state before each piece, (B, pieces, N, D)."""
    return (u.shape[0], triton.cdiv(u.shape[1], _PIECE), A.shape[1], A.shape[0])


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    initial: Tensor | None,
    softplus: bool,
    keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (B, L, D) in u's dtype, the final state (B, D, N) and the states before each piece (empty unless `keep`)."""
    batch, length, dim = u.shape
    shape = _Shape(u, A, softplus)
    y, state, saved = u.new_empty(u.shape), shape.empty(batch, *A.shape), shape.empty(*(saved_shape(u, A) if keep else (0,)))
    ends, sums = shape.summaries()
    u, delta, B, C = (_rows_of(tensor) for tensor in (u, delta, B, C))
    z = None if z is None else _rows_of(z)
    A, D, bias = _states_first(A), _dense(D), _dense(bias)
    initial = None if initial is None else _states_first(initial)
    with torch.cuda.device_of(u):
        if shape.chunks > 1:
            _forward_ends[shape.grid](
                u,
                delta,
                A,
                B,
                bias,
                ends,
                sums,
                length,
                dim,
                u.stride(0),
                delta.stride(0),
                B.stride(0),
                shape.chunks,
                shape.chunk,
                0,
                **shape.constants,
            )
        _forward[shape.grid](
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
            saved if keep else None,
            ends,
            sums,
            length,
            dim,
            u.stride(0),
            delta.stride(0),
            B.stride(0),
            C.stride(0),
            0 if z is None else z.stride(0),
            shape.chunks,
            shape.chunk,
            0,
            PIECE=_PIECE,
            **shape.constants,
        )
    return y, state, saved


def backward(
    dy: Tensor,
    dstate: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    initial: Tensor | None,
    softplus: bool,
    saved: Tensor,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of (u, delta, A, B, C, D, z, bias, initial), each in its input's dtype; None for absent inputs."""
    batch, length, dim = u.shape
    shape = _Shape(u, A, softplus)
    grads = [None if t is None else t.new_empty(t.shape) for t in (u, delta, A, B, C, D, z, bias, initial)]
    du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial = grads
    laters, sums = shape.summaries()
    of_tokens = shape.empty(shape.blocks, 2, batch, length, shape.states)  # dB and dC of each block of channels
    of_channels = shape.empty(batch * shape.chunks, shape.states + 2, dim)  # dA, dD and dbias of each chunk
    scratch = shape.empty(shape.grid[0], _PIECE // 4, shape.tile_states, shape.channels)
    dy, u, delta, B, C = (_rows_of(tensor) for tensor in (dy, u, delta, B, C))
    z = None if z is None else _rows_of(z)
    A, D, bias = _states_first(A), _dense(D), _dense(bias)
    dstate = None if dstate is None else _states_first(dstate)
    gate_stride = 0 if z is None else z.stride(0)
    with torch.cuda.device_of(u):
        if shape.chunks > 1:
            _backward_ends[shape.grid](
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
                dy.stride(0),
                delta.stride(0),
                C.stride(0),
                gate_stride,
                shape.chunks,
                shape.chunk,
                0,
                **shape.constants,
            )
        _backward[shape.grid](
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
            batch * length * shape.states,
            length,
            dim,
            dy.stride(0),
            u.stride(0),
            delta.stride(0),
            B.stride(0),
            C.stride(0),
            gate_stride,
            shape.chunks,
            shape.chunk,
            PIECE=_PIECE,
            **shape.constants,
        )
        tokens, channels = of_tokens[0].numel(), of_channels[0].numel()
        programs = [triton.cdiv(size, _SUM_COLUMNS) for size in (tokens, channels)]
        _add[(sum(programs),)](
            of_tokens,
            of_channels,
            dB,
            dC,
            dA,
            dD,
            dbias,
            tokens,
            channels,
            shape.blocks,
            batch * shape.chunks,
            dim,
            shape.states,
            programs[0],
            ROWS=_SUM_ROWS,
            COLUMNS=_SUM_COLUMNS,
        )
    return tuple(grads)


class _Shape:
    """Division of a call into programs."""

    def __init__(self, u: Tensor, A: Tensor, softplus: bool) -> None:
        batch, length, dim = u.shape
        self.like, self.batch, self.dim, self.states = u, batch, dim, A.shape[1]
        self.tile_states = max(_TILE // _MOST_CHANNELS, triton.next_power_of_2(self.states))
        self.channels = _TILE // self.tile_states
        self.blocks = triton.cdiv(dim, self.channels)
        self.chunk = _chunk(batch * self.blocks, length, _multiprocessors(u.device))
        self.chunks = triton.cdiv(length, self.chunk)
        self.grid = (batch * self.chunks * self.blocks,)
        self.constants = {
            "STATES": self.states,
            "N": self.tile_states,
            "CHANNELS": self.channels,
            "SOFTPLUS": softplus,
            "num_warps": 1,
        }

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.like.device)

    def summaries(self) -> tuple[Tensor, Tensor]:
        """Return each chunk's last state from a first of zero, (B, chunks, N, D), and its sum of steps, (B, chunks, D)."""
        return self.empty(self.batch, self.chunks, self.states, self.dim), self.empty(self.batch, self.chunks, self.dim)


@functools.lru_cache(maxsize=1024)
def _chunk(programs: int, length: int, multiprocessors: int) -> int:
    """Return the steps of a chunk, a multiple of `_PIECE`: those that take the least time by a rough model of the GPU.

    Args:
        programs: that a chunk needs.
    """

    def time(chunk: int) -> float:
        chunks = triton.cdiv(length, chunk)
        waves, rest = divmod(triton.cdiv(programs * chunks, multiprocessors), _WARPS)
        second = chunk * (waves + (0.0 if rest == 0 else _LONE if rest <= _WARPS // 2 else 1.0))
        # the first pass leaves out one chunk
        return second if chunks == 1 else second * (1 + _FIRST_PASS * (chunks - 1) / chunks) + _LAUNCH + _JOIN * chunks

    pieces = triton.cdiv(length, _PIECE)
    return min((triton.cdiv(pieces, chunks) * _PIECE for chunks in range(1, math.isqrt(length) + 1)), key=time)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    # on a CPU, that of an H100, so that the interpreter cuts a call as a GPU would
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _rows_of(tensor: Tensor) -> Tensor:
    """Return (B, L, X) as (B L, X) with X in one piece; a copy only where memory has another order."""
    rows = tensor.reshape(-1, tensor.shape[2])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _states_first(tensor: Tensor) -> Tensor:
    """Return (..., D, N) as (..., N, D) in fp32."""
    return tensor.mT.to(torch.float32).contiguous()


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


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
