"""The Triton kernel of `attention`: a program for each tile of queries of a head, which goes over the keys once.

Dao et al. (FlashAttention, NeurIPS 2022): weights are relative to the largest score so far, by powers of 2, and what was summed
before a larger one is scaled down.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfuser.fast import attention_tma_triton_backend as tma

_QUERIES, _KEYS = 64, 64  # of a tile: the fastest of sixteen on an H200, for heads of 64 channels
_QUERIES_OF_FEW = 128  # where the keys are one tile: faster than 32, 64 and 256
_SMALLEST = 16  # side of a tile that a product of matrix units has


def launch(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """Write the attention of q (B, H, L, D) to k and v (B, H, S, D), as `attention.attention` says.

    Args:
        q, k, v: each with its own strides, channels side by side and a head's tokens within 2^31 numbers.
        out: (B, H, L, D), in memory (B, L, H, D).
    """
    if q.is_cuda and tma.fits(q, k, v):
        tma.launch(q, k, v, out)
        return
    batch, heads, length, width = q.shape
    keys = k.shape[2]
    many = keys >= _KEYS
    rows = min(_QUERIES if many else _QUERIES_OF_FEW, _tile(length))
    strides = [stride for each in (q, k, v) for stride in each.stride()[:3]]
    with torch.cuda.device_of(q):
        _attention[(triton.cdiv(length, rows) * batch * heads,)](
            *(q, k, v, out),
            *strides,
            *(heads, length, keys, math.log2(math.e) / math.sqrt(width)),
            WIDTH=width,
            ROWS=rows,
            KEYS=_KEYS if many else _tile(keys),
            MANY=many,
            num_warps=4,
            # tiles of keys and values that are loaded in advance: of wide heads, three would not fit into every GPU
            num_stages=3 if width <= 64 else 2,
        )


def _tile(length: int) -> int:
    return max(_SMALLEST, triton.next_power_of_2(length))


@triton.jit
def _attention(
    q,
    k,
    v,
    out,
    q_image,
    q_head,
    q_token,
    k_image,
    k_head,
    k_token,
    v_image,
    v_head,
    v_token,
    heads,
    length,
    keys,
    scale,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    MANY: tl.constexpr,
) -> None:
    tiles = tl.cdiv(length, ROWS)
    program = tl.program_id(0)
    if MANY:  # programs of one head follow each other: they read the same keys
        tile, both = program % tiles, program // tiles
        head, image = (both % heads).to(tl.int64), (both // heads).to(tl.int64)
    else:  # those of one tile do: their queries are neighbours in memory
        head, both = (program % heads).to(tl.int64), program // heads
        tile, image = both % tiles, (both // tiles).to(tl.int64)
    first = tile.to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    key = tl.arange(0, KEYS)
    channel = tl.arange(0, WIDTH)
    asks = (first + row < length)[:, None]
    q += image * q_image + head * q_head + first * q_token
    k_tile = k + image * k_image + head * k_head + key[None, :] * k_token + channel[:, None]
    v_tile = v + image * v_image + head * v_head + key[:, None] * v_token + channel[None, :]
    out += ((image * length + first) * heads + head) * WIDTH
    query = tl.load(q + row[:, None] * q_token + channel[None, :], mask=asks, other=0.0)
    largest = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDTH), tl.float32)
    done = 0
    if MANY:
        done = keys // KEYS * KEYS
        for start in range(0, done, KEYS):
            score = tl.dot(query, tl.load(k_tile + start * k_token), input_precision="ieee")
            weight, largest, total, mixed = tma.weighed(score, largest, total, mixed, scale)
            values = tl.load(v_tile + start * v_token)
            mixed = tl.dot(weight.to(values.dtype), values, mixed, input_precision="ieee")
    if done < keys:
        there = done + key < keys
        columns = tl.load(k_tile + done * k_token, mask=there[None, :], other=0.0)
        score = tl.where(there[None, :], tl.dot(query, columns, input_precision="ieee"), -float("inf"))
        weight, largest, total, mixed = tma.weighed(score, largest, total, mixed, scale)
        values = tl.load(v_tile + done * v_token, mask=there[:, None], other=0.0)
        mixed = tl.dot(weight.to(values.dtype), values, mixed, input_precision="ieee")
    mixed = mixed / total[:, None]
    tl.store(out + row[:, None] * heads * WIDTH + channel[None, :], mixed.to(out.dtype.element_ty), mask=asks)
