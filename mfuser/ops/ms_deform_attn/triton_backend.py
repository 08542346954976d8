"""Multi-scale deformable attention as Triton kernels.

Forward: a program takes a block of queries of one head, and walks over their points with a (queries, channels) tile.
Backward: torch sorts the points by base cell, the upper left of their four neighbours (stably, so the order within a cell
is that of the queries). A program takes a few base cells: it sums dout over the points of each, once per neighbour, and the
inner products of dout with the neighbours' values give the gradients of weights and locations. A last kernel adds the four
sums that meet in a cell. No atomics: the same inputs give the same bits.

Locations are placed in fp32 whatever their type is; all sums are fp32. Under TRITON_INTERPRET=1 the kernels run on CPU
tensors, slowly.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mfuser.ops.dispatch import mismatch
from mfuser.ops.ms_deform_attn.triton_kernels_backend import _add, _bins, _collect, _gather, _sample

# tuning parameters
_TILE = 2048  # elements of the (queries, channels) tile of a program
_TILE_WARPS = 8
# of `_gather`, by bytes of a channel: base cells of a program, and points of each that it has at a time, for 32 channels
_GATHER = {4: {"cells": 4, "entries": 1, "warps": 1}, 2: {"cells": 4, "entries": 1, "warps": 1}}
_SUMS = 2048  # elements of the (cells, channels) tile of `_add`
_BLOCK = 256


def refuse(*tensors: Tensor) -> str | None:
    """Say why the kernels cannot take (value, locations, weights); without tensors, why they cannot run at all."""
    # interpreted (TRITON_INTERPRET=1), they run on a CPU, too
    devices = ("cuda",) if isinstance(_sample, triton.JITFunction) else ("cuda", "cpu")
    if problem := mismatch(tensors, *devices):
        return problem
    if len(tensors) == 3 and tensors[2].numel() >= 2**30:
        return f"takes fewer than 2^30 points, not {tensors[2].numel()}"
    return None


def forward(value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    """Return (B, Q, M * D). Shapes as in `ms_deform_attn`; `shapes` is flat, [H_0, W_0, H_1, ...]."""
    out = value.new_empty(*locations.shape[:3], value.shape[3])
    if weights.numel() == 0 or out.numel() == 0:
        return out.zero_().flatten(2)
    value, locations, weights = _rows(value), locations.contiguous(), weights.contiguous()
    batch, queries, heads, scales, points = weights.shape
    dim = triton.next_power_of_2(value.shape[3])
    side = 1 << (max(_TILE // dim, 1).bit_length() - 1) // 2
    # if there are as many queries as cells, they are treated as these, so that a program's are neighbours on the map
    tiled = queries == value.shape[1]
    if tiled:
        blocks = sum(triton.cdiv(h, side) * triton.cdiv(w, side) for h, w in zip(shapes[::2], shapes[1::2], strict=True))
    else:
        blocks = triton.cdiv(queries, side * side)
    with _device_of(value):
        _sample[(blocks * batch * heads,)](
            value,
            locations,
            weights,
            out,
            tuple(shapes),
            blocks,
            queries,
            heads,
            *value.stride()[:3],
            S=scales,
            P=points,
            D=value.shape[3],
            BLOCK_D=dim,
            SIDE=side,
            TILED=tiled,
            num_warps=_TILE_WARPS,
        )
    return out.flatten(2)


def backward(dout: Tensor, value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of value in its own type, and of locations and weights in fp32."""
    value, locations, weights = _rows(value), locations.contiguous(), weights.contiguous()
    dvalue = torch.empty_like(value)
    dlocations, dweights = (torch.empty_like(tensor, dtype=torch.float32) for tensor in (locations, weights))
    if weights.numel() == 0 or dout.numel() == 0:
        return dvalue.zero_(), dlocations.zero_(), dweights.zero_()
    dout = dout.to(value.dtype).contiguous()
    batch, queries, heads, scales, points = weights.shape
    dim, images_heads = value.shape[3], batch * heads
    maps = list(zip(shapes[::2], shapes[1::2], strict=True))
    bins = sum((height + 1) * (width + 1) for height, width in maps)
    # the sort takes a pass per byte
    key_type = torch.int16 if bins < 2**15 else torch.int32
    keys = torch.empty(batch, heads, scales, queries, points, dtype=key_type, device=value.device)
    ends = torch.zeros(bins, images_heads, 2, dtype=torch.int32, device=value.device)  # where a bin's points start and end
    count = keys.numel()
    sources = torch.empty(count, dtype=torch.int32, device=value.device)
    places = torch.empty(3, count, dtype=torch.float32, device=value.device)
    sums = torch.empty(4, images_heads, bins, dim, dtype=torch.float32, device=value.device)
    block_dim = triton.next_power_of_2(dim)
    tuned = _GATHER[value.element_size()]
    entries = max(tuned["entries"] * 32 // max(block_dim, 32), 1)
    cells_per_sum = max(_SUMS // block_dim, 1)
    blocks = sum(triton.cdiv((height + 1) * (width + 1), tuned["cells"]) for height, width in maps)
    with _device_of(value):
        _bins[(triton.cdiv(count, _BLOCK),)](
            locations, dlocations, dweights, keys, tuple(shapes), count, queries, heads, bins, S=scales, P=points, BLOCK=_BLOCK
        )
        in_order, order = torch.sort(keys.flatten(), stable=True)
        _collect[(triton.cdiv(count, _BLOCK),)](
            in_order,
            order,
            locations,
            weights,
            ends,
            sources,
            places,
            tuple(shapes),
            count,
            queries,
            heads,
            images_heads,
            bins,
            S=scales,
            P=points,
            BLOCK=_BLOCK,
        )
        _gather[(blocks * images_heads,)](
            dout,
            value,
            sources,
            places,
            ends,
            sums,
            dlocations,
            dweights,
            tuple(shapes),
            count,
            blocks,
            bins,
            queries,
            heads,
            *value.stride()[:3],
            S=scales,
            P=points,
            D=dim,
            BLOCK_D=block_dim,
            CELLS=tuned["cells"],
            ENTRIES=entries,
            num_warps=tuned["warps"],
        )
        add_blocks = triton.cdiv(value.shape[1], cells_per_sum)
        _add[(add_blocks * images_heads,)](
            sums,
            dvalue,
            tuple(shapes),
            value.shape[1],
            add_blocks,
            bins,
            heads,
            *dvalue.stride()[:3],
            S=scales,
            D=dim,
            BLOCK_D=block_dim,
            CELLS=cells_per_sum,
        )
    return dvalue, dlocations, dweights


def _rows(value: Tensor) -> Tensor:
    """Return `value` with the channels of a row next to each other."""
    return value if value.stride(3) == 1 else value.contiguous()


def _device_of(tensor: Tensor) -> torch.cuda.device:
    """Return the context in which Triton launches on the GPU of `tensor`; does nothing for a CPU."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)
