"""Layer norm over rows with zeros behind their channels, for products whose widths GPUs have fast kernels for.

EVA02-L's MLP is 2730 channels wide: rows of no multiple of 16 bytes, for which matrix products take 1.4 times as long. With zeros
behind them all products are the same but for rounding; a norm has to leave them out.
"""

from __future__ import annotations

import torch
from torch import Tensor


def norm_of_padded(x: Tensor, width: int, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Return the layer norm of the first `width` channels, with zeros behind them as in x, in x's type.

    Reductions go over whole rows, so that a compiler makes one kernel of what comes before, the norm and what follows.

    Args:
        x: (..., C), zeros from channel `width` on.    weight, bias: (C,), zeros from there on, too.
    """
    whole, more = x.shape[-1], x.shape[-1] - width
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    # of two groups' squared distances from the common mean, those between the groups are taken off
    mean = mean * (whole / width)
    variance = (variance * (whole / width) - mean.square() * (more / whole)).clamp_min(0)
    y = (x - mean) * torch.rsqrt(variance + eps) * weight
    return y if bias is None else y + bias
