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
from torch import Tensor

from mfuser.ops.dispatch import mismatch
from mfuser.ops.selective_scan.triton_backward_backend import _add, _backward, _backward_ends
from mfuser.ops.selective_scan.triton_forward_backend import _forward, _forward_ends

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
