"""A trained neck's transposed convolutions as matrix products, with the pixel decoder's 1x1 convolutions folded into the last.

Nothing but a linear map lies between a transposed convolution and the 1x1 convolution behind it, so that both are one product. Of
the full model, those of 2048 channels on the finest grids take a ninth of the operations so, and their maps of 2048 channels are
never written. The weights stay the two layers' own: what is folded is computed from them in every pass, and their
gradients follow from it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.decoder.neck import cells, cells_of_cells, rows_of
from mfuser.decoder.pixel_decoder import PixelDecoder
from mfuser.replaced import replace


def fold(model: nn.Module) -> bool:
    """Have a model's neck computed so, in place; its tensors stay as they are, and a copy of the model is without that.

    Returns: False for a model that has none of `foldable`.
    """
    found = foldable(model)
    if found is None:
        return False
    fpn1, fpn2, pixel = found
    finest, next_ = pixel.lateral_conv.conv, pixel.input_convs[-1].conv
    replace(fpn1, _four_times, finest)
    replace(fpn2, _twice, next_)
    for conv in (finest, next_):
        replace(conv, _as_is)
    return True


def foldable(model: nn.Module) -> tuple[nn.Sequential, nn.ConvTranspose2d, Any] | None:
    """Return a model's neck, as `decoder.neck.upsampling` builds it, and the pixel decoder behind it.

    None for a model without them, with several pixel decoders, or with layers of other kinds or sizes under these names.
    """
    fpn1, fpn2 = getattr(model, "fpn1", None), getattr(model, "fpn2", None)
    decoders = [part for part in model.modules() if isinstance(part, PixelDecoder)]
    if not isinstance(fpn1, nn.Sequential) or len(fpn1) != 4 or len(decoders) != 1:
        return None
    first, norm, act, second = fpn1
    if not isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm) or not isinstance(act, nn.GELU):
        return None
    pixel: Any = decoders[0]
    if not (_enlarges(first) and _enlarges(second) and _enlarges(fpn2)):
        return None
    if not (_is_product(pixel.lateral_conv.conv, second) and _is_product(pixel.input_convs[-1].conv, fpn2)):
        return None
    assert isinstance(fpn2, nn.ConvTranspose2d)
    return fpn1, fpn2, pixel


def _enlarges(layer: Any) -> bool:
    """Return whether a layer makes four cells of each and knows no neighbours."""
    if type(layer) is not nn.ConvTranspose2d or layer.kernel_size != (2, 2) or layer.stride != (2, 2):
        return False
    usual: bool = (layer.padding, layer.output_padding, layer.dilation) == ((0, 0), (0, 0), (1, 1))
    return usual and layer.groups == 1 and isinstance(layer.bias, Tensor)


def _is_product(conv: Any, behind: Any) -> bool:
    """Return whether a convolution takes what a layer returns, cell by cell."""
    usual: bool = type(conv) is nn.Conv2d and (conv.kernel_size, conv.stride, conv.padding) == ((1, 1), (1, 1), (0, 0))
    fits: bool = conv.in_channels == behind.out_channels and conv.groups == 1
    return usual and fits


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
    # (E, D); so that its gradient has the weight's own order of memory in channels last, which several processes share it in
    matrix = conv.weight.permute(0, 2, 3, 1).flatten(0, 2)
    weight = F.linear(enlarge.weight.permute(0, 2, 3, 1), matrix)  # (C, 2, 2, E)
    assert enlarge.bias is not None
    bias = F.linear(enlarge.bias[None], matrix, conv.bias)[0]
    return weight.permute(1, 2, 3, 0).flatten(0, 2), bias.repeat(4)
