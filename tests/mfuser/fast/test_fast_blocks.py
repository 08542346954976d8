"""Rewritten blocks against timm's, and the neck against its modules, in fp64: equal but for rounding."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from timm.layers import LayerNorm
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block as PlainBlock
from torch import nn

import mfuser
from mfuser.decoder.neck import upsampling
from mfuser.decoder.pixel_decoder import PixelDecoder
from mfuser.fast import blocks, neck
from mfuser.towers.vit import VisionEncoder

WIDTH, HEADS, PREFIX, GRID = 32, 2, 2, (3, 4)
NORM = partial(LayerNorm, eps=1e-6)


def drawn(module: Any) -> Any:
    """The module in fp64 with every parameter and buffer drawn: nothing is zero or one by its initialisation."""
    generator = torch.Generator().manual_seed(0)
    module = module.double().eval()
    for value in (*module.parameters(), *module.buffers()):
        if value.is_floating_point():
            value.data = torch.rand(value.shape, generator=generator, dtype=torch.float64) * 0.5 + 0.1
    return module


def tokens(seed: int = 0) -> torch.Tensor:
    length = PREFIX + GRID[0] * GRID[1]
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


KINDS = {
    "plain": lambda: PlainBlock(WIDTH, HEADS, qkv_bias=True, norm_layer=NORM),
    "scaled, as DINOv2's": lambda: PlainBlock(WIDTH, HEADS, qkv_bias=True, init_values=1e-5, norm_layer=NORM),
    "normed queries and keys": lambda: PlainBlock(WIDTH, HEADS, qkv_bias=True, qk_norm=True, norm_layer=NORM),
    "without biases": lambda: PlainBlock(WIDTH, HEADS, proj_bias=False, norm_layer=NORM),
}
ROTARY = {
    "EVA02's": {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True},
    "EVA02-L's, whose hidden width is odd": {
        "qkv_fused": False,
        "swiglu_mlp": True,
        "scale_mlp": True,
        "scale_attn_inner": True,
        "mlp_ratio": 4 * 2 / 3,
    },
    "EVA02's without inner norms": {"qkv_fused": False, "swiglu_mlp": True, "swiglu_align_to": 8},
    "a bias of queries and values": {"qkv_fused": True},
    "DINOv3's": {"qkv_fused": True, "qkv_bias": False, "rotate_half": True, "init_values": 1e-5},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_block_is_equal(kind):
    block = drawn(KINDS[kind]())
    assert blocks.reason(block) == ""
    torch.testing.assert_close(blocks.Block(block, torch.float64)(tokens()), block(tokens()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ROTARY)
def test_a_rotary_block_is_equal(kind):
    block = drawn(EvaBlock(WIDTH, HEADS, num_prefix_tokens=PREFIX, norm_layer=NORM, **ROTARY[kind]))
    assert blocks.reason(block) == ""
    angles = torch.rand(GRID[0] * GRID[1], WIDTH // HEADS, dtype=torch.float64)
    rope = torch.cat([angles.sin(), angles.cos()], -1)
    turns = blocks.table(rope, PREFIX, torch.float64)
    torch.testing.assert_close(blocks.Block(block, torch.float64)(tokens(), turns), block(tokens(), rope), rtol=1e-12, atol=1e-12)


def test_queries_keys_and_values_are_one_product_and_both_halves_of_a_swiglu_another():
    block = drawn(EvaBlock(WIDTH, HEADS, num_prefix_tokens=PREFIX, norm_layer=NORM, **ROTARY["EVA02's"]))
    ready = blocks.Block(block, torch.float64)
    assert ready.qkv.weight.shape == (3 * WIDTH, WIDTH)
    hidden = block.mlp.fc1_g.out_features
    padded = -(-hidden // 64) * 64
    assert ready.fc1.weight.shape == (2 * padded, WIDTH)
    assert ready.fc2.weight.shape == (WIDTH, padded)
    assert not list(ready.parameters()), "held as buffers: nothing is trained"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_keep_the_type_in_which_they_enter(dtype):
    block = blocks.Block(KINDS["plain"](), torch.bfloat16)
    assert block(tokens().to(dtype)).dtype is dtype


def test_a_block_of_another_build_is_left_alone():
    class Other(nn.Linear):
        """A layer that does more than a plain one."""

    block = KINDS["plain"]()
    block.attn.proj = Other(WIDTH, WIDTH)
    assert "Other" in blocks.reason(block)
    assert blocks.reason(KINDS["plain"]()) == ""
    assert "gate" in blocks.reason(EvaBlock(WIDTH, HEADS, norm_layer=NORM, gated_attn=True))
    assert "Mod" in blocks.reason(nn.ModuleList())


@pytest.mark.parametrize("name", ["dinov3_s", "tiny", "mini_vlm"])
def test_an_encoder_with_rewritten_blocks_is_equal(name):
    encoder = mfuser.build("linear", vfm=name, image_size=(64, 96), weights="random").get_submodule("vfm")
    assert isinstance(encoder, VisionEncoder)
    encoder = encoder.double().eval()
    images, taps = torch.rand(2, 3, 64, 96, dtype=torch.float64), (0, encoder.depth - 1)
    with torch.no_grad():
        before = encoder.tapped(images, taps)
        assert blocks.take(encoder, torch.float64)
        after = encoder.tapped(images, taps)
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-10)


class Necked(nn.Module):
    """A neck and a pixel decoder, as MFuser has them."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.fpn1, self.fpn2 = upsampling(channels)
        self.pixel_decoder = PixelDecoder(channels, dim=dim, layers=1, heads=2, points=2, ffn_dim=16, groups=2)


def test_the_neck_is_equal_to_its_modules_and_the_convolutions_behind_them():
    model = drawn(Necked(12, 8))
    maps = [torch.randn(2, 12, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    pixel = model.pixel_decoder
    with torch.no_grad():
        before = [pixel.lateral_conv(model.fpn1(maps[0])), pixel.input_convs[-1](model.fpn2(maps[1]))]
        assert neck.take(model, torch.float64)
        after = [pixel.lateral_conv(model.fpn1(maps[0])), pixel.input_convs[-1](model.fpn2(maps[1]))]
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-10)


def test_the_activation_within_the_neck_can_be_part_of_the_product_before_it():
    model, x = drawn(Necked(12, 8)), torch.randn(2, 12, 3, 5, dtype=torch.float64)
    with torch.no_grad():
        assert neck.take(model, torch.float64)
        assert not model.fpn1.joined, "of fp64, and on a CPU"
        before = model.fpn1(x)
        model.fpn1.joined = True
        # GELU's tanh form is where a GPU computes it
        torch.testing.assert_close(model.fpn1(x), before, rtol=1e-3, atol=1e-2)
    assert before.is_contiguous(memory_format=torch.channels_last)
    assert model.fpn2(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
def test_on_a_gpu_the_neck_in_16_bits_is_the_neck():
    torch.manual_seed(0)
    model, x = Necked(64, 32).eval().cuda(), torch.randn(2, 64, 9, 7, device="cuda")
    with torch.no_grad():
        expected = model.pixel_decoder.lateral_conv.conv(model.fpn1(x))
        assert neck.take(model, torch.bfloat16)
        assert model.fpn1.joined
        found = model.fpn1(x)
    assert (found - expected).norm() <= 0.01 * expected.norm()


def test_a_model_without_a_neck_keeps_its_modules():
    assert not neck.take(mfuser.build("linear", vfm="tiny", image_size=(64, 64)), torch.float32)
