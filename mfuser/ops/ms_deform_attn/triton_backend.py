"""Multi-scale deformable attention as Triton kernels.

Forward: a program takes a block of queries of one head, and walks over their points with a (queries, channels) tile.
Backward: the same walk gives the gradients of weights and locations, and the base cell of every point, the upper left of
its four neighbours. For the gradients of values torch sorts the points by base cell (stably, so the order within a cell
is that of the queries), and a program sums dout over the points based at a cell and at its three neighbours above and to
the left. No atomics: the same inputs give the same bits.

Locations are placed in fp32 whatever their type is; all sums are fp32. Under TRITON_INTERPRET=1 the kernels run on CPU
tensors, slowly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfuser.ops.dispatch import mismatch

# what may be tuned
_TILE = 2048  # elements of the (queries, channels) tile of a program
_TILE_WARPS = 8
_CELLS = 4  # whose gradients are summed at a time
_ENTRIES = 32  # points of each cell that are summed at a time
_CELLS_WARPS = 4
_STEPS = 16  # such sums in a program, about
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
    with _device_of(value):
        _launch(_sample, value, shapes, locations, weights, out)
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
    maps = list(zip(shapes[::2], shapes[1::2], strict=True))
    bins = sum((height + 1) * (width + 1) for height, width in maps) + 1
    # the sort takes a pass per byte
    key_type = torch.int16 if bins < 2**15 else torch.int32
    keys = torch.empty(batch, heads, scales, queries, points, dtype=key_type, device=value.device)
    ends = torch.zeros(bins, batch * heads, 2, dtype=torch.int32, device=value.device)  # where a bin's points start and end
    count = keys.numel()
    sources = torch.empty(count, dtype=torch.int32, device=value.device)
    shares = torch.empty(count, 4, dtype=torch.float32, device=value.device)
    sides = [_side(height, width, queries * points) for height, width in maps]
    tiles = sum(triton.cdiv(h, side) * triton.cdiv(w, side) for (h, w), side in zip(maps, sides, strict=True))
    with _device_of(value):
        _launch(_probe, value, shapes, locations, weights, dout, dlocations, dweights, keys, bins - 1)
        in_order, order = torch.sort(keys.flatten(), stable=True)
        _collect[(triton.cdiv(count, _BLOCK),)](
            in_order, order, locations, weights, ends, sources, shares, tuple(shapes), count, queries, heads, batch * heads,
            bins - 1, S=scales, P=points, BLOCK=_BLOCK,
        )  # fmt: skip
        _gather[(tiles * batch * heads,)](
            dout, sources, shares, ends, dvalue, tuple(shapes), tuple(sides), tiles, queries, heads, *dvalue.stride()[:3],
            S=scales, D=value.shape[3], BLOCK_D=triton.next_power_of_2(value.shape[3]), CELLS=_CELLS, ENTRIES=_ENTRIES,
            num_warps=_CELLS_WARPS,
        )  # fmt: skip
    return dvalue, dlocations, dweights


def _side(height: int, width: int, points: int) -> int:
    """The side of the tile of cells of a program of `_gather`, for a map and the points that fall into it."""
    sums = 1 + 4 * points // (height * width * _ENTRIES)  # of a cell, about
    side = 1 << (max(_STEPS * _CELLS // sums, 1).bit_length() - 1) // 2
    return min(side, triton.next_power_of_2(max(height, width)))


def _launch(kernel, value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor, *more) -> None:
    """Run `_sample` or `_probe`, which share their first parameters and the last."""
    batch, queries, heads, scales, points = weights.shape
    dim = triton.next_power_of_2(value.shape[3])
    side = 1 << (max(_TILE // dim, 1).bit_length() - 1) // 2
    # queries that number as many as the cells are taken for these, so that a program's are neighbours on the map
    tiled = queries == value.shape[1]
    if tiled:
        blocks = sum(triton.cdiv(h, side) * triton.cdiv(w, side) for h, w in zip(shapes[::2], shapes[1::2], strict=True))
    else:
        blocks = triton.cdiv(queries, side * side)
    kernel[(blocks * batch * heads,)](
        value, locations, weights, *more, tuple(shapes), blocks, queries, heads, *value.stride()[:3],
        S=scales, P=points, BLOCK_P=triton.next_power_of_2(points), D=value.shape[3], BLOCK_D=dim, SIDE=side, TILED=tiled,
        num_warps=_TILE_WARPS,
    )  # fmt: skip


def _rows(value: Tensor) -> Tensor:
    """`value` with the channels of a row next to each other."""
    return value if value.stride(3) == 1 else value.contiguous()


def _device_of(tensor: Tensor) -> torch.cuda.device:
    """The context in which Triton launches on the GPU of `tensor`; does nothing for a CPU."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)


@triton.jit
def _queries(block, shapes, queries, S: tl.constexpr, SIDE: tl.constexpr, TILED: tl.constexpr):
    """The queries of a program, -1 for none: a square of a map, or a run."""
    i = tl.arange(0, SIDE * SIDE)
    if TILED:
        query = tl.full([SIDE * SIDE], -1, tl.int32)
        tile, cell = block, 0
        for s in tl.static_range(S):
            height, width = shapes[2 * s], shapes[2 * s + 1]
            columns = (width + SIDE - 1) // SIDE
            tiles = (height + SIDE - 1) // SIDE * columns
            row = tile // columns * SIDE + i // SIDE
            column = tile % columns * SIDE + i % SIDE
            here = (tile >= 0) & (tile < tiles) & (row < height) & (column < width)
            query = tl.where(here, cell + row * width + column, query)
            tile -= tiles
            cell += height * width
    else:
        query = block * (SIDE * SIDE) + i
        query = tl.where(query < queries, query, -1)
    return query


@triton.jit
def _place(locations, point, height, width, mask):
    """The base cell of each point, -1 being the border before the first, and the way on to the next cell, 0..1."""
    x = tl.load(locations + 2 * point, mask=mask, other=0.0).to(tl.float32) * width - 0.5
    y = tl.load(locations + 2 * point + 1, mask=mask, other=0.0).to(tl.float32) * height - 0.5
    # false for what is not a number
    inside = mask & (x > -1) & (x < width) & (y > -1) & (y < height)
    x = tl.where(inside, x, 0.0)
    y = tl.where(inside, y, 0.0)
    left, top = tl.floor(x), tl.floor(y)
    return top.to(tl.int32), left.to(tl.int32), y - top, x - left, inside


@triton.jit
def _neighbour(top, left, inside, height, width, CORNER: tl.constexpr):
    """Of the four from upper left to lower right: its cell in the map, and whether it is on the map."""
    row, column = top + CORNER // 2, left + CORNER % 2
    return row * width + column, inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)


@triton.jit
def _sample(
    value, locations, weights, out, shapes, blocks, queries, heads, stride_batch, stride_cell, stride_head,
    S: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SIDE: tl.constexpr,
    TILED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head, image = (program // blocks % heads).to(tl.int64), (program // blocks // heads).to(tl.int64)
    query = _queries(program % blocks, shapes, queries, S, SIDE, TILED)
    found = query >= 0
    row = (image * queries + query) * heads + head
    d = tl.arange(0, BLOCK_D)
    channels = (d < D)[None]
    base = value + image * stride_batch + head * stride_head + d[None]
    total = tl.zeros([SIDE * SIDE, BLOCK_D], tl.float32)
    first = 0
    for s in tl.static_range(S):
        height, width = shapes[2 * s], shapes[2 * s + 1]
        for p in range(P):
            point = (row * S + s) * P + p
            top, left, y, x, inside = _place(locations, point, height, width, found)
            weight = tl.load(weights + point, mask=inside, other=0.0).to(tl.float32)
            for corner in tl.static_range(4):
                offset, on = _neighbour(top, left, inside, height, width, corner)
                share = weight * (y if corner // 2 else 1 - y) * (x if corner % 2 else 1 - x)
                offset = (first + offset).to(tl.int64) * stride_cell
                cells = tl.load(base + offset[:, None], mask=on[:, None] & channels, other=0.0).to(tl.float32)
                total += share[:, None] * cells
        first += height * width
    tl.store(out + row[:, None] * D + d[None], total.to(out.dtype.element_ty), mask=found[:, None] & channels)


@triton.jit
def _probe(
    value, locations, weights, dout, dlocations, dweights, keys, outside, shapes, blocks, queries, heads,
    stride_batch, stride_cell, stride_head,
    S: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SIDE: tl.constexpr,
    TILED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head, image = (program // blocks % heads).to(tl.int64), (program // blocks // heads).to(tl.int64)
    query = _queries(program % blocks, shapes, queries, S, SIDE, TILED)
    found = query >= 0
    row = (image * queries + query) * heads + head
    d = tl.arange(0, BLOCK_D)
    channels = (d < D)[None]
    base = value + image * stride_batch + head * stride_head + d[None]
    probe = tl.load(dout + row[:, None] * D + d[None], mask=found[:, None] & channels, other=0.0).to(tl.float32)
    first, bins = 0, 0
    all_p = tl.arange(0, BLOCK_P)[None]
    kept = found[:, None] & (all_p < P)
    for s in tl.static_range(S):
        height, width = shapes[2 * s], shapes[2 * s + 1]
        # the neighbours' inner products with dout, gathered for all points: a store per point would cost barriers
        inner0 = tl.zeros([SIDE * SIDE, BLOCK_P], tl.float32)
        inner1, inner2, inner3 = inner0, inner0, inner0
        for p in range(P):
            top, left, _, _, inside = _place(locations, (row * S + s) * P + p, height, width, found)
            here = all_p == p
            for corner in tl.static_range(4):
                offset, on = _neighbour(top, left, inside, height, width, corner)
                offset = (first + offset).to(tl.int64) * stride_cell
                cells = tl.load(base + offset[:, None], mask=on[:, None] & channels, other=0.0).to(tl.float32)
                inner = tl.sum(cells * probe, 1)[:, None]
                if corner == 0:
                    inner0 = tl.where(here, inner, inner0)
                elif corner == 1:
                    inner1 = tl.where(here, inner, inner1)
                elif corner == 2:
                    inner2 = tl.where(here, inner, inner2)
                else:
                    inner3 = tl.where(here, inner, inner3)
        all_points = (row * S + s)[:, None] * P + all_p
        tops, lefts, y, x, all_inside = _place(locations, all_points, height, width, kept)
        inner0 = tl.where(_neighbour(tops, lefts, all_inside, height, width, 0)[1], inner0, 0.0)
        inner1 = tl.where(_neighbour(tops, lefts, all_inside, height, width, 1)[1], inner1, 0.0)
        inner2 = tl.where(_neighbour(tops, lefts, all_inside, height, width, 2)[1], inner2, 0.0)
        inner3 = tl.where(_neighbour(tops, lefts, all_inside, height, width, 3)[1], inner3, 0.0)
        weight = tl.load(weights + all_points, mask=all_inside, other=0.0).to(tl.float32)
        upper, lower = (1 - x) * inner0 + x * inner1, (1 - x) * inner2 + x * inner3
        across = (1 - y) * (inner1 - inner0) + y * (inner3 - inner2)
        tl.store(dweights + all_points, (1 - y) * upper + y * lower, mask=kept)
        tl.store(dlocations + 2 * all_points, across * weight * width, mask=kept)
        tl.store(dlocations + 2 * all_points + 1, (lower - upper) * weight * height, mask=kept)
        key = tl.where(all_inside, bins + (tops + 1) * (width + 1) + lefts + 1, outside)
        entry = (((image * heads + head) * S + s) * queries + query)[:, None] * P + all_p
        tl.store(keys + entry, key.to(keys.dtype.element_ty), mask=kept)
        first += height * width
        bins += (height + 1) * (width + 1)


@triton.jit
def _collect(
    in_order, order, locations, weights, ends, sources, shares, shapes, count, queries, heads, images_heads, outside,
    S: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write, in the order of the base cells, each point's query and its neighbours' shares, and where the points of each
    (bin, image and head) start and end. The points of one bin are ordered by image and head."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    key = tl.load(in_order + i, mask=mask, other=0).to(tl.int32)
    entry = tl.load(order + i, mask=mask, other=0).to(tl.int32)
    point, rest = entry % P, entry // P
    query, rest = rest % queries, rest // queries
    scale, image_head = rest % S, rest // S

    before, after = mask & (i > 0), mask & (i + 1 < count)
    entry_before = tl.load(order + i - 1, mask=before, other=-1).to(tl.int32)
    entry_after = tl.load(order + i + 1, mask=after, other=-1).to(tl.int32)
    per_head = P * queries * S
    starts = (tl.load(in_order + i - 1, mask=before, other=-1) != key) | (entry_before // per_head != image_head)
    stops = (tl.load(in_order + i + 1, mask=after, other=-1) != key) | (entry_after // per_head != image_head)
    inside = mask & (key != outside)
    slot = key.to(tl.int64) * images_heads + image_head
    tl.store(ends + 2 * slot, i, mask=inside & starts)
    tl.store(ends + 2 * slot + 1, i + 1, mask=inside & stops)

    height, width = tl.full([BLOCK], 0, tl.int32), tl.full([BLOCK], 0, tl.int32)
    for s in tl.static_range(S):
        height = tl.where(scale == s, shapes[2 * s], height)
        width = tl.where(scale == s, shapes[2 * s + 1], width)
    row = (image_head // heads).to(tl.int64) * queries + query
    index = ((row * heads + image_head % heads) * S + scale) * P + point
    _, _, y, x, _ = _place(locations, index, height, width, inside)
    weight = tl.load(weights + index, mask=inside, other=0.0).to(tl.float32)
    tl.store(sources + i, query, mask=inside)
    to = shares + 4 * i.to(tl.int64)
    tl.store(to, weight * (1 - y) * (1 - x), mask=inside)
    tl.store(to + 1, weight * (1 - y) * x, mask=inside)
    tl.store(to + 2, weight * y * (1 - x), mask=inside)
    tl.store(to + 3, weight * y * x, mask=inside)


@triton.jit
def _gather(
    dout, sources, shares, ends, dvalue, shapes, sides, tiles, queries, heads, stride_batch, stride_cell, stride_head,
    S: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CELLS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    tile, image_head = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    images_heads = (tl.num_programs(0) // tiles).to(tl.int64)
    head, image = image_head % heads, image_head // heads
    # which scale the tile is of, and where it is there
    height, width, side, first, bins, here = shapes[0], shapes[1], sides[0], 0, 0, tile
    cell, bin_ = 0, 0
    for s in tl.static_range(S):
        columns = (shapes[2 * s + 1] + sides[s] - 1) // sides[s]
        count = (shapes[2 * s] + sides[s] - 1) // sides[s] * columns
        if (tile >= 0) & (tile < count):
            height, width, side, first, bins, here = shapes[2 * s], shapes[2 * s + 1], sides[s], cell, bin_, tile
        tile -= count
        cell += shapes[2 * s] * shapes[2 * s + 1]
        bin_ += (shapes[2 * s] + 1) * (shapes[2 * s + 1] + 1)
    columns = (width + side - 1) // side
    d = tl.arange(0, BLOCK_D)
    rows = dout + (image * queries * heads + head) * D + d[None, None]
    channels = (d < D)[None, None]
    for i in range(0, side * side, CELLS):
        c = i + tl.arange(0, CELLS)
        row, column = here // columns * side + c // side, here % columns * side + c % side
        on = (c < side * side) & (row < height) & (column < width)
        # the base cells that reach it: upper left, upper (one row up), left, itself
        upper = ends + 2 * ((bins + row * (width + 1) + column) * images_heads + image_head)
        lower = upper + 2 * (width + 1) * images_heads
        right = 2 * images_heads
        start0, start1 = tl.load(upper, mask=on, other=0), tl.load(upper + right, mask=on, other=0)
        start2, start3 = tl.load(lower, mask=on, other=0), tl.load(lower + right, mask=on, other=0)
        # their points count as one list, that of the first before that of the second
        stop0 = tl.load(upper + 1, mask=on, other=0) - start0
        stop1 = tl.load(upper + right + 1, mask=on, other=0) - start1 + stop0
        stop2 = tl.load(lower + 1, mask=on, other=0) - start2 + stop1
        stop3 = tl.load(lower + right + 1, mask=on, other=0) - start3 + stop2
        total = tl.zeros([CELLS, ENTRIES, BLOCK_D], tl.float32)
        for done in range(0, tl.max(stop3, 0), ENTRIES):
            e = done + tl.arange(0, ENTRIES)[None]
            in0, in1, in2 = e < stop0[:, None], e < stop1[:, None], e < stop2[:, None]
            mask = e < stop3[:, None]
            at = tl.where(in0, start0[:, None], (start1 - stop0)[:, None])
            at = e + tl.where(in1, at, tl.where(in2, (start2 - stop1)[:, None], (start3 - stop2)[:, None]))
            corner = tl.where(in0, 3, tl.where(in1, 2, tl.where(in2, 1, 0)))
            source = tl.load(sources + at, mask=mask, other=0).to(tl.int64) * (heads * D)
            share = tl.load(shares + 4 * at.to(tl.int64) + corner, mask=mask, other=0.0)
            probe = tl.load(rows + source[:, :, None], mask=mask[:, :, None] & channels, other=0.0).to(tl.float32)
            total += share[:, :, None] * probe
        to = dvalue + image * stride_batch + head * stride_head + (first + row * width + column).to(tl.int64) * stride_cell
        tl.store(to[:, None] + d[None], tl.sum(total, 1).to(dvalue.dtype.element_ty), mask=on[:, None] & (d < D)[None])
