"""A product with its activation is the product, then the activation."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mfuser.decoder.pixel_decoder import PixelDecoderLayer
from mfuser.fast import activated
from mfuser.fast.blocks import Block


@pytest.mark.parametrize("act", [nn.ReLU(), nn.GELU()])
def test_one_product_is_the_product_then_the_activation(act):
    x, layer = torch.randn(2, 3, 8, dtype=torch.float64), nn.Linear(8, 12, dtype=torch.float64)
    with torch.no_grad():
        found = activated.activated(x, layer.weight, layer.bias, act)
        # GELU's tanh form is where a GPU computes it; a CPU has the other
        torch.testing.assert_close(found, act(layer(x)), rtol=0, atol=1e-12 if type(act) is nn.ReLU else 5e-4)


def test_a_layer_in_16_bits_takes_what_comes():
    layer = nn.Linear(8, 12)
    joined = activated.LinearReLU(layer, torch.bfloat16)
    x = torch.randn(2, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.relu(layer(x))
    assert torch.equal(joined(x), expected)


def test_only_products_in_16_bits_on_a_gpu_are_joined():
    weight, bias = torch.zeros(4, 4, dtype=torch.bfloat16), torch.zeros(4)
    assert not activated.joins(nn.GELU(), bias, weight)
    assert not activated.take(nn.ModuleList([PixelDecoderLayer(32, 2, 3, 4, 64)]), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize(("act", "within"), [(nn.ReLU(), 0.0), (nn.GELU(), 5e-4)])
def test_on_a_gpu_it_is_as_near_as_a_rounding(act, within):
    x, layer = torch.randn(64, 256, device="cuda"), nn.Linear(256, 1024, device="cuda")
    half = x.bfloat16(), layer.weight.detach().bfloat16(), layer.bias.detach().bfloat16()
    assert activated.joins(act, half[2], half[1])
    true = act(F.linear(*(each.double() for each in half)))
    found = activated.activated(*half, act).double()
    assert ((found - true).abs() <= 2**-8 * true.abs() + within + 1e-6).all()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["plain", "gated"])
def test_on_a_gpu_a_block_in_16_bits_is_the_block(kind):
    from timm.models.eva import EvaBlock
    from timm.models.vision_transformer import Block as Plain

    torch.manual_seed(0)
    block = Plain(64, 2) if kind == "plain" else EvaBlock(64, 2, swiglu_mlp=True, scale_mlp=True, mlp_ratio=2.67)
    block = block.eval().cuda()
    ready, x = Block(block, torch.bfloat16), torch.randn(2, 9, 64, device="cuda")
    assert ready.joined == (kind == "plain")
    with torch.no_grad():
        expected, found = block(x), ready(x)
    assert (found - expected).norm() <= 0.01 * expected.norm()
