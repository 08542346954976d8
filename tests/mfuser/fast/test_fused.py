"""What MFuser makes of both towers' tokens in a prepared copy, against the model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import mfuser
from mfuser import methods
from mfuser.fast import compiled, fused

TINY = methods.module("mfuser").BACKBONES[-1]


def build(**options: object) -> Any:
    torch.manual_seed(0)
    return mfuser.build("mfuser", **{**TINY, "image_size": (64, 96), **options}).eval().requires_grad_(False)


def tokens(model: Any) -> tuple[Tensor, Tensor]:
    """The last of both towers."""
    _, d, v = model.step(torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1)))
    return d, v


def test_maps_are_the_models_rounded_at_once():
    model = build()
    d, v = tokens(model)
    whole = [model.tap(d, v + i) for i in range(4)]
    before = model.scales(whole)
    assert fused.take(model, torch.bfloat16)
    rounded = [model.tap(d, v + i) for i in range(4)]
    assert all(torch.equal(one, other.bfloat16()) for one, other in zip(rounded, whole, strict=True))
    assert all(each.permute(0, 2, 3, 1).is_contiguous() for each in rounded)
    assert torch.equal(model.scales([*whole[:3], rounded[3]])[3], before[3].bfloat16()), "the largest is rounded last or first"


@pytest.mark.parametrize("size", [(6, 8), (5, 7)])
def test_half_a_map_is_that_of_pooling(size):
    x = torch.randn(2, 3, *size)
    found = fused.Halve()(x.contiguous(memory_format=torch.channels_last))
    assert torch.equal(found, F.max_pool2d(x, 2))
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("vlm", ["tiny", "mini_vlm"])
def test_texts_that_have_seen_the_image_are_equal(vlm):
    model = build(vlm=vlm, **({"vfm": "mini_vfm"} if vlm == "mini_vlm" else {}))
    before = model.described(*tokens(model))
    assert fused.take(model, torch.float32)
    torch.testing.assert_close(model.described(*tokens(model)), before)


def test_a_model_without_both_towers_or_an_enhancer_is_left_alone():
    assert not fused.take(build(image_tower="vlm"), torch.float32)
    assert not fused.take(mfuser.build("linear", vfm="tiny", image_size=(64, 64)), torch.float32)
    model = build(enhancer="none")
    assert fused.take(model, torch.float32)
    assert "describe" not in model._modules


def test_each_layer_is_compiled_whole():
    model = build()
    d, v = tokens(model)
    before = [model.described(d, v), *model.scales([model.tap(d, v)] * 4)]
    fused.take(model, torch.float32)
    torch._dynamo.reset()
    assert compiled.compile_layers(model, (fused.Tap, fused.Halve, fused.Describe)) == 3
    with compiled.compiling(), torch.no_grad():
        after = [model.described(d, v), *model.scales([model.tap(d, v)] * 4)]
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert after[4].is_contiguous(memory_format=torch.channels_last)
