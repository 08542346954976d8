"""A neck whose last transposed convolutions are one product with the 1x1 convolutions behind them: outputs and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import mfuser
from mfuser import blocks
from mfuser.decoder.neck import four_scales, upsampling
from mfuser.decoder.pixel_decoder import PixelDecoder
from mfuser.folded_neck import fold


class Necked(nn.Module):
    """A neck and a pixel decoder, as MFuser has them."""

    def __init__(self, channels: int = 12, dim: int = 8) -> None:
        super().__init__()
        self.fpn1, self.fpn2 = upsampling(channels)
        self.pixel_decoder = PixelDecoder(channels, dim=dim, layers=1, heads=2, points=2, ffn_dim=16, groups=2)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        features, found = self.pixel_decoder(four_scales(maps, self.fpn1, self.fpn2))
        return [features, *found]


def drawn(layout: torch.memory_format) -> tuple[Necked, list[Tensor]]:
    torch.manual_seed(3)
    model = Necked().double().to(memory_format=layout)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    maps = [torch.randn(2, 12, 6, 10, dtype=torch.float64).to(memory_format=layout).requires_grad_() for _ in range(4)]
    return model, maps


def step(model: Necked, maps: list[Tensor]) -> list[Tensor]:
    out = model(maps)
    loss = torch.stack([(o * torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o)).sum() for o in out]).sum()
    return [*out, *torch.autograd.grad(loss, [*maps, *model.parameters()])]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["channels first", "channels last"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_it_is_equal_to_its_layers(layout, train):
    model, maps = drawn(layout)
    model.train(train)
    folded = copy.deepcopy(model)
    expected = step(model, maps)
    assert fold(folded)
    torch.testing.assert_close(step(folded, maps), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(list(folded.buffers()), list(model.buffers()), rtol=1e-12, atol=1e-12)


def test_no_map_of_the_necks_width_is_kept_on_the_finest_grid():
    model, maps = drawn(torch.channels_last)

    def kept() -> int:
        seen = []

        def keep(tensor: Tensor) -> Tensor:
            seen.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(maps)
        return seen.count(2 * 12 * 24 * 40)

    assert kept() == 1  # the lateral convolution's input
    fold(model)
    assert kept() == 0


def test_a_copy_has_its_layers():
    model, _ = drawn(torch.contiguous_format)
    fold(model)
    copied = copy.deepcopy(model)
    for module in (copied.fpn1, copied.fpn2, copied.pixel_decoder.lateral_conv.conv):
        assert module.forward.__self__ is module
    assert copied.fpn1(torch.rand(1, 12, 2, 2, dtype=torch.float64)).shape == (1, 12, 8, 8)


def test_compiling_the_blocks_of_a_model_folds_its_neck():
    model = mfuser.build("mfuser", vfm="tiny", vlm="tiny", image_size=(64, 64), weights="random")
    blocks.compile_blocks(model)
    channels = 2 * model.vfm.dim
    assert model.fpn2(torch.rand(1, channels, 4, 4)).shape[1] == model.pixel_decoder.mask_feature.in_channels < channels


@pytest.mark.parametrize("name", ["linear", "rein"])
def test_a_model_without_such_a_neck_is_left_alone(name):
    assert not fold(mfuser.build(name, vfm="tiny", image_size=(64, 64), weights="random"))
