"""A training's blocks: compiled once for equal ones, recomputed, frozen weights in 16 bits; what each leaves as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import mfuser
from mfuser import blocks, keyed_dropout
from mfuser.pairs import paired
from mfuser.segmentor import Batch, Segmentor
from mfuser.towers.vit import VisionEncoder


def model(name: str = "mfuser", **options: object) -> Segmentor:
    towers = {"vfm": "tiny", "vlm": "tiny"} if name == "mfuser" else {"vfm": "tiny"}
    torch.manual_seed(0)
    made = mfuser.build(name, **towers, image_size=(64, 64), weights="random", freeze_towers=True, **options)
    made.enter_training()
    made.train()
    return made


def step(trained: Segmentor, *, bf16: bool) -> dict[str, Tensor]:
    """The loss terms and gradients of a step."""
    torch.manual_seed(1)
    batch = Batch(torch.rand(2, 3, 64, 64), torch.randint(0, 19, (2, 64, 64)))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        terms = trained.loss(batch)
    torch.stack(list(terms.values())).sum().backward()
    found = {name: p.grad for name, p in trained.named_parameters() if p.grad is not None}
    trained.zero_grad()
    return {**terms, **found}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []


@pytest.mark.parametrize("name", ["mfuser", "soma", "rein"])
def test_frozen_weights_in_16_bits_give_what_autocast_gives_bit_for_bit(name):
    expected = step(model(name), bf16=True)
    changed = model(name)
    assert len(blocks.FrozenWeights(changed))
    assert_equal(step(changed, bf16=True), expected)


def test_only_frozen_weights_of_products_are_in_16_bits_and_saving_sees_none_of_it(tmp_path):
    changed = model()
    before = {name: tensor.clone() for name, tensor in changed.state_dict().items()}
    frozen = blocks.FrozenWeights(changed)
    halved = {name for name, parameter in changed.named_parameters() if parameter.dtype is torch.bfloat16}
    assert "vfm.trunk.blocks.0.attn.qkv.weight" in halved
    assert "vlm.trunk.blocks.1.mlp.fc1.bias" in halved
    assert not any("norm" in name or name.startswith(("adapters", "mask_decoder", "contexts")) for name in halved)
    assert not any(changed.get_parameter(name).requires_grad for name in halved)
    with frozen.whole():
        mfuser.save(changed, tmp_path)
    assert_equal(dict(mfuser.load(tmp_path).state_dict()), before)
    assert {name for name, parameter in changed.named_parameters() if parameter.dtype is torch.bfloat16} == halved


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_blocks_have_the_same_gradients_bit_for_bit(dropout):
    expected = step(model(dropout=dropout), bf16=False)
    changed = model(dropout=dropout)
    pairs = len(changed.adapters)
    assert blocks.recompute_blocks(changed) == len(blocks.tower_blocks(changed)) - pairs > pairs  # and blocks of text
    assert_equal(step(changed, bf16=False), expected)


def kept_bytes(trained: Segmentor) -> int:
    """Of what the forward pass keeps for the backward pass, the trained and frozen weights left out."""
    own = {p.untyped_storage().data_ptr() for p in (*trained.parameters(), *trained.buffers())}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        terms = trained.loss(Batch(torch.rand(2, 3, 64, 64), torch.randint(0, 19, (2, 64, 64))))
    del terms
    return sum(found.values())


def test_recomputed_blocks_keep_less():
    plain, changed = model(), model()
    blocks.recompute_blocks(changed)
    assert kept_bytes(changed) < kept_bytes(plain)


def test_a_frozen_block_keeps_no_input_of_a_product():
    """Each input of a product has the width of what it multiplies; what softmax, norms and activations need stays."""
    tower = VisionEncoder("tiny", (64, 64)).requires_grad_(False).train()
    tokens = torch.randn(2, tower.prefix + tower.grid[0] * tower.grid[1], tower.dim)

    def kept(given: Tensor) -> list[tuple[int, ...]]:
        seen: list[tuple[int, ...]] = []
        own = {p.untyped_storage().data_ptr() for p in tower.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                seen.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            tower.block(0, given)
        return seen

    assert kept(tokens) == []  # before the first trained part nothing is kept
    frozen = kept(tokens.clone().requires_grad_())
    tower.requires_grad_(True)
    trained = kept(tokens.clone().requires_grad_())
    # inputs of queries, keys and values, of the attention's projection, and of both layers of the MLP
    assert len(trained) - len(frozen) == 4


def test_copies_are_without_it():
    changed = model()
    blocks.recompute_blocks(changed)
    copied = copy.deepcopy(changed)
    assert all(block._compiled_call_impl is None for block in blocks.tower_blocks(copied))


def test_equal_blocks_share_one_graph_and_compute_the_same():
    from torch._dynamo.utils import counters

    torch.manual_seed(0)
    tower = VisionEncoder("tiny", (32, 32))
    tokens = torch.randn(2, tower.prefix + tower.grid[0] * tower.grid[1], tower.dim)

    def run() -> list[Tensor]:
        given, out = tokens.clone().requires_grad_(), None
        for i in range(tower.depth):
            out = tower.block(i, given if out is None else out)
        parameters = [p for block in tower.trunk.blocks for p in block.parameters()]
        return [out, *torch.autograd.grad(out.square().sum(), [given, *parameters])]

    expected = run()
    torch._dynamo.reset()
    counters.clear()
    assert blocks.compile_blocks(tower) == tower.depth > 1
    for actual, wanted in zip(run(), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1


def test_dropouts_in_blocks_are_keyed_in_one_place_and_those_of_a_copy_are_not():
    changed = model(dropout=0.1)
    blocks.compile_blocks(changed)
    drops = {name: module for name, module in changed.named_modules() if isinstance(module, nn.Dropout)}
    inside = {name for name, drop in drops.items() if keyed_dropout.is_keyed(drop)}
    assert {f"adapters.{i}.dropout" for i in range(len(changed.adapters))} < inside
    assert {id(drops[name].replaced_forward.given[0]) for name in inside} == {id(keyed_dropout.place_of(changed))}
    copied = copy.deepcopy(changed)
    assert not any(keyed_dropout.is_keyed(module) for module in copied.modules())
    assert copied.adapters[0].dropout.forward.__self__ is copied.adapters[0].dropout


def test_a_pair_does_what_the_model_does_and_is_no_part_of_it():
    expected, changed = model(), model()
    names = list(changed.state_dict())
    assert len(paired(changed)) == len(changed.adapters)
    assert paired(changed) is paired(changed)
    assert list(changed.state_dict()) == names
    assert_equal(step(changed, bf16=False), step(expected, bf16=False))
    copied = copy.deepcopy(changed)
    assert copied.pair.pairs[0].vfm is copied.vfm.trunk.blocks[0]
    assert not paired(model("rein"))


def test_what_has_no_blocks_says_so():
    plain = nn.Sequential(nn.Linear(2, 2))
    assert blocks.compile_blocks(plain) == blocks.recompute_blocks(plain) == len(blocks.tower_blocks(plain)) == 0
