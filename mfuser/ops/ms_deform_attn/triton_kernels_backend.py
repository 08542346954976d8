"""The kernels of `triton_backend`: the forward, and the passes of the backward in their order."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _queries(block, shapes, queries, S: tl.constexpr, SIDE: tl.constexpr, TILED: tl.constexpr):
    """Return the queries of a program, -1 for none: a square of a map, or a run."""
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
    """Return the base cell of each point, -1 for the border before the first, and the offset to the next cell, 0..1."""
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
    """Return a neighbour (of four, upper left to lower right): its cell in the map, and whether it is on the map."""
    row, column = top + CORNER // 2, left + CORNER % 2
    return row * width + column, inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)


@triton.jit
def _sample(
    value,
    locations,
    weights,
    out,
    shapes,
    blocks,
    queries,
    heads,
    stride_batch,
    stride_cell,
    stride_head,
    S: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SIDE: tl.constexpr,
    TILED: tl.constexpr,
):
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
def _numbers(entry, queries, heads, S: tl.constexpr, P: tl.constexpr):
    """Return the numbers of points in the order of (image, head, scale, query, point).

    They are query * P + point, the scale, image * heads + head, and the index among locations and weights.
    """
    source, rest = entry % (queries * P), entry // (queries * P)
    scale, image_head = rest % S, rest // S
    row = ((image_head // heads).to(tl.int64) * queries + source // P) * heads + image_head % heads
    return source, scale, image_head, (row * S + scale) * P + source % P


@triton.jit
def _map(scale, shapes, S: tl.constexpr):
    """Return height, width and first bin of each point's map."""
    height, width, first = scale * 0, scale * 0, scale * 0
    bins = 0
    for s in tl.static_range(S):
        height = tl.where(scale == s, shapes[2 * s], height)
        width = tl.where(scale == s, shapes[2 * s + 1], width)
        first = tl.where(scale == s, bins, first)
        bins += (shapes[2 * s] + 1) * (shapes[2 * s + 1] + 1)
    return height, width, first


@triton.jit
def _bins(
    locations,
    dlocations,
    dweights,
    keys,
    shapes,
    count,
    queries,
    heads,
    outside,
    S: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the bin of each point's base cell, and the gradients of the points outside, which `_gather` does not meet."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    _, scale, _, index = _numbers(i, queries, heads, S, P)
    height, width, first = _map(scale, shapes, S)
    top, left, _, _, inside = _place(locations, index, height, width, mask)
    key = tl.where(inside, first + (top + 1) * (width + 1) + left + 1, outside)
    tl.store(keys + i, key.to(keys.dtype.element_ty), mask=mask)
    lost = mask & (inside == 0)
    zero = tl.zeros([BLOCK], tl.float32)
    tl.store(dweights + index, zero, mask=lost)
    tl.store(dlocations + 2 * index, zero, mask=lost)
    tl.store(dlocations + 2 * index + 1, zero, mask=lost)


@triton.jit
def _collect(
    in_order,
    order,
    locations,
    weights,
    ends,
    sources,
    places,
    shapes,
    count,
    queries,
    heads,
    images_heads,
    outside,
    S: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write what `_gather` needs of each point, in the order of the base cells.

    Also write where the points of each (bin, image and head) start and end. Points of one bin are ordered by image and head.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    key = tl.load(in_order + i, mask=mask, other=0).to(tl.int32)
    entry = tl.load(order + i, mask=mask, other=0).to(tl.int32)
    source, scale, image_head, index = _numbers(entry, queries, heads, S, P)

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

    height, width, _ = _map(scale, shapes, S)
    _, _, y, x, _ = _place(locations, index, height, width, inside)
    tl.store(sources + i, source, mask=inside)
    tl.store(places + i, y, mask=inside)
    tl.store(places + count + i, x, mask=inside)
    tl.store(places + 2 * count + i, tl.load(weights + index, mask=inside, other=0.0).to(tl.float32), mask=inside)


@triton.jit
def _gather(
    dout,
    value,
    sources,
    places,
    ends,
    sums,
    dlocations,
    dweights,
    shapes,
    count,
    blocks,
    bins,
    queries,
    heads,
    stride_batch,
    stride_cell,
    stride_head,
    S: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CELLS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Sum dout over the points of each base cell, one per neighbour, and compute the gradients of these points."""
    block, image_head = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    images_heads = (tl.num_programs(0) // blocks).to(tl.int64)
    head, image = image_head % heads, image_head // heads
    # which scale the base cells are of, and where they are there
    height, width, scale, first, first_bin, here = shapes[0], shapes[1], 0, 0, 0, block
    cell, bin_ = 0, 0
    for s in tl.static_range(S):
        bases = (shapes[2 * s] + 1) * (shapes[2 * s + 1] + 1)
        if (block >= 0) & (block < (bases + CELLS - 1) // CELLS):
            height, width, scale, first, first_bin, here = shapes[2 * s], shapes[2 * s + 1], s, cell, bin_, block
        block -= (bases + CELLS - 1) // CELLS
        cell += shapes[2 * s] * shapes[2 * s + 1]
        bin_ += bases
    c = here * CELLS + tl.arange(0, CELLS)
    real = c < (height + 1) * (width + 1)
    top, left = c // (width + 1) - 1, c % (width + 1) - 1
    d = tl.arange(0, BLOCK_D)
    channels = (d < D)[None]
    # the neighbours' values
    values = value + image * stride_batch + head * stride_head + d[None]
    cell0, on0 = _neighbour(top, left, real, height, width, 0)
    cell1, on1 = _neighbour(top, left, real, height, width, 1)
    cell2, on2 = _neighbour(top, left, real, height, width, 2)
    cell3, on3 = _neighbour(top, left, real, height, width, 3)
    value0 = tl.load(values + (first + cell0).to(tl.int64)[:, None] * stride_cell, mask=on0[:, None] & channels, other=0.0)
    value1 = tl.load(values + (first + cell1).to(tl.int64)[:, None] * stride_cell, mask=on1[:, None] & channels, other=0.0)
    value2 = tl.load(values + (first + cell2).to(tl.int64)[:, None] * stride_cell, mask=on2[:, None] & channels, other=0.0)
    value3 = tl.load(values + (first + cell3).to(tl.int64)[:, None] * stride_cell, mask=on3[:, None] & channels, other=0.0)
    value0, value1 = value0.to(tl.float32)[None], value1.to(tl.float32)[None]
    value2, value3 = value2.to(tl.float32)[None], value3.to(tl.float32)[None]
    slot = (first_bin + c).to(tl.int64) * images_heads + image_head
    start = tl.load(ends + 2 * slot, mask=real, other=0)
    stop = tl.load(ends + 2 * slot + 1, mask=real, other=0)
    # (entries, cells, channels): the sum over entries stays within a thread
    rows = dout + (image * queries * heads + head) * D + d[None, None]
    sum0 = tl.zeros([CELLS, BLOCK_D], tl.float32)
    sum1, sum2, sum3 = sum0, sum0, sum0
    for done in range(0, tl.max(stop - start, 0), ENTRIES):
        e = start[None] + done + tl.arange(0, ENTRIES)[:, None]
        mask = e < stop[None]
        source = tl.load(sources + e, mask=mask, other=0)
        y = tl.load(places + e, mask=mask, other=0.0)
        x = tl.load(places + count + e, mask=mask, other=0.0)
        weight = tl.load(places + 2 * count + e, mask=mask, other=0.0)
        query = (source // P).to(tl.int64)
        probe = tl.load(rows + (query * heads * D)[:, :, None], mask=mask[:, :, None] & channels[None], other=0.0).to(tl.float32)
        upper, lower = weight * (1 - y), weight * y
        sum0 += tl.sum((upper * (1 - x))[:, :, None] * probe, 0)
        sum1 += tl.sum((upper * x)[:, :, None] * probe, 0)
        sum2 += tl.sum((lower * (1 - x))[:, :, None] * probe, 0)
        sum3 += tl.sum((lower * x)[:, :, None] * probe, 0)
        inner0 = tl.where(on0[None], tl.sum(value0 * probe, 2), 0.0)
        inner1 = tl.where(on1[None], tl.sum(value1 * probe, 2), 0.0)
        inner2 = tl.where(on2[None], tl.sum(value2 * probe, 2), 0.0)
        inner3 = tl.where(on3[None], tl.sum(value3 * probe, 2), 0.0)
        above, below = (1 - x) * inner0 + x * inner1, (1 - x) * inner2 + x * inner3
        across = (1 - y) * (inner1 - inner0) + y * (inner3 - inner2)
        index = (((image * queries + query) * heads + head) * S + scale) * P + source % P
        tl.store(dweights + index, (1 - y) * above + y * below, mask=mask)
        tl.store(dlocations + 2 * index, across * weight * width, mask=mask)
        tl.store(dlocations + 2 * index + 1, (below - above) * weight * height, mask=mask)
    to = sums + ((image_head * bins + first_bin + c)[:, None] * D + d[None])
    per_corner = images_heads * bins * D
    stored = real[:, None] & channels
    tl.store(to, sum0, mask=stored)
    tl.store(to + per_corner, sum1, mask=stored)
    tl.store(to + 2 * per_corner, sum2, mask=stored)
    tl.store(to + 3 * per_corner, sum3, mask=stored)


@triton.jit
def _add(
    sums,
    dvalue,
    shapes,
    cells,
    blocks,
    bins,
    heads,
    stride_batch,
    stride_cell,
    stride_head,
    S: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CELLS: tl.constexpr,
):
    """Add each cell's gradient from the base cells that it is a neighbour of."""
    c = tl.program_id(0) % blocks * CELLS + tl.arange(0, CELLS)
    image_head = (tl.program_id(0) // blocks).to(tl.int64)
    # the base cell that is the cell itself, and how far away the one above it is
    base, up = c * 0, c * 0
    cell, bins_before = 0, 0
    for s in tl.static_range(S):
        height, width = shapes[2 * s], shapes[2 * s + 1]
        here = (c >= cell) & (c < cell + height * width)
        at = c - cell
        base = tl.where(here, bins_before + (at // width + 1) * (width + 1) + at % width + 1, base)
        up = tl.where(here, width + 1, up)
        cell += height * width
        bins_before += (height + 1) * (width + 1)
    d = tl.arange(0, BLOCK_D)[None]
    mask = (c < cells)[:, None] & (d < D)
    per_corner = (tl.num_programs(0) // blocks).to(tl.int64) * bins * D
    of = sums + (image_head * bins + base)[:, None] * D + d
    above = of - up.to(tl.int64)[:, None] * D
    total = tl.load(of, mask=mask, other=0.0) + tl.load(of + per_corner - D, mask=mask, other=0.0)
    total += tl.load(above + 2 * per_corner, mask=mask, other=0.0) + tl.load(above + 3 * per_corner - D, mask=mask, other=0.0)
    to = dvalue + image_head // heads * stride_batch + image_head % heads * stride_head + c.to(tl.int64)[:, None] * stride_cell
    tl.store(to + d, total.to(dvalue.dtype.element_ty), mask=mask)
