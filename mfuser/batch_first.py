"""Attention over tokens that come image by image, without turning them round.

`nn.MultiheadAttention` puts tokens before images, whatever it is given. The compiler then makes a product of every token's few
rows, one for each image, each of which reads the weight: at 8 images, 24 of them took 0.94 of full-size MFuser's 53 ms (H200).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.replaced import replace

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # (B, H, L, D), (B, H, S, D), (B, H, S, D) -> (B, H, L, D)


def take(model: nn.Module, attend: Attend = F.scaled_dot_product_attention) -> int:
    """Have the attentions of a model computed so, in place: the same but for rounding. Returns: how many.

    Those with a dropout, or with tokens first, stay as they are, and a copy of the model is without that.

    Args:
        attend: what computes softmax(q k^T / sqrt(D)) v where there is no mask.
    """
    found = [module for module in model.modules() if type(module) is nn.MultiheadAttention and _can(module)]
    for attention in found:
        replace(attention, _attend, attend)
    return len(found)


def _can(attention: nn.MultiheadAttention) -> bool:
    more = attention.bias_k is not None or attention.add_zero_attn
    return attention.batch_first and not attention.dropout and not more


def _attend(
    attention: Any,
    attend: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(B, L, E), (B, S, E), (B, S, E) -> (B, L, E); attn_mask (B * heads, L, S) or (L, S), True where nobody looks."""
    if need_weights or key_padding_mask is not None or is_causal or query.dim() != 3:
        found: tuple[Tensor, Tensor | None] = nn.MultiheadAttention.forward(
            attention, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
        return found
    if attention.in_proj_weight is None:
        weights = attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight
    else:
        weights = attention.in_proj_weight.chunk(3)
    biases = (None, None, None) if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
    q, k, v = (
        F.linear(given, weight, bias).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for given, weight, bias in zip((query, key, value), weights, biases, strict=True)
    )
    if attn_mask is None:
        out = attend(q, k, v)
    else:
        mask = attn_mask.logical_not() if attn_mask.dtype is torch.bool else attn_mask.to(q.dtype)
        mask = mask.unflatten(0, (len(query), -1)) if mask.dim() == 3 else mask
        out = F.scaled_dot_product_attention(q, k, v, mask)
    return attention.out_proj(out.transpose(1, 2).flatten(2)), None
