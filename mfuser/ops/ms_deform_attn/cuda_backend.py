"""Multi-scale deformable attention by the kernels of `cuda/ms_deform_attn.cu`: checks and calls."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from mfuser.ops import compiled

_MAX_SCALES = 32
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MAX_SEGMENT = 65535
# Tuning parameters, by bytes of a channel: see the end of the struct in the source. With "processors" (132 on an H100),
# blocks of 1024 threads have a multiprocessor each, and its cache serves one head for long. No kernel takes more than 99 KB
# of shared memory, which every GPU from sm_80 on has.
_TUNING = {
    4: {
        "threads": 128,
        "query_bits": 2,
        "processors": 0,
        "repeat": 1,
        "gather_threads": 256,
        "gather_channels": 4,
        "cell_tile": 7,
        "sort_threads": 512,
        "window": 6144,
    },
    2: {
        "threads": 128,
        "query_bits": 2,
        "processors": 0,
        "repeat": 1,
        "gather_threads": 128,
        "gather_channels": 8,
        "cell_tile": 6,
        "sort_threads": 512,
        "window": 6144,
    },
}
# Points of a scale that a block sorts, unless those were more segments than that: a segment has counters of its own.
_SEGMENT, _SEGMENTS = 5632, 16


def refuse(*tensors: Tensor) -> str | None:
    """Say why the kernels cannot take (value, locations, weights); without tensors, why they cannot run at all."""
    if problem := compiled.refuse(tensors):
        return problem
    if len(tensors) == 3:
        _, queries, _, scales, points = tensors[2].shape
        if scales > _MAX_SCALES:
            return f"takes at most {_MAX_SCALES} scales, not {scales}"
        if queries << (points - 1).bit_length() >= 2**31:
            return f"takes fewer points of a scale than {queries} x {points}"
    return None


def forward(value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    """Return (B, Q, M * D). Shapes as in `ms_deform_attn`; `shapes` is flat, [H_0, W_0, H_1, ...]."""
    batch, queries, heads = locations.shape[:3]
    out = value.new_empty(batch, queries, heads * value.shape[3])
    if weights.numel() == 0 or out.numel() == 0:
        return out.zero_()
    value, locations, weights = _rows(value), _pairs(locations), _contiguous(weights)
    params = _params(value, shapes, locations, weights)
    params.out = out.data_ptr()
    compiled.library().run("mfuser_ms_deform_attn_fwd", params, like=value)
    return out


def backward(dout: Tensor, value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of value in its own type, and of locations and weights in fp32."""
    value, locations, weights = _rows(value), _pairs(locations), _contiguous(weights)
    dvalue = torch.empty_like(value)
    dlocations, dweights = (torch.empty_like(tensor, dtype=torch.float32) for tensor in (locations, weights))
    if weights.numel() == 0 or dout.numel() == 0:
        return dvalue.zero_(), dlocations.zero_(), dweights.zero_()
    dout = _contiguous(dout if dout.dtype is value.dtype else dout.to(value.dtype))
    params = _params(value, shapes, locations, weights)
    batch, queries, heads, scales, _ = weights.shape
    bins = sum((height + 1) * (width + 1) + 1 for height, width in zip(shapes[::2], shapes[1::2], strict=True))
    points = queries << params.point_bits
    params.segments = max(min(-(-points // _SEGMENT), _SEGMENTS), -(-points // _MAX_SEGMENT))
    ranks, starts = batch * heads * scales * points, batch * heads * bins
    counts = params.segments * starts
    scratch = torch.empty(16 * ranks + 4 * starts + 6 * counts + 2 * ranks, dtype=torch.uint8, device=value.device)
    params.entries = scratch.data_ptr()
    params.starts = params.entries + 16 * ranks
    params.places = params.starts + 4 * starts
    params.counts = params.places + 4 * counts
    params.ranks = params.counts + 2 * counts
    params.dout, params.dvalue = dout.data_ptr(), dvalue.data_ptr()
    params.dlocations, params.dweights = dlocations.data_ptr(), dweights.data_ptr()
    params.dvalue_stride[:] = dvalue.stride()[:3]
    compiled.library().run("mfuser_ms_deform_attn_bwd", params, like=value)
    return dvalue, dlocations, dweights


class _Params(ctypes.Structure):
    """`MsDeformAttnParams` of the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("value", "locations", "weights", "dout", "out", "dvalue")),
        *((name, ctypes.c_void_p) for name in ("dlocations", "dweights", "entries", "starts", "places", "counts", "ranks")),
        *((name, ctypes.c_longlong * 3) for name in ("value_stride", "dvalue_stride")),
        *((name, ctypes.c_int) for name in ("value_type", "location_type", "weight_type")),
        *((name, ctypes.c_int) for name in ("batch", "queries", "heads", "dim", "scales", "points", "point_bits", "segments")),
        *((name, ctypes.c_int) for name in _TUNING[4]),
        ("shapes", ctypes.c_int * (2 * _MAX_SCALES)),
    ]


def _params(value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor) -> _Params:
    batch, queries, heads, scales, points = weights.shape
    params = _Params(
        value=value.data_ptr(),
        locations=locations.data_ptr(),
        weights=weights.data_ptr(),
        value_type=_TYPES[value.dtype],
        location_type=_TYPES[locations.dtype],
        weight_type=_TYPES[weights.dtype],
        batch=batch,
        queries=queries,
        heads=heads,
        dim=value.shape[3],
        scales=scales,
        points=points,
        point_bits=(points - 1).bit_length(),
        **_TUNING[value.element_size()],
    )
    params.value_stride[:] = value.stride()[:3]
    params.shapes[: len(shapes)] = shapes
    return params


def _contiguous(tensor: Tensor) -> Tensor:
    """Return `tensor.contiguous()`, which is slow even if there is nothing to do."""
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _pairs(locations: Tensor) -> Tensor:
    """Return `locations`, contiguous and where x and y can be loaded as one."""
    locations = _contiguous(locations)
    return locations.clone() if locations.data_ptr() % 8 else locations


def _rows(value: Tensor) -> Tensor:
    """Return `value` with the channels of a row next to each other."""
    return value if value.stride(3) == 1 else value.contiguous()
