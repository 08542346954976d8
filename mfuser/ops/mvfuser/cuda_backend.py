"""MVFuser's block by `cuda/mvfuser_block.cu`, one call for each direction: memory and arguments, no arithmetic.

h is half the width, M = B L, R + 2 N the rows of x_proj. A small batch keeps the GPU busy for less time than Python needs
for a few dozen tensor operations, so there are as few as can be: what the backward takes again is one buffer of bytes,
what one direction needs for itself another, and where everything lies in them is worked out once for each shape.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mfuser.ops import blas, compiled
from mfuser.ops.selective_scan import cuda_backend as scanner

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MANY = 16384  # tokens from which the GPU is full whatever a block does
# tokens of a convolution's block (few, many); the more, the fewer rows are read twice
_FORWARD_TOKENS, _BACKWARD_TOKENS = (32, 64), (64, 128)
_NORM_BLOCKS = 264  # of the norm's backward: two for each multiprocessor of an H100
_ALIGNED = 256  # bytes, where a piece of a buffer begins


def refuse(*tensors: Tensor | None) -> str | None:
    """Say why the kernels cannot take the parameters (a projection, A_log); without any, why they cannot run at all."""
    if problem := compiled.refuse(tensors) or _no_products():
        return problem
    if len(tensors) > 1 and tensors[1] is not None:
        half, state = tensors[1].shape
        if state % 4 or state > scanner.MOST_STATES:
            return f"takes 4, 8, ... {scanner.MOST_STATES} states, not {state}"
        if half % 4:
            return f"takes a multiple of 4 scanned channels, not {half}"
    return None


def forward(
    joint: Tensor,
    weights: Sequence[Tensor],
    eps: float,
    double_bias: bool,
    double_gate: bool,
    dtype: torch.dtype,
    scan: str,
    keep: bool,
) -> list[Tensor]:
    """Return the output and, if `keep`, the one buffer that `backward` takes as `kept`."""
    operands, small = _given(joint, weights, dtype)
    plan = _plan_of(joint, weights, operands, eps, double_bias, double_gate, dtype, keep=keep, backward=False)
    device = joint.device
    out = torch.empty_like(operands[0], dtype=dtype)
    if keep:
        kept = torch.empty(plan.kept, dtype=torch.uint8, device=device)
        scratch = torch.empty(plan.scratch, dtype=torch.uint8, device=device)
        first, second = kept.data_ptr(), scratch.data_ptr()
    else:
        scratch = torch.empty(plan.kept + plan.scratch, dtype=torch.uint8, device=device)
        first = scratch.data_ptr()
        second = first + plan.kept
    pointers = [t.data_ptr() for t in (*operands, *small)]
    pointers += (first, second, out.data_ptr(), 0, *_NO_GRADIENTS)
    _run("mfuser_mvfuser_block_fwd", plan, pointers, second, joint, dtype)
    return [out, kept] if keep else [out]


def kept(joint: Tensor, weights: Sequence[Tensor], dtype: torch.dtype, scan: str) -> list[Tensor]:
    """Return an empty tensor of the shape and type of what `forward` keeps."""
    in_proj, _, _, x_proj, dt_proj, _, A_log, _, _, out_proj, _ = weights
    types = [t.dtype if t.dtype == dtype else torch.float32 for t in (joint, in_proj, x_proj, dt_proj, out_proj)]
    (batch, length, width), (half, rank) = joint.shape, dt_proj.shape
    _, size = _placed(_kept_sizes(batch, length, width, half, rank, A_log.shape[1], dtype, types, True))
    return [joint.new_empty(size, dtype=torch.uint8)]


def backward(
    dout: Tensor,
    joint: Tensor,
    weights: Sequence[Tensor],
    kept: Sequence[Tensor],
    eps: float,
    double_bias: bool,
    double_gate: bool,
    dtype: torch.dtype,
    scan: str,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Return the gradients of joint and weights; that of a product which is not `needed` is empty."""
    operands, small = _given(joint, weights, dtype)
    plan = _plan_of(joint, weights, operands, eps, double_bias, double_gate, dtype, keep=True, backward=True)
    if dout.dtype is not dtype:
        dout = dout.to(dtype)
    if not dout.is_contiguous():
        dout = dout.contiguous()
    # a product's result has its operand's type, which is the activations' or fp32
    take = (needed[0], needed[1], needed[4], needed[5], needed[10])
    products = [torch.empty_like(t) if wanted else t.new_empty(0) for t, wanted in zip(operands, take, strict=True)]
    sums = [torch.empty_like(t) for t in small]
    scratch = torch.empty(plan.scratch, dtype=torch.uint8, device=joint.device)
    second = scratch.data_ptr()
    pointers = [t.data_ptr() for t in (*operands, *small)]
    pointers += (kept[0].data_ptr(), second, 0, dout.data_ptr())
    pointers += [t.data_ptr() if wanted else 0 for t, wanted in zip(products, take, strict=True)]
    pointers += [t.data_ptr() for t in sums]
    _run("mfuser_mvfuser_block_bwd", plan, pointers, second, joint, dtype)
    djoint, din, dx, ddt, dout_proj = products
    dconv_x, dconv_z, dbias, dA_log, dD, dnorm, dscale = sums
    grads = [djoint, din, dconv_x, dconv_z, dx, ddt, dbias, dA_log, dD, dnorm, dout_proj, dscale]
    for i, tensor in enumerate((joint, *weights)):
        if grads[i].dtype is not tensor.dtype:
            grads[i] = grads[i].to(tensor.dtype)
    return grads


class _Places(ctypes.Structure):
    """`MvfuserBlockKept` of the source: the operands first, joint, in_proj, x_proj, dt_proj and out_proj."""

    _fields_ = tuple(
        (name, ctypes.c_longlong)
        for name in (
            *("joint", "in_proj", "x_proj", "dt_proj", "out_proj"),
            *("A", "bias", "xz", "x", "z", "joined", "delta", "y", "saved"),
        )
    )


class _Scratch(ctypes.Structure):
    """`MvfuserBlockScratch` of the source."""

    _fields_ = tuple(
        (name, ctypes.c_longlong)
        for name in ("g", "state", "dg", "dy", "dz", "du", "ddelta", "dB", "dC", "djoined", "dA", "dbias", "conv", "norm")
    )


class _Shape(ctypes.Structure):
    """`MvfuserBlockShape` of the source."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("batch", "length", "width", "half", "rank", "state", "gate")),
        *((name, ctypes.c_float) for name in ("times", "eps")),
        ("type", ctypes.c_int),
        ("operand_type", ctypes.c_int * 5),
        *((name, ctypes.c_int) for name in ("forward_tokens", "backward_tokens", "norm_blocks")),
        ("kept", _Places),
        ("scratch", _Scratch),
    )


_Operands = ctypes.c_void_p * 5
_SMALL = ("conv_x", "conv_z", "dt_bias", "A_log", "D", "norm", "scale")


class _Params(ctypes.Structure):
    """`MvfuserBlockParams` of the source."""

    _fields_ = (
        ("operand", _Operands),
        *((name, ctypes.c_void_p) for name in (*_SMALL, "kept", "scratch", "out", "dout")),
        ("gradient", _Operands),
        *((f"d{name}", ctypes.c_void_p) for name in _SMALL),
        *((name, ctypes.c_void_p) for name in ("gemm", "handle")),
        ("compute", ctypes.c_int),
        ("shape", _Shape),
        ("scan", scanner.Params),
    )


# the fields before `shape`, which are each call's own: written in one go, a tenth of the time of an assignment for each
_OWN = struct.Struct(f"{_Params.compute.offset // struct.calcsize('P')}Pi")
_NO_GRADIENTS = (0,) * (5 + len(_SMALL))


class _Plan(NamedTuple):
    """What is the same for every call of a shape."""

    params: bytes  # with all but each call's own fields
    scan_scratch: tuple[tuple[str, int], ...]  # names and places in the scratch memory
    kept: int  # bytes
    scratch: int


@functools.lru_cache(maxsize=256)
def _plan(
    batch: int,
    length: int,
    width: int,
    dt_proj: torch.Size,
    state: int,
    eps: float,
    double_bias: bool,
    double_gate: bool,
    dtype: torch.dtype,
    operands: tuple[torch.dtype, ...],
    keep: bool,
    backward: bool,
    multiprocessors: int,
) -> _Plan:
    half, rank = dt_proj
    tokens, many = batch * length, batch * length >= _MANY
    forward_tokens, backward_tokens = _FORWARD_TOKENS[many], _BACKWARD_TOKENS[many]
    blocks = min(_NORM_BLOCKS, tokens)
    each = _size(tokens * half * dtype.itemsize)
    joined, states = tokens * (_fours(rank) + 2 * state) * dtype.itemsize, tokens * state * dtype.itemsize
    if backward:
        chunks = batch * -(-length // backward_tokens)
        # dy and, behind it, g have been read when dxz is written over them
        pieces = [("dg", each), ("dy", 2 * each), *((name, each) for name in ("dz", "du", "ddelta"))]
        pieces += [("dB", states), ("dC", states), ("djoined", joined), ("dA", 4 * half * state), ("dbias", 4 * half)]
        pieces += [("conv", 4 * chunks * 6 * half), ("norm", 4 * blocks * (half + 1))]
    else:
        pieces = [("g", each), ("state", 4 * batch * half * state)]
    places, scratch = _placed(pieces)
    if backward:
        places["g"] = places["dy"] + each
    kept_places, kept = _placed(_kept_sizes(batch, length, width, half, rank, state, dtype, operands, keep))
    scan, scan_scratch, size = scanner.sized(batch, length, half, state, multiprocessors, backward=backward)
    shape = _Shape(
        batch=batch,
        length=length,
        width=width,
        half=half,
        rank=rank,
        state=state,
        gate=double_gate,
        times=1.0 + double_bias,
        eps=eps,
        type=_TYPES[dtype],
        operand_type=tuple(_TYPES[t] for t in operands),
        forward_tokens=forward_tokens,
        backward_tokens=backward_tokens,
        norm_blocks=blocks,
        kept=_Places(**{"saved": -1} | kept_places),
        scratch=_Scratch(**places),
    )
    places_of_scan = tuple((name, scratch + place) for name, place in scan_scratch)
    return _Plan(bytes(_Params(shape=shape, scan=scan)), places_of_scan, kept, scratch + size)


def _kept_sizes(
    batch: int,
    length: int,
    width: int,
    half: int,
    rank: int,
    state: int,
    dtype: torch.dtype,
    operands: Sequence[torch.dtype],
    keep: bool,
) -> list[tuple[str, int]]:
    """Names and bytes of what lies in the kept buffer; a compiler gives sizes that are symbols."""
    tokens, bytes_ = batch * length, dtype.itemsize
    counts = (tokens * width, 2 * half * width, (rank + 2 * state) * half, half * rank, width * half)
    names = ("joint", "in_proj", "x_proj", "dt_proj", "out_proj")
    changed = zip(names, counts, operands, strict=True)
    sizes = [(name, count * bytes_) for name, count, given in changed if given != dtype]
    sizes += [("A", 4 * half * state), ("bias", 4 * half), ("xz", tokens * 2 * half * bytes_)]
    sizes += [(name, tokens * half * bytes_) for name in ("x", "z", "delta", "y")]
    sizes.append(("joined", tokens * (_fours(rank) + 2 * state) * bytes_))
    if keep:
        sizes.append(("saved", 4 * math.prod(scanner.kept_shape(batch, length, half, state))))
    return sizes


def _placed(sizes: Iterable[tuple[str, int]]) -> tuple[dict[str, int], int]:
    """Where each piece of a buffer begins, and the bytes of all."""
    places, used = {}, 0
    for name, size in sizes:
        places[name] = used
        used += _size(size)
    return places, used


def _size(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _fours(size: int) -> int:
    return -(-size // 4) * 4


def _given(joint: Tensor, weights: Sequence[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Return the products' operands in `dtype` or in fp32, from which the kernels cast, and the rest in fp32; all contiguous."""
    in_proj, conv_x, conv_z, x_proj, dt_proj, dt_bias, A_log, D, norm, out_proj, scale = weights
    operands, small = [joint, in_proj, x_proj, dt_proj, out_proj], [conv_x, conv_z, dt_bias, A_log, D, norm, scale]
    for i, tensor in enumerate(operands):
        kind = tensor.dtype
        if kind is not dtype and kind is not torch.float32:
            operands[i] = tensor.float().contiguous()
        elif not tensor.is_contiguous():
            operands[i] = tensor.contiguous()
    for i, tensor in enumerate(small):
        if tensor.dtype is not torch.float32 or not tensor.is_contiguous():
            small[i] = tensor.float().contiguous()
    if small[4].data_ptr() % 16:  # the scan loads D by fours
        small[4] = small[4].clone()
    return operands, small


def _plan_of(
    joint: Tensor,
    weights: Sequence[Tensor],
    operands: Sequence[Tensor],
    eps: float,
    double_bias: bool,
    double_gate: bool,
    dtype: torch.dtype,
    *,
    keep: bool,
    backward: bool,
) -> _Plan:
    batch, length, width = joint.shape
    types = tuple([t.dtype for t in operands])
    processors = scanner.multiprocessors(joint)
    return _plan(
        batch,
        length,
        width,
        weights[4].shape,
        weights[6].shape[1],
        eps,
        double_bias,
        double_gate,
        dtype,
        types,
        keep,
        backward,
        processors,
    )


def _no_products() -> str | None:
    """Why there is no cuBLAS to call."""
    if compiled.library().device == "cpu":
        return None  # the emulation has its own
    try:
        blas.gemm()
    except ImportError as error:
        return str(error)
    return None


def _products(like: Tensor, dtype: torch.dtype) -> tuple[int, int, int]:
    """cublasGemmEx, its handle and the type that it computes in."""
    if like.is_cuda:
        return blas.gemm(), blas.handle(like), blas.compute_type(dtype)
    return compiled.library().address("mfuser_gemm_ex"), 1, blas.compute_type(dtype)


def _run(name: str, plan: _Plan, pointers: list[int], scratch: int, like: Tensor, dtype: torch.dtype) -> None:
    params = _Params.from_buffer_copy(plan.params)
    gemm, handle, compute = _products(like, dtype)
    _OWN.pack_into(params, 0, *pointers, gemm, handle, compute)
    if plan.scan_scratch:
        scan = params.scan
        for field, place in plan.scan_scratch:
            setattr(scan, field, scratch + place)
    if like.is_cuda and blas.sums_in_fp32(dtype):
        with blas.adding_in_fp32(handle):
            compiled.library().run(name, params, like=like)
    else:
        compiled.library().run(name, params, like=like)
