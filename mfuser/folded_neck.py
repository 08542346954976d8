"""A trained neck's transposed convolutions as matrix products, with the pixel decoder's 1x1 convolutions folded into the last.

Nothing but a linear map lies between a transposed convolution and the 1x1 convolution behind it, so that both are one product. Of
the full model at 512x512, those of 2048 channels, on the finest grids, take 8 times fewer operations so, and their maps of 2048
channels are never written. The weights stay the two layers' own: what is folded is computed from them in every pass, and their
gradients follow from it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.decoder.neck import cells, cells_of_cells, rows_of
from mfuser.decoder.pixel_decoder import PixelDecoder


def fold(model: nn.Module) -> bool:
    """Have a model's neck computed so, in place; its tensors stay as they are, and a copy of the model is without that.

    Returns: False for a model without such a neck, or with several pixel decoders.
    """
    fpn1, fpn2 = getattr(model, "fpn1", None), getattr(model, "fpn2", None)
    found: list[Any] = [part for part in model.modules() if isinstance(part, PixelDecoder)]
    if not isinstance(fpn1, nn.Sequential) or not isinstance(fpn2, nn.ConvTranspose2d) or len(found) != 1:
        return False
    finest, next_ = found[0].lateral_conv.conv, found[0].input_convs[-1].conv
    changed: list[tuple[Any, partial[Tensor]]] = [
        (fpn1, _Forward(_four_times, fpn1, finest)),
        (fpn2, _Forward(_twice, fpn2, next_)),
        *((conv, _Forward(_as_is, conv)) for conv in (finest, next_)),
    ]
    for module, forward in changed:
        module.forward = forward
    return True


class _Forward(partial[Tensor]):
    """What a module's `forward` is replaced by; its copy has its class's own."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo[id(self.args[0])]
        return type(copied).forward.__get__(copied)


def _four_times(fpn1: nn.Sequential, conv: nn.Conv2d, x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, E, 4 H, 4 W); the cells between are normed in the order in which the first product has them."""
    first, norm, act, second = fpn1
    assert isinstance(first, nn.ConvTranspose2d)
    assert isinstance(second, nn.ConvTranspose2d)
    assert first.bias is not None
    inner = cells(x.permute(0, 2, 3, 1), rows_of(first.weight), first.bias.repeat(4))  # (B, H, W, 2, 2, D)
    inner = act(norm(inner.flatten(2, 4).permute(0, 3, 1, 2))).permute(0, 2, 3, 1).view_as(inner)
    return cells_of_cells(cells(inner, *_folded(second, conv)))


def _twice(fpn2: nn.ConvTranspose2d, conv: nn.Conv2d, x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, E, 2 H, 2 W)."""
    found = cells(x.permute(0, 2, 3, 1), *_folded(fpn2, conv))
    return found.transpose(2, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def _as_is(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Return what was folded into the product before."""
    return x


def _folded(enlarge: nn.ConvTranspose2d, conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Return weight (4 E, C) and bias (4 E,) of both layers as one."""
    matrix = conv.weight.flatten(1)  # (E, D)
    weight = F.linear(enlarge.weight.permute(0, 2, 3, 1), matrix)  # (C, 2, 2, E)
    assert enlarge.bias is not None
    bias = F.linear(enlarge.bias[None], matrix, conv.bias)[0]
    return weight.permute(1, 2, 3, 0).flatten(0, 2), bias.repeat(4)
