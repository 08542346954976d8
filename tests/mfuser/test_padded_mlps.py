"""Frozen MLPs with zeros behind their hidden channels: what they compute, what is left alone, what saving and copying see."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from captures import found_in
from timm.layers import LayerNorm, SwiGLU
from timm.models.eva import EvaBlock
from torch import Tensor, nn

from mfuser import blocks
from mfuser.padded import pad_mlp, paddable

WIDTH, HIDDEN, PADDED = 32, 85, 128
NORM = partial(LayerNorm, eps=1e-6)


def drawn(module: nn.Module) -> nn.Module:
    """Frozen, in training mode, every parameter drawn: nothing is zero or one by its initialisation."""
    generator = torch.Generator().manual_seed(0)
    for value in module.parameters():
        value.data = torch.randn(value.shape, generator=generator) * 0.3 + 0.1
    return module.requires_grad_(False).train()


def mlp(hidden: int = HIDDEN, **options: object) -> SwiGLU:
    return drawn(SwiGLU(WIDTH, hidden, **({"norm_layer": NORM} | options)))


class Tower(nn.Module):
    """Blocks as EVA02-L's, of an odd hidden width."""

    def __init__(self, depth: int = 3, **options: object) -> None:
        super().__init__()
        made = {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "mlp_ratio": 8 / 3, "norm_layer": NORM} | options
        self.blocks = nn.ModuleList(EvaBlock(WIDTH, 2, **made) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def ends(module: nn.Module, *, bf16: bool = True) -> list[Tensor]:
    """Output and gradient of the input."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 7, WIDTH, generator=generator).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = module(x)
    down = torch.randn(y.shape, generator=generator)
    return [y.detach().float(), *torch.autograd.grad(y, x, down.to(y.dtype))]


def assert_near(found: list[Tensor], expected: list[Tensor], within: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= within * other.norm()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("options", [{}, {"norm_layer": None}, {"bias": False}, {"norm_layer": partial(LayerNorm, bias=False)}])
def test_a_padded_mlp_computes_the_same_but_for_rounding(options, bf16):
    plain, padded = mlp(**options), mlp(**options)
    assert paddable(padded)
    pad_mlp(padded, 64)
    assert padded.fc1_g.weight.shape == padded.fc1_x.weight.shape == (PADDED, WIDTH)
    assert padded.fc2.weight.shape == (WIDTH, PADDED)
    assert_near(ends(padded, bf16=bf16), ends(plain, bf16=bf16), 2e-2 if bf16 else 1e-6)
    assert all(not layer.weight[HIDDEN:].any() for layer in (padded.fc1_g, padded.fc1_x))


def test_a_norm_that_is_trained_has_its_gradients():
    plain, padded = mlp(), mlp()
    pad_mlp(padded, 64)
    found = []
    for each in (plain, padded):
        each.norm.requires_grad_(True)
        each(torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(1))).square().sum().backward()
        found.append([each.norm.weight.grad, each.norm.bias.grad])
    assert_near(found[1], found[0], 1e-6)


def test_frozen_towers_are_padded_where_that_is_asked_for_or_they_are_trained_on_a_gpu():
    assert blocks.FrozenWeights(drawn(Tower())).padded == 0
    assert blocks.FrozenWeights(drawn(Tower()), align=64).padded == 3
    assert blocks.FrozenWeights(drawn(Tower()), device=torch.device("cuda")).padded == 3
    assert blocks.FrozenWeights(drawn(Tower()), device=torch.device("cuda"), align=0).padded == 0
    halved, padded = drawn(Tower()), drawn(Tower())
    blocks.FrozenWeights(halved)
    blocks.FrozenWeights(padded, align=64)
    assert_near(ends(padded), ends(halved), 2e-2)


@pytest.mark.parametrize(
    "options",
    [
        {"hidden": 88},  # fast as it is
        {"drop": 0.1},  # would draw for the zeros, too
        {"act_layer": partial(nn.Softmax, -1)},  # counts the zeros
        {"norm_layer": nn.BatchNorm1d},
        {"norm_layer": partial(LayerNorm, affine=False)},
    ],
)
def test_mlps_of_another_build_are_left_alone(options):
    assert paddable(mlp())
    assert not paddable(mlp(**options))


@pytest.mark.parametrize("name", ["fc1_g.weight", "fc1_x.bias", "fc2.weight"])
def test_an_mlp_that_is_trained_is_left_alone(name):
    tower = drawn(Tower())
    tower.blocks[1].mlp.get_parameter(name).requires_grad_(True)
    assert blocks.FrozenWeights(tower, align=64).padded == 2
    assert tower.blocks[1].mlp.fc1_x.weight.shape == (HIDDEN, WIDTH)


def test_an_inner_dropout_leaves_an_mlp_alone_and_what_the_training_alone_needs_stays_as_it_is():
    assert blocks.FrozenWeights(drawn(Tower(proj_drop=0.1)), align=64).padded == 0
    tower = Tower()
    tower.training_only = nn.ModuleDict({"teacher": Tower()})
    assert blocks.FrozenWeights(drawn(tower), align=64).padded == 3


def test_another_multiple_than_of_8_is_refused():
    with pytest.raises(ValueError, match="align is 12, and products are slow at widths that are no multiples of 8; use 64"):
        blocks.FrozenWeights(drawn(Tower()), align=12)


def test_within_whole_everything_is_as_it_was_bit_for_bit_and_behind_it_where_it_was():
    tower = drawn(Tower())
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    frozen = blocks.FrozenWeights(tower, align=64)
    expected, addresses = ends(tower), [p.data_ptr() for p in tower.parameters()]
    with frozen.whole():
        held = tower.state_dict()
        assert list(held) == list(before)
        assert all(held[name].dtype == value.dtype and torch.equal(held[name], value) for name, value in before.items())
    assert [p.data_ptr() for p in tower.parameters()] == addresses
    assert all(map(torch.equal, ends(tower), expected))


def test_a_copy_is_plain():
    halved, padded = drawn(Tower()), drawn(Tower())
    blocks.FrozenWeights(halved)
    frozen = blocks.FrozenWeights(padded, align=64)
    copied = copy.deepcopy(padded)
    expected = halved.state_dict()
    assert {name: value.shape for name, value in copied.state_dict().items()} == {k: v.shape for k, v in expected.items()}
    assert all(torch.equal(value, expected[name]) for name, value in copied.state_dict().items())
    assert copied.blocks[0].mlp.forward.__self__ is copied.blocks[0].mlp
    for again in (copied, copy.deepcopy(copied)):
        assert all(map(torch.equal, ends(again), ends(halved)))
    assert padded.blocks[0].mlp.fc2.weight.shape == (WIDTH, PADDED)
    with frozen.whole():
        whole = copy.deepcopy(padded)
    assert all(map(torch.equal, ends(whole), ends(drawn(Tower()))))


def test_recomputed_blocks_have_the_same_gradients_bit_for_bit():
    plain, changed = drawn(Tower()), drawn(Tower())
    for each in (plain, changed):
        blocks.FrozenWeights(each, align=64)
    blocks.recompute_blocks(changed)
    assert all(map(torch.equal, ends(changed), ends(plain)))


def test_nothing_more_is_kept_for_the_backward_pass_but_the_zeros():
    def kept(module: nn.Module) -> int:
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = module(torch.randn(2, 7, WIDTH).requires_grad_())
        del y
        return sum(sizes.values())

    plain, padded = mlp(), mlp()
    pad_mlp(padded, 8)
    assert kept(padded) <= 88 / 85 * kept(plain)


def test_a_cuda_graph_can_hold_it():
    tower = drawn(Tower())
    tower.blocks[0].norm1.requires_grad_(True)
    assert blocks.FrozenWeights(tower, align=64).padded == 3
    found = found_in(tower, lambda images: tower(images.reshape(2, -1, WIDTH)), (2, 3, 8, 8), bf16=True)
    assert found.problems == found.unused == []


def test_compiled_blocks_share_one_graph_and_keep_it_after_saving():
    from torch._dynamo.utils import counters

    halved, padded = drawn(Tower()), drawn(Tower())
    blocks.FrozenWeights(halved)
    frozen = blocks.FrozenWeights(padded, align=64)
    torch._dynamo.reset()
    counters.clear()
    assert blocks.compile_blocks(padded) == 3
    first = ends(padded)
    assert_near(first, ends(halved), 2e-2)
    with frozen.whole():
        padded.state_dict()
    assert all(map(torch.equal, ends(padded), first))
    assert counters["stats"]["unique_graphs"] == 1
