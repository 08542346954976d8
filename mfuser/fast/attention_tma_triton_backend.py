"""The kernel of `attention` for GPUs that copy whole tiles by themselves (Hopper's tensor memory accelerator, TMA, and later).

The same steps as those of `attention_triton_backend` for many keys, which says what they are. No thread computes addresses:
140 us in place of 152 for 8 images of ViT-L's blocks (H200).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

ROWS, KEYS = 64, 64  # queries and keys of a tile
_ALIGNED = 16  # bytes, of what a tile begins at
_TMA = 9  # compute capability from which GPUs have it


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether a GPU copies tiles of these (B, H, L, D) by itself: channels side by side, all else 16 bytes apart."""
    # AMD's GPUs are numbered otherwise
    if k.shape[2] < KEYS or torch.version.cuda is None or torch.cuda.get_device_capability(q.device)[0] < _TMA:
        return False
    return all(_aligned(each) for each in (q, k, v))


def _aligned(x: Tensor) -> bool:
    steps = (x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:-1]))
    return x.stride(-1) == 1 and all(step % _ALIGNED == 0 and step > 0 for step in steps)


def launch(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """Write the attention of q (B, H, L, D) to k and v (B, H, S, D), as `attention.attention` says, of what `fits`.

    Args:
        out: (B, H, L, D), in memory (B, L, H, D).
    """
    batch, heads, length, width = q.shape
    with torch.cuda.device_of(q):
        _attention[(triton.cdiv(length, ROWS) * batch * heads,)](
            *(_tiles(q, ROWS), _tiles(k, KEYS), _tiles(v, KEYS), out),
            *(heads, length, k.shape[2], math.log2(math.e) / math.sqrt(width)),
            WIDTH=width,
            ROWS=ROWS,
            KEYS=KEYS,
            num_warps=4,
            num_stages=3 if width <= 64 else 2,
        )


def _tiles(x: Tensor, tokens: int) -> TensorDescriptor:
    """Return (B, L, H, D) of x (B, H, L, D) in tiles of so many tokens of one head; zeros behind the last token."""
    seen = x.transpose(1, 2)
    return TensorDescriptor(seen, list(seen.shape), list(seen.stride()), [1, tokens, 1, seen.shape[-1]])


@triton.jit
def weighed(score, largest, total, mixed, scale):
    """Return a tile's weights relative to the largest score so far, that score, and sums of weights and values scaled down to it.

    Weights are scores times `scale` as powers of 2; their own values are yet to be added to `mixed`.
    """
    larger = tl.maximum(largest, tl.max(score, 1) * scale)
    weight = tl.exp2(score * scale - larger[:, None])
    shrunk = tl.exp2(largest - larger)
    return weight, larger, total * shrunk + tl.sum(weight, 1), mixed * shrunk[:, None]


@triton.jit
def _attention(q, k, v, out, heads, length, keys, scale, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr) -> None:
    tiles = tl.cdiv(length, ROWS)
    program = tl.program_id(0)
    tile, both = program % tiles, program // tiles
    image, head = both // heads, both % heads
    first = tile * ROWS
    query = q.load([image, first, head, 0]).reshape(ROWS, WIDTH)
    largest = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDTH), tl.float32)
    done = keys // KEYS * KEYS
    for start in range(0, done, KEYS):
        score = tl.dot(query, k.load([image, start, head, 0]).reshape(KEYS, WIDTH).T, input_precision="ieee")
        weight, largest, total, mixed = weighed(score, largest, total, mixed, scale)
        values = v.load([image, start, head, 0]).reshape(KEYS, WIDTH)
        mixed = tl.dot(weight.to(values.dtype), values, mixed, input_precision="ieee")
    if done < keys:
        there = done + tl.arange(0, KEYS) < keys
        score = tl.dot(query, k.load([image, done, head, 0]).reshape(KEYS, WIDTH).T, input_precision="ieee")
        score = tl.where(there[None, :], score, -float("inf"))
        weight, largest, total, mixed = weighed(score, largest, total, mixed, scale)
        values = v.load([image, done, head, 0]).reshape(KEYS, WIDTH)
        mixed = tl.dot(weight.to(values.dtype), values, mixed, input_precision="ieee")
    mixed = mixed / total[:, None]
    row, channel = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    out += ((image.to(tl.int64) * length + first) * heads + head) * WIDTH
    asks = (first + row < length)[:, None]
    tl.store(out + row[:, None] * heads * WIDTH + channel[None, :], mixed.to(out.dtype.element_ty), mask=asks)
