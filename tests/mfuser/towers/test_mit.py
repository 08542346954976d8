"""MiT: maps and sizes, parameters, and stages against the numbers of SHADE's code, which has SegFormer's."""

from __future__ import annotations

import pytest
import torch
from golden_files import numbers
from named_weights import named_input, named_tensor, sample_index
from torch import Tensor, nn

from mfuser.keys import renamed
from mfuser.towers.key_rules import MIT
from mfuser.towers.mit import STRIDES, MiTEncoder
from mfuser.towers.table import mits
from mfuser.towers.vit import VisionEncoder

GOLDENS = numbers("shade_mitb5")


def by_name(module: nn.Module, prefix: str = "") -> None:
    """Give the parameters of a part of the trunk the values of SegFormer's names."""
    module.to_empty(device="cpu")
    for name, parameter in module.named_parameters():
        (key,) = renamed(prefix + name, MIT).keys
        parameter.data = torch.from_numpy(named_tensor(f"backbone.{key}", tuple(parameter.shape)))


def assert_recorded(found: Tensor, number: int) -> None:
    places = torch.from_numpy(sample_index(f"net.c{number}", found.numel(), 4096))
    torch.testing.assert_close(found.flatten()[places], GOLDENS[f"eval.c{number}"], rtol=1e-5, atol=2e-5)


def test_the_first_stage_with_weights_by_name_is_the_authors() -> None:
    encoder = MiTEncoder("mit_b5").eval()
    by_name(encoder.trunk.stage1, "stage1.")
    with torch.no_grad():
        assert_recorded(encoder.stem(torch.from_numpy(named_input("net.image", (2, 3, 64, 96)))), 1)


@pytest.mark.full
def test_all_maps_with_weights_by_name_are_the_authors() -> None:
    encoder = MiTEncoder("mit_b5").eval()
    by_name(encoder.trunk)
    with torch.no_grad():
        maps = encoder.maps(encoder.stem(torch.from_numpy(named_input("net.image", (2, 3, 64, 96)))))
    for number, found in enumerate(maps, 1):
        assert_recorded(found, number)


def test_mit_b5_has_the_published_number_of_parameters() -> None:
    assert sum(p.numel() for p in MiTEncoder("mit_b5").parameters()) == 81_443_008


@pytest.mark.parametrize("name", mits())
def test_maps_of_any_size_have_the_strides_rounded_up(name: str) -> None:
    with torch.device("meta"):
        encoder = MiTEncoder(name).to("meta").eval()
        maps = encoder(torch.rand(1, 3, 70, 128))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (c, -(-70 // s), 128 // s) for c, s in zip(encoder.channels, STRIDES, strict=True)
    ]


def test_stochastic_depth_rises_from_none_to_a_tenth() -> None:
    trunk = MiTEncoder("mit_b5").trunk
    stages = (trunk.stage1, trunk.stage2, trunk.stage3, trunk.stage4)
    rates = [block.drop_path.drop_prob for stage in stages for block in stage.block]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.1, 52))


def test_an_image_is_normalised_before_the_first_stage() -> None:
    encoder = MiTEncoder("tiny_mit").eval()
    images = torch.rand(1, 3, 32, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    by_hand = (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images)[0], encoder.stem(by_hand))


def test_other_towers_are_refused_by_what_they_are() -> None:
    with pytest.raises(ValueError, match="`resnet50` is no MiT; choose from mit_b5, tiny_mit"):
        MiTEncoder("resnet50")
    with pytest.raises(ValueError, match="`mit_b5` is a hierarchical transformer, not a plain transformer; choose from dinov2_s"):
        VisionEncoder("mit_b5", (64, 64))
