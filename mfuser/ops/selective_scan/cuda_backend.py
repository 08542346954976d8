"""The selective scan in CUDA C++ (cuda/selective_scan.cuh): checks, memory and the two launches' arguments."""

from __future__ import annotations

import ctypes
import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mfuser.ops import compiled

_SUB = 16  # steps between kept states: kSub in the source, which refuses another
_MOST_STATES = 64
_LONGEST_ROW = 2**24  # elements between rows: 32 of them are counted in 31 bits of bytes
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# channels of a block by states at most, forward and backward: Place::kChannels
_CHANNELS = {8: (128, 64), 16: (64, 64), 64: (32, 16)}
# What `plan` knows of the kernels, in microseconds on an H200: 16 steps of one, two, ... blocks that share a multiprocessor, as
# many as it holds, in each direction; those of the first pass; the start of a kernel; and a chunk before a block's own.
_SIXTEEN = ((0.0, 1.4, 1.9, 2.75), (0.0, 4.4, 6.1))
_FIRST_PASS = (0.0, 1.05, 1.4, 2.1)
_START = 3.5
_BEFORE = 1.0


class _Params(ctypes.Structure):
    """ScanParams of the source, field by field."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("u", "delta", "B", "C", "z", "A", "D", "bias", "initial")]
        + [(f"{name}_batch", ctypes.c_int64) for name in ("u", "delta", "B", "C", "z", "dy")]
        + [(f"{name}_row", ctypes.c_int) for name in ("u", "delta", "B", "C", "z", "dy")]
        + [(name, ctypes.c_void_p) for name in ("y", "state", "saved", "end", "total")]
        + [
            (name, ctypes.c_void_p)
            for name in ("dy", "dstate", "du", "ddelta", "dz", "dB", "dC", "dA", "dD", "dbias", "dinitial")
        ]
        + [(name, ctypes.c_void_p) for name in ("part_B", "part_C", "part_A", "part_D", "part_bias")]
        + [(name, ctypes.c_int) for name in ("batch", "length", "dim", "state_size", "chunks", "chunk", "sub", "softplus")]
    )


def refuse(*tensors: Tensor | None) -> str | None:
    """Say why the kernels cannot take the op's tensors; without tensors, why they cannot run at all."""
    if problem := compiled.refuse(tensors):
        return problem
    if len(tensors) > 2 and tensors[2] is not None and tensors[2].shape[1] > _MOST_STATES:
        return f"takes at most {_MOST_STATES} states, not {tensors[2].shape[1]}"
    return None


def saved_shape(u: Tensor, A: Tensor) -> tuple[int, ...]:
    """Shape of what `forward` keeps for `backward`: the state before every 16th step, (B, ceil(L / 16), D, N), padded."""
    return (u.shape[0], -(-u.shape[1] // _SUB), *(_fours(size) for size in A.shape))


def forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, bias: Tensor | None,
    initial: Tensor | None, softplus: bool, keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return y (B, L, D) in u's dtype, the final state (B, D, N) and the kept states (empty unless `keep`)."""
    call = _Call(_common(u, delta, B, C, z), u, A, backward=False)
    call.activations(u=u, delta=delta, B=B, C=C, z=z)
    call.weights(A=A, D=D, bias=bias, initial=initial)
    y = call.tokens("y", u.shape[2])
    state = call.states("state", A, u.shape[0])
    saved = call.buffer("saved", *saved_shape(u, A)) if keep else A.new_empty(0, dtype=torch.float32)
    call.run("fwd", softplus)
    return y.contiguous().to(u.dtype), state.contiguous(), saved


def backward(
    dy: Tensor, dstate: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, bias: Tensor | None, initial: Tensor | None, softplus: bool, saved: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return the gradients of (u, delta, A, B, C, D, z, bias, initial); equations as in `reference.backward`."""
    call = _Call(_common(u, delta, B, C, z), u, A, backward=True)
    call.activations(u=u, delta=delta, B=B, C=C, z=z, dy=dy)
    call.weights(A=A, D=D, bias=bias, initial=initial, dstate=dstate)
    call.point("saved", saved)
    (dim, state), batch, length = A.shape, *u.shape[:2]
    du, ddelta = call.tokens("du", dim), call.tokens("ddelta", dim)
    dz = None if z is None else call.tokens("dz", dim)
    dB, dC = call.tokens("dB", state), call.tokens("dC", state)
    dA, dinitial = call.states("dA", A), None if initial is None else call.states("dinitial", A, batch)
    dD, dbias = (call.buffer(name, call.dim)[:dim] for name in ("dD", "dbias"))
    blocks, rows = -(-dim // _channels(state, backward=True)), batch * call.params.chunks
    for name in ("part_B", "part_C"):
        call.buffer(name, blocks, batch, length, call.state)
    call.buffer("part_A", rows, call.dim, call.state)
    for name in ("part_D", "part_bias"):
        call.buffer(name, rows, call.dim)
    call.run("bwd", softplus)
    return du, ddelta, dA, dB, dC, None if D is None else dD, dz, None if bias is None else dbias, dinitial


class _Call:
    """One launch's arguments, and the tensors behind its pointers.

    The kernels take channels and states by fours, aligned: what is not so is copied and padded with zeros here, and
    results are cut.
    """

    def __init__(self, dtype: torch.dtype, u: Tensor, A: Tensor, *, backward: bool) -> None:
        batch, length, _ = u.shape
        self.dtype, self.u, self.held = dtype, u, list[Tensor]()
        self.dim, self.state = (_fours(size) for size in A.shape)
        chunk = plan(batch, length, self.dim, self.state, _multiprocessors(u.device), backward=backward)
        chunks = -(-length // chunk)
        self.params = _Params(
            batch=batch, length=length, dim=self.dim, state_size=self.state, chunks=chunks, chunk=chunk, sub=_SUB
        )
        if chunks > 1:
            self.buffer("end", batch, chunks, self.dim, self.state)
            self.buffer("total", batch, chunks, self.dim)

    def activations(self, **tensors: Tensor | None) -> None:
        """Point at (B, L, channels) tensors of any batch and row stride."""
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            tensor, channels = tensor.to(self.dtype), tensor.shape[2]
            if channels % 4:
                tensor = F.pad(tensor, (0, -channels % 4))
            elif tensor.stride(2) != 1 or tensor.stride(0) % 4 or tensor.stride(1) % 4 or tensor.stride(1) >= _LONGEST_ROW:
                tensor = tensor.contiguous()
            if tensor.data_ptr() % (4 * tensor.element_size()):
                tensor = tensor.clone(memory_format=torch.contiguous_format)
            self.point(name, tensor)
            setattr(self.params, f"{name}_batch", tensor.stride(0))
            setattr(self.params, f"{name}_row", tensor.stride(1) * tensor.element_size())

    def weights(self, **tensors: Tensor | None) -> None:
        """Point at (D,), (D, N) or (B, D, N) tensors, in fp32."""
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            tensor = tensor.to(torch.float32)
            missing = -tensor.shape[-1] % 4 if tensor.dim() == 1 else self.state - tensor.shape[-1]
            rows = 0 if tensor.dim() == 1 else self.dim - tensor.shape[-2]
            tensor = F.pad(tensor, (0, missing, 0, rows) if rows else (0, missing)) if missing or rows else tensor.contiguous()
            self.point(name, tensor.clone() if tensor.data_ptr() % 16 else tensor)

    def tokens(self, name: str, channels: int) -> Tensor:
        """An output (B, L, channels)."""
        batch, length, _ = self.u.shape
        whole = self.point(name, self.u.new_empty(batch, length, _fours(channels), dtype=self.dtype))
        return whole[..., :channels]

    def states(self, name: str, A: Tensor, *batch: int) -> Tensor:
        """An output (D, N) like A, or (batch, D, N)."""
        return self.buffer(name, *batch, self.dim, self.state)[..., : A.shape[0], : A.shape[1]]

    def buffer(self, name: str, *shape: int) -> Tensor:
        """A buffer in fp32."""
        return self.point(name, self.u.new_empty(shape, dtype=torch.float32))

    def point(self, name: str, tensor: Tensor) -> Tensor:
        """Give the kernels `tensor` as `name`."""
        setattr(self.params, name, tensor.data_ptr())
        self.held.append(tensor)  # a copy made here must live until the launch
        return tensor

    def run(self, direction: str, softplus: bool) -> None:
        """Launch the kernels."""
        self.params.softplus = softplus
        compiled.library().run(f"mfuser_selective_scan_{direction}_{_NAMES[self.dtype]}", self.params, like=self.u)


@functools.lru_cache(maxsize=1024)
def plan(batch: int, length: int, dim: int, state: int, multiprocessors: int, *, backward: bool) -> int:
    """Return the steps per chunk, a multiple of 16: those that take the least time by a rough model of the GPU.

    With more than one chunk, a first pass over all but one of them comes before.
    """
    blocks = batch * -(-dim // _channels(state, backward=backward))
    blocks_before = batch * -(-dim // _channels(state, backward=False))

    def on_each(blocks: int, chunks: float, costs: tuple[float, ...]) -> float:
        # the last chunk may be a short one, which nobody waits for
        rounds, rest = divmod(math.ceil(blocks * chunks / multiprocessors - 0.03), len(costs) - 1)
        return rounds * costs[-1] + costs[rest]

    def time(chunk: int) -> float:
        chunks = -(-length // chunk)
        second = chunk / _SUB * on_each(blocks, length / chunk, _SIXTEEN[backward])
        if chunks == 1:
            return second
        first = chunk / _SUB * on_each(blocks_before, length / chunk - 1, _FIRST_PASS)
        return first + second + _START + _BEFORE * chunks

    pieces = -(-length // _SUB)
    return min((-(-pieces // chunks) * _SUB for chunks in range(1, min(pieces, 128) + 1)), key=time)


def _fours(size: int) -> int:
    return size + -size % 4


def _channels(state: int, *, backward: bool) -> int:
    """Channels per block."""
    return next(channels[backward] for most, channels in _CHANNELS.items() if state <= most)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _common(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of all activations, or fp32 where they differ: none is rounded."""
    found = {tensor.dtype for tensor in tensors if tensor is not None}
    return found.pop() if len(found) == 1 else torch.float32
