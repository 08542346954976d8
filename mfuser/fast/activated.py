"""A linear layer and the activation behind it as one product, which a GPU would otherwise write, read and write again.

cuBLASLt applies ReLU, or GELU's tanh form, to a product before it is rounded and written. The tanh form is at most 5e-4 away from
GELU, and less than a rounding to bf16 wherever GELU is above 0.13 in size: only products in 16 bits have it here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mfuser.decoder.mask_decoder import MaskDecoderLayer
from mfuser.decoder.pixel_decoder import PixelDecoderLayer


@torch.library.custom_op("mfuser::linear_activated", mutates_args=())  # the compiler would take it apart again
def _linear_activated(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return torch._addmm_activation(bias, rows, weight.t(), use_gelu=gelu).view(*x.shape[:-1], len(weight))


@_linear_activated.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def joins(act: nn.Module, bias: Tensor | None, weight: Tensor) -> bool:
    """Return whether a product and its activation can be one: on a GPU, in 16 bits, with a bias, of ReLU or GELU."""
    known = type(act) is nn.ReLU or (type(act) is nn.GELU and act.approximate == "none")
    return known and bias is not None and weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16)


def activated(x: Tensor, weight: Tensor, bias: Tensor, act: nn.Module) -> Tensor:
    """Return act(x weight^T + bias), (..., in) -> (..., out), all in one type.

    Args:
        act: nn.ReLU, or nn.GELU, of which a GPU computes the tanh form.
    """
    return _linear_activated(x, weight, bias, type(act) is nn.GELU)


class LinearReLU(nn.Module):
    """A linear layer of a type, whatever it is given, and ReLU: (..., in) -> (..., out)."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().to(dtype, copy=True), persistent=False)
        self.register_buffer("bias", linear.bias.detach().to(dtype, copy=True), persistent=False)
        self.act = nn.ReLU()

    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Apply it, outside of autocast."""
        with torch.autocast(x.device.type, enabled=False):
            return activated(x.to(self.weight.dtype), self.weight, self.bias, self.act)


def take(model: nn.Module, dtype: torch.dtype) -> bool:
    """Join the first layer of the decoders' feed-forward networks with its ReLU, in place; False where there is none to join."""
    found = False
    for layer in model.modules():
        if not isinstance(layer, PixelDecoderLayer | MaskDecoderLayer):
            continue
        first, act, second = layer.ffn
        if isinstance(first, nn.Linear) and joins(act, first.bias, first.weight.to(dtype)):
            layer.ffn = nn.Sequential(LinearReLU(first, dtype), nn.Identity(), second)
            found = True
    return found
