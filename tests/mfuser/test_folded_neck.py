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
from mfuser.fast import neck
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


def test_gradients_lie_in_memory_as_their_weights_do():
    """As a training has them; `DistributedDataParallel` warns of others and copies them."""
    model, maps = drawn(torch.channels_last)
    fold(model)
    torch.stack([out.square().sum() for out in model(maps)]).sum().backward()
    assert [name for name, weight in model.named_parameters() if weight.grad.stride() != weight.stride()] == []


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


@pytest.mark.parametrize("images", [1, 2])
def test_statistics_of_a_neck_of_one_cell_and_of_local_batches(images):
    """The smallest maps, in the layouts that a tower's tokens have: more than one order of memory fits them."""
    model, _ = drawn(torch.channels_last)
    folded = copy.deepcopy(model)
    assert fold(folded)
    tokens = torch.randn(images, 4, 12, dtype=torch.float64, requires_grad=True)
    for size in ((2, 2), (4, 1), (1, 4)):
        maps = [tokens.transpose(1, 2).unflatten(2, size)] * 3
        expected, found = ([made.fpn1(maps[0]), made.fpn2(maps[1])] for made in (model, folded))
        convs = model.pixel_decoder.lateral_conv.conv, model.pixel_decoder.input_convs[-1].conv
        expected = [conv(each) for conv, each in zip(convs, expected, strict=True)]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_converted_batch_norm_is_asked_in_its_place():
    """Conversion for several processes puts another module where the neck's was."""
    model, maps = drawn(torch.channels_last)
    fold(model)
    expected = model.eval()(maps)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(converted.fpn1[1], nn.SyncBatchNorm)
    torch.testing.assert_close(converted.eval()(maps), expected, rtol=1e-12, atol=1e-12)


OTHERS = {
    "no norm": lambda m: setattr(m, "fpn1", nn.Sequential(m.fpn1[0], m.fpn1[2], m.fpn1[3])),
    "a norm over channels": lambda m: m.fpn1.__setitem__(1, nn.GroupNorm(2, 12)),
    "overlapping cells": lambda m: setattr(m, "fpn2", nn.ConvTranspose2d(12, 12, 4, 2, 1)),
    "other cells": lambda m: setattr(m, "fpn2", nn.ConvTranspose2d(12, 12, 4, 4)),
    "no bias": lambda m: setattr(m, "fpn2", nn.ConvTranspose2d(12, 12, 2, 2, bias=False)),
    "groups": lambda m: m.fpn1.__setitem__(3, nn.ConvTranspose2d(12, 12, 2, 2, groups=2)),
    "another width": lambda m: setattr(m, "fpn2", nn.ConvTranspose2d(12, 6, 2, 2)),
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_a_neck_of_other_layers_under_these_names_is_left_alone(change):
    model = Necked()
    change(model)
    assert not fold(model)
    assert not neck.take(model, torch.float32)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", ["linear", "rein"])
def test_a_model_without_such_a_neck_is_left_alone(name):
    assert not fold(mfuser.build(name, vfm="tiny", image_size=(64, 64), weights="random"))
