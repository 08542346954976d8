"""The selective scan in CUDA C++ (cuda/selective_scan.cuh): checks, memory and the two launches' arguments.

A call of a small batch takes less time on the GPU than a few dozen tensor operations take in Python: nothing is converted,
sliced or allocated here unless necessary.
"""

from __future__ import annotations

import ctypes
import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mfuser.ops import compiled

_SUB = 16  # steps between kept states: kSub in the source, which refuses other values
MOST_STATES = 64
_LONGEST_ROW = 2**24  # elements between rows: 32 of them are counted in 31 bits of bytes
_LAUNCHERS = {
    (direction, dtype): f"mfuser_selective_scan_{direction}_{name}"
    for direction in ("fwd", "bwd")
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16"))
}
_STRIDES = {name: (f"{name}_batch", f"{name}_row") for name in ("u", "delta", "B", "C", "z", "dy")}
# channels of a block by states at most, forward and backward: Place::kChannels
_CHANNELS = {8: (128, 64), 16: (64, 64), 64: (32, 16)}
# Times of the kernels for `plan`, in microseconds on an H200: 16 steps of one, two, ... blocks that share a multiprocessor, as
# many as it holds, in each direction; those of the first pass; the start of a kernel; and a chunk before a block's own.
_SIXTEEN = ((0.0, 1.4, 1.95, 2.75, 3.45), (0.0, 4.4, 6.1))
_FIRST_PASS = (0.0, 1.05, 1.4, 2.1, 2.65)
_START = 3.5
_BEFORE = 1.0


class Params(ctypes.Structure):
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
    if len(tensors) > 2 and tensors[2] is not None and tensors[2].shape[1] > MOST_STATES:
        return f"takes at most {MOST_STATES} states, not {tensors[2].shape[1]}"
    return None


def saved_shape(u: Tensor, A: Tensor) -> tuple[int, ...]:
    """Return the shape of what `forward` stores for `backward`: every 16th state, (B, ceil(L / 16), D, N), padded."""
    return kept_shape(*u.shape[:2], *A.shape)


def kept_shape(batch: int, length: int, dim: int, state: int) -> tuple[int, ...]:
    """Return the same shape, from sizes."""
    return batch, -(-length // _SUB), _fours(dim), _fours(state)


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
    """Return y (B, L, D) in u's dtype, the final state (B, D, N) and the kept states (empty unless `keep`)."""
    call = _Call(_common(u, delta, B, C, z), u, A, backward=False)
    call.inputs(u, delta, A, B, C, D, z, bias, initial)
    y = call.tokens("y", u)
    state = call.states("state", A, u.shape[0])
    saved = call.buffer("saved", *saved_shape(u, A)) if keep else A.new_empty(0, dtype=torch.float32)
    call.run("fwd", softplus)
    if not y.is_contiguous():
        y = y.contiguous()
    return y if y.dtype is u.dtype else y.to(u.dtype), state if state.is_contiguous() else state.contiguous(), saved


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
    """Return the gradients of (u, delta, A, B, C, D, z, bias, initial); equations as in `reference.backward`."""
    call = _Call(_common(u, delta, B, C, z), u, A, backward=True)
    call.inputs(u, delta, A, B, C, D, z, bias, initial)
    call.activation("dy", dy)
    if dstate is not None:
        call.weight("dstate", dstate)
    call.params.saved = saved.data_ptr()
    du, ddelta, dB, dC = call.tokens("du", u), call.tokens("ddelta", delta), call.tokens("dB", B), call.tokens("dC", C)
    dz = None if z is None else call.tokens("dz", z)
    dA, dinitial = call.states("dA", A), None if initial is None else call.states("dinitial", A, u.shape[0])
    dD, dbias = call.channels("dD", D), call.channels("dbias", bias)
    call.run("bwd", softplus)
    return du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial


@functools.lru_cache(maxsize=256)
def sized(
    batch: int, length: int, dim: int, state: int, multiprocessors: int, *, backward: bool
) -> tuple[Params, tuple[tuple[str, int], ...], int]:
    """Return the arguments of a launch for a shape, whose dim and state are multiples of four.

    Returns: the arguments that are sizes (to be copied); the names and byte offsets of those that are scratch memory, and
    how many bytes that is.
    """
    chunk = plan(batch, length, dim, state, multiprocessors, backward=backward)
    chunks, rows = -(-length // chunk), batch * -(-length // chunk)
    sizes = {"end": rows * dim * state, "total": rows * dim} if chunks > 1 else {}
    if backward:
        blocks = -(-dim // _channels(state, backward=True))
        sizes |= dict.fromkeys(("part_B", "part_C"), blocks * batch * length * state)
        sizes |= {"part_A": rows * dim * state, "part_D": rows * dim, "part_bias": rows * dim}
    params = Params(batch=batch, length=length, dim=dim, state_size=state, chunks=chunks, chunk=chunk, sub=_SUB)
    offsets, used = [], 0
    for name, size in sizes.items():
        offsets.append((name, used))
        used += -(-4 * size // 256) * 256
    return params, tuple(offsets), used


class _Call:
    """One launch's arguments, and the tensors behind its pointers.

    The kernels need channels and states in aligned multiples of four: other tensors are copied and padded with zeros here, and
    padding is removed from the results.
    """

    def __init__(self, dtype: torch.dtype, u: Tensor, A: Tensor, *, backward: bool) -> None:
        (batch, length, _), (self.dim, self.state) = u.shape, A.shape
        self.dtype, self.u = dtype, u
        self.held = list[Tensor]()  # copies, which must live until the launch
        # in memory
        self.wide_dim, self.wide_state = self.dim + -self.dim % 4, self.state + -self.state % 4
        params, scratch, size = sized(batch, length, self.wide_dim, self.wide_state, multiprocessors(u), backward=backward)
        self.params = Params.from_buffer_copy(params)
        if size:
            memory = torch.empty(size, dtype=torch.uint8, device=u.device)
            self.held.append(memory)
            first = memory.data_ptr()
            for name, offset in scratch:
                setattr(self.params, name, first + offset)

    def inputs(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        bias: Tensor | None,
        initial: Tensor | None,
    ) -> None:
        """Set the pointers that both directions need."""
        self.activation("u", u)
        self.activation("delta", delta)
        self.activation("B", B)
        self.activation("C", C)
        if z is not None:
            self.activation("z", z)
        self.weight("A", A)
        if D is not None:
            self.weight("D", D)
        if bias is not None:
            self.weight("bias", bias)
        if initial is not None:
            self.weight("initial", initial)

    def activation(self, name: str, tensor: Tensor) -> None:
        """Set the pointer to a (B, L, channels) tensor of any batch and row stride."""
        if tensor.dtype is not self.dtype:
            tensor = tensor.to(self.dtype)
        bytes_ = tensor.element_size()
        image, row, one = tensor.stride()
        if tensor.shape[2] % 4:
            tensor = F.pad(tensor, (0, -tensor.shape[2] % 4))
        elif one != 1 or image % 4 or row % 4 or row >= _LONGEST_ROW:
            tensor = tensor.contiguous()
        pointer = tensor.data_ptr()
        if pointer % (4 * bytes_):
            tensor = tensor.clone(memory_format=torch.contiguous_format)
            pointer = tensor.data_ptr()
        self.held.append(tensor)
        image, row, _ = tensor.stride()
        params, (batch_name, row_name) = self.params, _STRIDES[name]
        setattr(params, name, pointer)
        setattr(params, batch_name, image)
        setattr(params, row_name, row * bytes_)

    def weight(self, name: str, tensor: Tensor) -> None:
        """Set the pointer to a (D,), (D, N) or (B, D, N) tensor, in fp32."""
        if tensor.dtype is not torch.float32:
            tensor = tensor.float()
        columns = self.wide_state - self.state if tensor.dim() > 1 else self.wide_dim - self.dim
        rows = self.wide_dim - self.dim if tensor.dim() > 1 else 0
        if columns or rows:
            tensor = F.pad(tensor, (0, columns, 0, rows) if rows else (0, columns))
        elif not tensor.is_contiguous():
            tensor = tensor.contiguous()
        if tensor.data_ptr() % 16:
            tensor = tensor.clone()
        self.held.append(tensor)
        setattr(self.params, name, tensor.data_ptr())

    # `empty_like` alone takes a third of the time of an allocation by shape, type and device

    def tokens(self, name: str, like: Tensor) -> Tensor:
        """Return an output (B, L, channels) as `like`, contiguous unless it is cut."""
        batch, length, channels = like.shape
        if channels % 4:
            return self._point(name, like.new_empty(batch, length, _fours(channels), dtype=self.dtype))[..., :channels]
        if like.dtype is self.dtype and like.is_contiguous():
            return self._point(name, torch.empty_like(like))
        return self._point(name, like.new_empty(batch, length, channels, dtype=self.dtype))

    def states(self, name: str, A: Tensor, *batch: int) -> Tensor:
        """Return an output (D, N) like A, or (batch, D, N)."""
        if self.wide_dim != self.dim or self.wide_state != self.state:
            return self.buffer(name, *batch, self.wide_dim, self.wide_state)[..., : self.dim, : self.state]
        if batch or A.dtype is not torch.float32 or not A.is_contiguous():
            return self.buffer(name, *batch, self.dim, self.state)
        return self._point(name, torch.empty_like(A))

    def channels(self, name: str, given: Tensor | None) -> Tensor | None:
        """Return an output (D,), None where its input is; the kernels write it in any case."""
        if given is not None and given.dtype is torch.float32 and self.wide_dim == self.dim and given.is_contiguous():
            return self._point(name, torch.empty_like(given))
        whole = self.buffer(name, self.wide_dim)
        return None if given is None else whole[: self.dim]

    def buffer(self, name: str, *shape: int) -> Tensor:
        """Return a buffer in fp32."""
        return self._point(name, torch.empty(*shape, dtype=torch.float32, device=self.u.device))

    def _point(self, name: str, tensor: Tensor) -> Tensor:
        setattr(self.params, name, tensor.data_ptr())
        self.held.append(tensor)
        return tensor

    def run(self, direction: str, softplus: bool) -> None:
        """Launch the kernels."""
        self.params.softplus = softplus
        compiled.library().run(_LAUNCHERS[direction, self.dtype], self.params, like=self.u)


@functools.lru_cache(maxsize=1024)
def plan(batch: int, length: int, dim: int, state: int, multiprocessors: int, *, backward: bool) -> int:
    """Return the steps per chunk, a multiple of 16: those that take the least time by a rough model of the GPU.

    With more than one chunk, a first pass over all but one of them comes before.
    """
    blocks = batch * -(-dim // _channels(state, backward=backward))
    blocks_before = batch * -(-dim // _channels(state, backward=False))

    def on_each(blocks: int, chunks: float, costs: tuple[float, ...]) -> float:
        # the last chunk may be shorter, so that it does not delay the others
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
    """Return the channels per block."""
    return next(channels[backward] for most, channels in _CHANNELS.items() if state <= most)


def multiprocessors(tensor: Tensor) -> int:
    """Return the number of multiprocessors of the tensor's GPU; 1 for a CPU."""
    return _multiprocessors(tensor.get_device()) if tensor.is_cuda else 1


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _common(*tensors: Tensor | None) -> torch.dtype:
    """Return the dtype of all activations, or fp32 where they differ: none is rounded."""
    found = {tensor.dtype for tensor in tensors if tensor is not None}
    return found.pop() if len(found) == 1 else torch.float32
