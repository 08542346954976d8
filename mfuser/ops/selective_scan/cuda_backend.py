"""The selective scan in CUDA C++ (cuda/selective_scan.cuh): checks, memory and the two launches' arguments."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from mfuser.ops import compiled

_SUB = 16  # steps between kept states: kSub in the source, which refuses another
_LARGEST = 64  # states per channel
_LONGEST_ROW = 2**24  # elements between rows: 32 of them are counted in 31 bits of bytes
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Warps that an SM should have to work on before cutting sequences pays: every cut computes most exponentials twice.
_ENOUGH_WARPS = 8
_WANTED_WARPS = 16


class _Params(ctypes.Structure):
    """ScanParams of the source, field by field."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("u", "delta", "B", "C", "z", "A", "D", "bias", "initial")]
        + [(f"{name}_batch", ctypes.c_int64) for name in ("u", "delta", "B", "C", "z", "dy")]
        + [(f"{name}_row", ctypes.c_int) for name in ("u", "delta", "B", "C", "z", "dy")]
        + [(name, ctypes.c_void_p) for name in ("y", "state", "saved", "end", "total")]
        + [(name, ctypes.c_void_p) for name in ("dy", "dstate", "du", "ddelta", "dz", "dB", "dC", "dA", "dD", "dbias", "dinitial")]
        + [(name, ctypes.c_void_p) for name in ("part_B", "part_C", "part_A", "part_D", "part_bias")]
        + [(name, ctypes.c_int) for name in ("batch", "length", "dim", "state_size", "chunks", "chunk", "sub", "softplus")]
    )


def refuse(u: Tensor, *others: Tensor | None) -> str | None:
    """Say why the kernels cannot take these tensors, or None when they can."""
    try:
        device = compiled.library().device
    except ImportError as error:
        return str(error)
    if u.device.type != device:
        return f"runs on {device} tensors, these are on {u.device.type}"
    wide = next((t.dtype for t in (u, *others) if t is not None and t.dtype not in _NAMES), None)
    if wide is not None:
        return f"computes in fp32: {wide} is for the torch backend"
    if len(others) > 1 and others[1] is not None and others[1].shape[1] > _LARGEST:
        return f"holds up to {_LARGEST} states per channel, these have {others[1].shape[1]}"
    return None


def saved_shape(u: Tensor, A: Tensor) -> tuple[int, ...]:
    """Shape of what `forward` keeps for `backward`: the state before every 16th step, (B, ceil(L / 16), D, N)."""
    return (u.shape[0], -(-u.shape[1] // _SUB), *A.shape)


def forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, bias: Tensor | None,
    initial: Tensor | None, softplus: bool, keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return y (B, L, D) in u's dtype, the final state (B, D, N) and the kept states (empty unless `keep`)."""
    dtype, call = _common(u, delta, B, C, z), _Call(u, A)
    call.activations(dtype, u=u, delta=delta, B=B, C=C, z=z)
    call.weights(A=A, D=D, bias=bias, initial=initial)
    y = call.empty("y", *u.shape, dtype=dtype)
    state = call.empty("state", u.shape[0], *A.shape)
    saved = call.empty("saved", *saved_shape(u, A)) if keep else A.new_empty(0, dtype=torch.float32)
    call.run("forward", dtype, softplus)
    return y.to(u.dtype), state, saved


def backward(
    dy: Tensor, dstate: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, bias: Tensor | None, initial: Tensor | None, softplus: bool, saved: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return the gradients of (u, delta, A, B, C, D, z, bias, initial); equations as in `reference.backward`."""
    dtype, call = _common(u, delta, B, C, z), _Call(u, A)
    call.activations(dtype, u=u, delta=delta, B=B, C=C, z=z, dy=dy)
    call.weights(A=A, D=D, bias=bias, initial=initial, dstate=dstate, saved=saved)
    batch, length, dim = u.shape
    state = A.shape[1]
    blocks, rows = -(-dim // _channels(state, 8)), batch * call.params.chunks
    du, ddelta = (call.empty(name, *u.shape, dtype=dtype) for name in ("du", "ddelta"))
    dz = None if z is None else call.empty("dz", *u.shape, dtype=dtype)
    dB, dC = (call.empty(name, *B.shape, dtype=dtype) for name in ("dB", "dC"))
    dA, dD, dbias = call.empty("dA", dim, state), call.empty("dD", dim), call.empty("dbias", dim)
    dinitial = None if initial is None else call.empty("dinitial", batch, dim, state)
    for name in ("part_B", "part_C"):
        call.empty(name, blocks, batch, length, state)
    call.empty("part_A", rows, dim, state)
    for name in ("part_D", "part_bias"):
        call.empty(name, rows, dim)
    call.run("backward", dtype, softplus)
    return du, ddelta, dA, dB, dC, None if D is None else dD, dz, None if bias is None else dbias, dinitial


class _Call:
    """One launch's arguments, and the tensors behind its pointers."""

    def __init__(self, u: Tensor, A: Tensor) -> None:
        (batch, length, dim), state = u.shape, A.shape[1]
        chunk = plan(batch, length, dim, state, _multiprocessors(u.device))
        self.u, self.held, chunks = u, [], -(-length // chunk)
        self.params = _Params(
            batch=batch, length=length, dim=dim, state_size=state, chunks=chunks, chunk=chunk, sub=_SUB
        )  # fmt: skip
        if chunks > 1:
            self.empty("end", batch, chunks, dim, state)
            self.empty("total", batch, chunks, dim)

    def activations(self, dtype: torch.dtype, **tensors: Tensor | None) -> None:
        """Point at (B, L, channels) tensors of any batch and row stride."""
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            tensor = tensor.to(dtype)
            if (tensor.stride(2) != 1 and tensor.shape[2] > 1) or tensor.stride(1) >= _LONGEST_ROW:
                tensor = tensor.contiguous()
            self._point(name, tensor)
            setattr(self.params, f"{name}_batch", tensor.stride(0))
            setattr(self.params, f"{name}_row", tensor.stride(1) * tensor.element_size())

    def weights(self, **tensors: Tensor | None) -> None:
        """Point at fp32 tensors, contiguous."""
        for name, tensor in tensors.items():
            if tensor is not None:
                self._point(name, tensor.to(torch.float32).contiguous())

    def empty(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Make the output called `name`."""
        return self._point(name, self.u.new_empty(shape, dtype=dtype))

    def run(self, direction: str, dtype: torch.dtype, softplus: bool) -> None:
        self.params.softplus = softplus
        compiled.library().run(f"mfuser_selective_scan_{direction}_{_NAMES[dtype]}", self.params, like=self.u)

    def _point(self, name: str, tensor: Tensor) -> Tensor:
        setattr(self.params, name, tensor.data_ptr())
        self.held.append(tensor)  # a copy made here must live until the launch
        return tensor


def plan(batch: int, length: int, dim: int, state: int, multiprocessors: int) -> int:
    """Return the steps per chunk, a multiple of 16: the whole sequence where the channels alone keep the GPU busy."""
    warps = batch * -(-dim // _channels(state, 4)) * 4
    if warps >= multiprocessors * _ENOUGH_WARPS:
        chunks = 1
    else:
        chunks = -(-multiprocessors * _WANTED_WARPS // warps)
    return max(1, -(-length // (chunks * _SUB))) * _SUB


def _channels(state: int, warps: int) -> int:
    """Channels per block: 32 lanes a warp, four states a lane."""
    return warps * 32 // (2 if state <= 8 else 4 if state <= 16 else 16)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _common(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of all activations, or fp32 where they differ: none is rounded."""
    found = {tensor.dtype for tensor in tensors if tensor is not None}
    return found.pop() if len(found) == 1 else torch.float32
