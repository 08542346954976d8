"""Attention without a mask in 16 bits, by a kernel of this package where torch's are slower.

torch takes cuDNN's on an H200, which adds to a CUDA graph a node that clears memory. At the size of ViT-L's blocks (16 heads
of 64 channels, 1297 tokens) it takes 33.4, 166.9 and 358.3 us of 1, 8 and 18 images, the kernels here 23.8, 140.4 and 304.0; at
that of the pixel decoder's texts (6804 tokens, 19 keys, 8 heads of 32 channels, 8 images) 62.4 and 27.0.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

_TYPES = (torch.bfloat16, torch.float16)
_WIDTHS = (16, 32, 64, 128)  # of a head: both factors of a product are a tile of this width
_FARTHEST = 2**31  # numbers from the first token of a head to its last: the kernel's offsets within a head have 32 bits
_PRODUCTS = 8  # compute capability from which NVIDIA's GPUs have products of bf16, without which Triton has none; below, torch's
_TRITON = find_spec("triton") is not None  # asked for here, as the compiler cannot trace the question


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v as torch does, by the kernel here where `fuses` says so.

    Args:
        q: (B, H, L, D).    k, v: (B, H, S, D).
    """
    return attention(q, k, v) if fuses(q, k, v) else F.scaled_dot_product_attention(q, k, v)


def fuses(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether an attention can be the kernel here: on a GPU with Triton, in 16 bits, of some widths, without gradients."""
    return (
        _TRITON
        and q.is_cuda
        and q.dtype in _TYPES
        and k.dtype == v.dtype == q.dtype
        and q.dim() == 4
        and q.shape[-1] in _WIDTHS
        and k.shape == v.shape == (*q.shape[:2], k.shape[-2], q.shape[-1])
        and k.shape[-2] > 0
        and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
    )


@torch.library.custom_op("mfuser::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v, (B, H, L, D), in q's type; the softmax and all sums are fp32. It has no backward pass.

    The heads of a token lie side by side in memory: `.transpose(1, 2).flatten(2)` copies nothing.

    Args:
        q: (B, H, L, D), D 16, 32, 64 or 128.    k, v: (B, H, S, D).
            Each has its own strides; what has gaps between the channels of a head is copied before.

    Raises: ValueError for other shapes, and where there are no keys.
    """
    wanted = (*q.shape[:-2], k.shape[-2], q.shape[-1])
    if q.dim() != 4 or q.shape[-1] not in _WIDTHS or not k.shape == v.shape == wanted or not k.shape[-2]:
        given = ", ".join(str(tuple(each.shape)) for each in (q, k, v))
        widths = ", ".join(map(str, _WIDTHS))
        raise ValueError(
            f"attention: got q, k, v of {given}, expected (B, H, L, D), (B, H, S, D), (B, H, S, D) with a D of {widths} and an S "
            "of at least 1; `attend` takes the others"
        )
    out = _empty(q)
    if q.is_cuda and torch.version.cuda is not None and torch.cuda.get_device_capability(q.device)[0] < _PRODUCTS:
        out.copy_(F.scaled_dot_product_attention(q, k, v))
    elif out.numel():
        from mfuser.fast.attention_triton_backend import launch  # where it is: see `fuses`

        launch(_laid_out(q), _laid_out(k), _laid_out(v), out)
    return out


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _empty(q)


def _empty(q: Tensor) -> Tensor:
    batch, heads, length, width = q.shape
    return q.new_empty(batch, length, heads, width).transpose(1, 2)


def _laid_out(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 and x.shape[-2] * x.stride(-2) < _FARTHEST else x.contiguous()
