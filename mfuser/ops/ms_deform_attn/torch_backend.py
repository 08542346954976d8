"""Multi-scale deformable attention by weighted sums of table rows, which is far faster on a CPU than grid sampling.

The heads' values, with a border of zeros around each map, are one table with a row per (image, cell, head). Forward: a
query's output is an embedding bag over the four neighbours of its points, one base row and three fixed steps away.
Backward to the values: the same sum transposed, by sorting the points by base row and taking a bag per row; no atomics,
so the result is the same on every run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

_CHUNK = 2**20  # gathered elements at once on a CPU: 4 MB in fp32


def forward(value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    """Return (B, Q, M * D). Shapes as in `ms_deform_attn`; `shapes` is flat, [H_0, W_0, H_1, ...]."""
    if value.device.type == "cpu" and len(value) > 1:
        # one image at a time: temporaries are several times the inputs, and should stay in the cache
        images = zip(value.split(1), locations.split(1), weights.split(1), strict=True)
        return torch.cat([forward(v, shapes, x, w) for v, x, w in images])
    points = _Points(shapes, locations.to(_precise(value)))
    share = points.shares(weights.to(_precise(value)))
    out = F.embedding_bag(points.rows(), points.table(value), mode="sum", per_sample_weights=share)
    return out.view(*locations.shape[:2], -1).to(value.dtype)


def backward(dout: Tensor, value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of (value, locations, weights); equations as in `reference.backward`."""
    if value.device.type == "cpu" and len(value) > 1:
        images = zip(dout.split(1), value.split(1), locations.split(1), weights.split(1), strict=True)
        grads = [backward(g, v, shapes, x, w) for g, v, x, w in images]
        return torch.cat([g[0] for g in grads]), torch.cat([g[1] for g in grads]), torch.cat([g[2] for g in grads])
    points = _Points(shapes, locations.to(_precise(value)))
    weights = weights.to(_precise(value))
    dout = dout.to(weights.dtype).reshape(locations.shape[:3].numel(), -1)  # (B Q M, D)
    inner = _row_products(dout, points.table(value), points.rows()).view(*weights.shape, 4)
    x, y = points.fraction.unbind(-1)
    upper, lower = torch.lerp(inner[..., 0], inner[..., 1], x), torch.lerp(inner[..., 2], inner[..., 3], x)
    dx = torch.lerp(inner[..., 1] - inner[..., 0], inner[..., 3] - inner[..., 2], y)
    dlocations = torch.stack([dx, lower - upper], -1).mul_(weights[..., None]).mul_(points.slope())
    return points.scatter(dout, weights), dlocations, torch.lerp(upper, lower, y)


def _precise(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _row_products(dout: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """Return inner products of dout[i] with table[rows[i, j]]: (I, D), (R, D), (I, J) -> (I, J)."""
    step = len(dout) if dout.device.type != "cpu" else max(1, _CHUNK // (rows.shape[1] * dout.shape[1]))
    out = dout.new_empty(rows.shape)
    for start in range(0, len(dout), step):
        part = slice(start, start + step)
        # autocast, if it is still on where the backward is called, would round
        with torch.autocast(dout.device.type, enabled=False):
            torch.bmm(F.embedding(rows[part], table), dout[part, :, None], out=out[part, :, None])
    return out


def _table(shapes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Return (S, 1, 4) int32: each map's sides (W, H), its first bordered cell, and its bordered width."""
    cells = _bordered(shapes)
    numbers = [(w, h, sum(cells[:s]), w + 2) for s, (h, w) in enumerate(shapes)]
    if device.type == "cpu":
        return torch.tensor(numbers, dtype=torch.int32)[:, None]
    # constants of kernels: a CUDA graph cannot hold numbers that are copied from the host
    rows = [torch.stack([torch.full((), n, dtype=torch.int32, device=device) for n in row]) for row in numbers]
    return torch.stack(rows)[:, None]


def _bordered(shapes: Sequence[tuple[int, int]]) -> list[int]:
    """Return the cells of each map with its border."""
    return [(height + 2) * (width + 2) for height, width in shapes]


class _Points:
    """Positions of points: the table row of the upper left neighbour, and the offset from it to the next, 0..1."""

    def __init__(self, shapes: list[int], locations: Tensor) -> None:
        batch, _, self.heads = locations.shape[:3]
        device = locations.device
        self.shapes = list(zip(shapes[::2], shapes[1::2], strict=True))
        self.cells = sum(_bordered(self.shapes))
        table = _table(self.shapes, device)
        self.size = table[..., :2].to(locations.dtype)
        self.at = torch.addcmul(locations.new_full((), -0.5), locations, self.size)  # in cells, 0 = the first one's centre
        # beyond the border all is zero; a NaN must not become a row
        clamped = torch.minimum(self.at.nan_to_num(-1.0).clamp_(min=-1.0), self.size)
        base = torch.minimum(clamped.floor(), self.size - 1)
        self.fraction = clamped.sub_(base)  # (B, Q, M, S, P, 2)
        column, row = base.int().add_(1).unbind(-1)
        image = torch.arange(batch, dtype=torch.int32, device=device)[:, None, None, None, None] * self.cells
        head = torch.arange(self.heads, dtype=torch.int32, device=device)[:, None, None]
        self.width = table[..., 3]
        # (B, Q, M, S, P)
        self.base = (row * self.width).add_(column).mul_(self.heads).add_((image + table[..., 2]) * self.heads + head)

    def table(self, value: Tensor) -> Tensor:
        """Return (B, cells, M, D) as rows of a bordered table (B * bordered cells * M, D)."""
        maps, start = [], 0
        for height, width in self.shapes:
            part = value[:, start : start + height * width].to(self.fraction.dtype).unflatten(1, (height, width))
            maps.append(F.pad(part, (0, 0, 0, 0, 1, 1, 1, 1)).flatten(1, 2))
            start += height * width
        return torch.cat(maps, 1).flatten(0, 2)

    def rows(self) -> Tensor:
        """Return table rows of the four neighbours: (B Q M, S P 4)."""
        down = self.width * self.heads  # (S, 1)
        steps = torch.stack([torch.zeros_like(down), torch.full_like(down, self.heads), down, down + self.heads], -1)
        return (self.base[..., None] + steps).reshape(self.base.shape[:3].numel(), -1)

    def shares(self, weights: Tensor) -> Tensor:
        """Return the neighbours' bilinear shares times the points' weights: (B Q M, S P 4)."""
        x, y = self.fraction.unbind(-1)
        out = weights.new_empty(*weights.shape, 4)
        lower = weights * y
        upper = weights - lower
        torch.mul(upper, x, out=out[..., 1])
        torch.sub(upper, out[..., 1], out=out[..., 0])
        torch.mul(lower, x, out=out[..., 3])
        torch.sub(lower, out[..., 3], out=out[..., 2])
        return out.view(weights.shape[:3].numel(), -1)

    def slope(self) -> Tensor:
        """Return cells per unit of location; none beyond the border, where all is zero: (B, Q, M, S, P, 2)."""
        return self.size * ((self.at > -1) & (self.at < self.size))

    def scatter(self, dout: Tensor, weights: Tensor) -> Tensor:
        """Sum share * weight * dout into the cells: (B Q M, D) -> (B, cells, M, D)."""
        batch, _, heads, scales, count = weights.shape
        key = self.base.flatten()
        order = torch.sort(key, stable=True).indices
        ends = torch.cumsum(torch.bincount(key, minlength=batch * self.cells * heads), 0)
        starts = F.pad(ends[:-1], (1, 0))
        source = order // (scales * count)  # the row of dout that a point belongs to
        shares = self.shares(weights).view(-1, 4)[order].T.contiguous()
        corners = [
            F.embedding_bag(source, dout, starts, mode="sum", per_sample_weights=share).view(batch, self.cells, heads, -1)
            for share in shares
        ]
        out, start = [], 0
        for height, width in self.shapes:
            stop = start + (height + 2) * (width + 2)
            maps = [corner[:, start:stop].unflatten(1, (height + 2, width + 2)) for corner in corners]
            # a cell is the upper left neighbour of points based on it, the upper right one of those one column before
            total = maps[0][:, 1:-1, 1:-1] + maps[1][:, 1:-1, :-2] + maps[2][:, :-2, 1:-1] + maps[3][:, :-2, :-2]
            out.append(total.flatten(1, 2))
            start = stop
        return torch.cat(out, 1)
