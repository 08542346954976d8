"""What each operator costs, as a function of its shapes alone, and which ones cost nothing (the rules are told in `count`)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from dgbench.errors import DgbenchError

Sizes = tuple[int, ...]


class CountError(DgbenchError):
    """A model cannot be counted: an operator is unknown, or the two counters differ."""


def attention(query: Sizes, key: Sizes, value: Sizes) -> int:
    """Products of (B, H, Lq, D) with (B, H, Lk, D) and of their scores with (B, H, Lk, Dv)."""
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def matmul(first: Sizes, second: Sizes) -> int:
    """Products of `torch.matmul`: vectors, and batches that are repeated where the other has more; fvcore's knows neither."""
    rows = first[-2:-1]  # none of a vector
    columns = second[-1:] if len(second) > 1 else ()
    batch = torch.broadcast_shapes(first[:-2], second[:-2])
    return math.prod((*batch, *rows, first[-1], *columns))


def scan(u: Sizes, A: Sizes, gated: bool) -> tuple[int, int]:
    """FLOP of a scan in all, and of its skip."""
    tokens = math.prod(u)
    return 9 * tokens * A[1] + tokens + gated * tokens, tokens


def deformable(value: Sizes, weights: Sizes) -> int:
    """Four neighbours and a weight for each sampled channel."""
    return 5 * math.prod(weights) * value[3]


def pooled_boxes(output: Sizes, ratio: int) -> int:
    """Four neighbours of each of the `ratio` x `ratio` places in a cell of RoIAlign, for each channel."""
    if ratio <= 0:
        raise CountError("RoIAlign with a sampling ratio that depends on the box is not counted", "give it a sampling_ratio")
    return 4 * ratio**2 * math.prod(output)


def einsum(equation: str, operands: list[Sizes]) -> int:
    """Products of one or two operands; fvcore's own handle reads them off a text of four digits."""
    terms, _, result = equation.replace(" ", "").partition("->")
    labels = terms.split(",")
    if len(operands) > 2 or "." in equation or not result:
        raise CountError(f"einsum `{equation}` is not counted", "write it as products of two operands, with their result")
    if len(operands) == 1:
        return 0  # a sum
    sizes = {label: size for term, shape in zip(labels, operands, strict=True) for label, size in zip(term, shape, strict=True)}
    # what only one operand has is summed before
    return math.prod(tuple(size for label, size in sizes.items() if label in result or all(label in term for term in labels)))


def fourier(sizes: Sizes, dims: Iterable[int], *, real: bool) -> int:
    """Products of a transform over `dims` of as many numbers as `sizes` has, of the spectrum as a whole where it is halved."""
    length = math.prod(tuple(sizes[dim] for dim in dims))
    return round((1.25 if real else 2.5) * math.prod(sizes) * math.log2(length)) if length > 1 else 0


# neighbours of a sampled place, by the operator's name
NEIGHBOURS = {
    "upsample_nearest1d": 0,
    "upsample_nearest2d": 0,
    "_upsample_nearest_exact2d": 0,
    "upsample_linear1d": 2,
    "upsample_bilinear2d": 4,
    "_upsample_bilinear2d_aa": 4,
    "upsample_bicubic2d": 16,
    "_upsample_bicubic2d_aa": 16,
    "upsample_trilinear3d": 8,
}
GRID_NEIGHBOURS = (4, 0, 16)  # of grid_sampler's modes: bilinear, nearest, bicubic


def costs_nothing(operator: str) -> bool:
    """Whether an operator of ATen works element by element, only moves data, or is one of `_FREE`."""
    space, _, name = operator.partition("::")
    if space != "aten":
        return False
    if name.strip("_") in _FREE or name.removesuffix("_") in _FREE:
        return True
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return False
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    return any(torch.Tag.pointwise in overload.tags or overload.is_view for overload in overloads)


# no multiply-accumulate in any paper's count
_FREE = frozenset(
    (
        # norms, softmax, pooling
        "layer_norm",
        "native_layer_norm",
        "group_norm",
        "native_group_norm",
        "batch_norm",
        "native_batch_norm",
        "rms_norm",
        "fused_rms_norm",
        "cudnn_batch_norm",
        "native_batch_norm_legit_no_training",
        "instance_norm",
        "softmax",
        "log_softmax",
        "safe_softmax",
        "max_pool2d",
        "max_pool2d_with_indices",
        "avg_pool2d",
        "adaptive_avg_pool2d",
        "adaptive_max_pool2d",
        "native_batch_norm_legit",
        "native_batch_norm_legit_functional",
        # reductions
        "sum",
        "mean",
        "prod",
        "amax",
        "amin",
        "max",
        "min",
        "all",
        "any",
        "argmax",
        "argmin",
        "std",
        "var",
        "var_mean",
        "cumsum",
        "norm",
        "linalg_vector_norm",
        "sort",
        "topk",
        "nonzero",
        # lookups and copies
        "cat",
        "stack",
        "clone",
        "copy",
        "to",
        "to_copy",
        "contiguous",
        "repeat",
        "repeat_interleave",
        "roll",
        "flip",
        "tile",
        "index",
        "unsafe_index",
        "index_select",
        "index_put",
        "gather",
        "scatter",
        "embedding",
        "one_hot",
        "where",
        "masked_fill",
        "pad",
        "constant_pad_nd",
        "reflection_pad2d",
        "replication_pad2d",
        "fft_fftshift",
        "fft_ifftshift",
        "complex",
        "randperm",
        "unsafe_view",
        "alias",
        "as_strided",
        "detach",
        "dropout",
        "feature_dropout",
        "tril",
        "triu",
        "pixel_shuffle",
        # factories, and arithmetic that no tag calls elementwise
        "fill",
        "zero",
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_zeros",
        "new_ones",
        "new_full",
        "zeros",
        "zeros_like",
        "ones",
        "ones_like",
        "full",
        "full_like",
        "arange",
        "linspace",
        "scalar_tensor",
        "lift_fresh",
        "meshgrid",
        "floor_divide",
        "iand",
        "ior",
    )
)
