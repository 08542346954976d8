"""A patch embedding as a product: outputs, gradients, which layers, and that a copy of the model is without it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import mfuser
from mfuser import blocks
from mfuser.patch_product import take


class Embedded(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.patch_embed.proj(x)


@pytest.mark.parametrize("size", [(28, 42), (31, 45)], ids=["whole patches", "pixels left over"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["channels first", "channels last"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_it_is_equal_to_the_convolution(size, layout, bias):
    torch.manual_seed(0)
    plain = Embedded(nn.Conv2d(3, 10, 14, 14, bias=bias)).double().to(memory_format=layout)
    changed = copy.deepcopy(plain)
    assert take(changed) == 1
    found = []
    for model in (plain, changed):
        x = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(memory_format=layout)
        out = model(x.requires_grad_())
        found.append(
            [out, *torch.autograd.grad((out * torch.linspace(-1, 1, 10)[:, None, None]).sum(), [x, *model.parameters()])]
        )
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


def test_under_autocast_it_has_the_convolutions_type_and_rounding():
    torch.manual_seed(0)
    plain = Embedded(nn.Conv2d(3, 16, 14, 14))
    changed = copy.deepcopy(plain)
    take(changed)
    x = torch.randn(2, 3, 28, 28)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = plain(x), changed(x)
    assert found.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_tokens_are_a_view_of_what_the_product_wrote():
    model = Embedded(nn.Conv2d(3, 16, 4, 4))
    take(model)
    assert model(torch.randn(2, 3, 8, 12)).flatten(2).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    "conv",
    [nn.Conv2d(3, 8, 7, 4, 3), nn.Conv2d(3, 9, 4, 4, groups=3), nn.Sequential(nn.Conv2d(3, 8, 4, 4))],
    ids=["overlapping", "groups", "a stem"],
)
def test_other_layers_stay(conv):
    assert take(Embedded(conv)) == 0


def test_a_compiled_training_has_it_and_a_copy_is_without():
    model = mfuser.build("linear", vfm="dinov2_s", image_size=(32, 32), weights="random")
    blocks.compile_blocks(model)
    (name,) = (name for name, part in model.named_modules() if name.endswith("patch_embed.proj") and "forward" in vars(part))
    proj = copy.deepcopy(model).get_submodule(name)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(proj(x), nn.Conv2d.forward(proj, x))
