"""Rows with zeros behind their channels, for products whose widths GPUs have fast kernels for: a norm, and a frozen MLP.

EVA02-L's MLP is 2730 channels wide: rows of no multiple of 16 bytes, for which matrix products take 1.4 times as long. With zeros
behind them all products are the same but for rounding; a norm has to leave them out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.replaced import Replaced, replace

ALIGN = 64  # of which a padded width is a multiple


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


def paddable(mlp: nn.Module) -> bool:
    """Return whether zeros behind the hidden channels of an MLP change nothing but rounding, and its products are slow without.

    It is timm's SwiGLU of a width that is no multiple of 8, with plain layers and, within, at most a layer norm: a dropout there
    would draw other numbers.
    """
    from timm.layers import LayerNorm, SwiGLU

    m: Any = mlp
    if type(mlp) is not SwiGLU or m.fc2.in_features % 8 == 0 or m.drop1.p or type(m.act) is not nn.SiLU:
        return False
    plain = all(type(layer) is nn.Linear for layer in (m.fc1_g, m.fc1_x, m.fc2))
    if type(m.norm) is nn.Identity:
        return plain
    known = type(m.norm) in (nn.LayerNorm, LayerNorm) and not getattr(m.norm, "_fast_norm", False)
    return plain and known and m.norm.weight is not None and m.norm.normalized_shape == (m.fc2.in_features,)


def pad_mlp(mlp: nn.Module, align: int) -> None:
    """Put zeros behind the hidden channels of an MLP that is `paddable`, in place, up to a multiple of `align`.

    The layers' weights and biases are widened, not the norm's; attributes such as `out_features` say what they said. The MLP's
    `forward` takes either width, so that the tensors may be exchanged for those of before. A copy of the MLP has no zeros.

    Args:
        mlp: its products frozen: what is zero must stay so.    align: a multiple of 8.

    Raises: ValueError for another `align`.
    """
    if align < 8 or align % 8:
        raise ValueError(f"align is {align}, and products are slow at widths that are no multiples of 8; use 64")
    m: Any = mlp
    more = -m.fc2.in_features % align
    for layer in (m.fc1_g, m.fc1_x):
        layer.weight.data = F.pad(layer.weight.data, (0, 0, 0, more))
        if layer.bias is not None:
            layer.bias.data = F.pad(layer.bias.data, (0, more))
    m.fc2.weight.data = F.pad(m.fc2.weight.data, (0, more))
    replace(mlp, _forward, kind=_Padded)


class _Padded(Replaced):
    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Take the zeros off the parameters of the MLP's copy, which are copied by now."""
        mlp: Any = self.module
        width = mlp.fc2.in_features
        for layer in (mlp.fc1_g, mlp.fc1_x):
            for parameter in layer.parameters(recurse=False):
                memo[id(parameter)].data = memo[id(parameter)].data[:width].clone()
        weight = memo[id(mlp.fc2.weight)]
        weight.data = weight.data[:, :width].contiguous()
        super().__deepcopy__(memo)


def _forward(mlp: Any, x: Tensor) -> Tensor:
    """(..., in) -> (..., out)."""
    hidden = mlp.act(mlp.fc1_g(x)) * mlp.fc1_x(x)  # zeros in both, and their product
    if type(mlp.norm) is not nn.Identity:
        hidden = _normed(mlp.norm, hidden, mlp.fc2.weight.dtype)
    out: Tensor = mlp.drop2(mlp.fc2(hidden))
    return out


def _normed(norm: nn.LayerNorm, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the norm of the first channels, computed in fp32 as autocast does, in a product's type, and zeros behind them."""
    width, wide = norm.normalized_shape[0], torch.promote_types(x.dtype, torch.float32)
    more, weight, bias = x.shape[-1] - width, norm.weight.to(wide), None if norm.bias is None else norm.bias.to(wide)
    with torch.autocast(x.device.type, enabled=False):
        if torch.compiler.is_compiling():
            weight, bias = F.pad(weight, (0, more)), None if bias is None else F.pad(bias, (0, more))
            return norm_of_padded(x.to(wide), width, weight, bias, norm.eps).to(dtype)
        # without a compiler each operation of that would be a kernel, and one more tensor kept for the backward pass
        return F.pad(F.layer_norm(x[..., :width].to(wide), (width,), weight, bias, norm.eps).to(dtype), (0, more))
