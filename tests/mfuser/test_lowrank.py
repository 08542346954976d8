"""Low-rank terms against numbers recorded from SoMA's code (tests/goldens/README.md)."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from golden_files import noise, numbers, relative_error
from named_weights import named_tensor
from torch import Tensor, nn

from mfuser.lowrank import LowRankLinear, add_low_rank, components, factors, merge
from mfuser.towers.vit import VisionEncoder


@dataclass(frozen=True)
class Unit:
    """One of the goldens' layers."""

    weights: str
    inputs: int
    outputs: int
    alpha: float = 4.0
    largest: bool = False


UNITS = {
    "square": Unit("square", 24, 24),
    "wide": Unit("wide", 24, 40),
    "tall": Unit("tall", 40, 24),
    "alpha8": Unit("square", 24, 24, alpha=8.0),
    "major": Unit("square", 24, 24, largest=True),
}


def named(name: str, *shape: int) -> Tensor:
    return torch.from_numpy(named_tensor(f"soma/{name}", shape))


def layer(unit: Unit) -> LowRankLinear:
    """The layer with components of its weight beside it, and without them in it."""
    linear = nn.Linear(unit.inputs, unit.outputs)
    linear.weight.data = named(f"{unit.weights}.weight", unit.outputs, unit.inputs)
    linear.bias.data = named(f"{unit.weights}.bias", unit.outputs)
    made = LowRankLinear(linear, 4, unit.alpha).requires_grad_(False)
    made.take_components(made.weights(), largest=unit.largest)
    made.weight -= made.term()
    return made


@pytest.mark.parametrize("name", UNITS)
def test_a_layer_begins_with_the_authors_components(name):
    goldens, unit = numbers("soma"), UNITS[name]
    made = layer(unit)
    a, b = made.lora_a, made.lora_b
    found = {"delta": made.term(), "residual": made.weight, "AAt": a @ a.T, "BtB": b.T @ b}
    found["y_init"] = made(noise(f"soma/{unit.weights}.x", 2, 5, unit.inputs))
    for what, value in found.items():
        assert relative_error(goldens, f"{name}.{what}", value) < 1e-5, what
    for what, value in {"absA": a.abs(), "absB": b.abs()}.items():  # the signs are LAPACK's
        assert relative_error(goldens, f"{name}.{what}", value) < 1e-3, what


@pytest.mark.parametrize("name", UNITS)
def test_a_trained_layer_and_its_merged_weight_compute_what_the_authors_do(name):
    goldens, unit = numbers("soma"), UNITS[name]
    made, x = layer(unit), noise(f"soma/{unit.weights}.x", 2, 5, unit.inputs)
    made.lora_a.copy_(named(f"{unit.weights}.lora_A.weight", 4, unit.inputs))
    made.lora_b.copy_(named(f"{unit.weights}.lora_B.weight", unit.outputs, 4))
    assert relative_error(goldens, f"{name}.y_trained", made(x)) < 1e-5
    plain = made.merged()
    assert type(plain) is nn.Linear
    assert relative_error(goldens, f"{name}.merged", plain.weight) < 1e-5
    assert relative_error(goldens, f"{name}.y_merged", plain(x)) < 1e-5


def test_weights_that_are_stacked_have_terms_of_their_own():
    torch.manual_seed(0)
    stacked = LowRankLinear(nn.Linear(6, 12), 2, 4.0, parts=3)
    stacked.take_components(stacked.weights())
    for i in range(3):
        weight = stacked.weight[4 * i : 4 * i + 4].detach()
        alone = nn.Linear(6, 4)
        alone.weight.data, alone.bias.data = weight, stacked.bias[4 * i : 4 * i + 4].detach()
        one = LowRankLinear(alone, 2, 4.0)
        one.take_components([weight])
        x = torch.randn(3, 5, 6)
        torch.testing.assert_close(stacked(x)[..., 4 * i : 4 * i + 4], one(x))
        torch.testing.assert_close(stacked.term()[4 * i : 4 * i + 4], one.term())


def test_the_smallest_and_the_largest_components_make_up_the_matrix():
    matrix = torch.randn(7, 5)
    (small_a, small_b), (large_a, large_b) = components(matrix, 2, 0.5), components(matrix, 3, 0.5, largest=True)
    torch.testing.assert_close(0.5 * (small_b @ small_a + large_b @ large_a), matrix)


def test_a_new_term_changes_nothing():
    linear = nn.Linear(6, 4)
    x = torch.randn(2, 6)
    torch.testing.assert_close(LowRankLinear(linear, 2, 16.0)(x), linear(x))


def test_a_rank_beyond_the_layers_is_refused():
    with pytest.raises(ValueError, match=r"rank 5 is not one of 1..4, which a layer of 12x6 allows"):
        LowRankLinear(nn.Linear(6, 12), 5, 5.0, parts=3)


def test_a_tower_with_terms_gives_the_same_maps_when_they_are_merged():
    torch.manual_seed(0)
    encoder = VisionEncoder("tiny", (32, 32)).eval()
    added = add_low_rank(encoder.trunk.blocks[1:], 4, 4.0)
    assert len(added) == 2 * 4
    assert len(factors(encoder)) == 2 * len(added)
    for one in added:
        nn.init.normal_(one.lora_b)
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        apart = encoder.tapped(images, (2,))
        assert merge(encoder)
        torch.testing.assert_close(encoder.tapped(images, (2,)), apart, rtol=1e-4, atol=1e-4)
    assert not factors(encoder)
    assert not merge(encoder)


def test_an_attention_that_does_not_call_its_layers_is_refused():
    encoder = VisionEncoder("timm:eva_giant_patch14_224", (28, 28))
    with pytest.raises(ValueError, match="reads weights without calling its layers"):
        add_low_rank(encoder.trunk.blocks, 4, 4.0)
