"""The products of towers alone: as many operations as two counters find, and the gradients that a training needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from dgbench.cost.counted import Subject, built, made_now
from dgbench.cost.products import Attention, Product, aligned, bare, described, flop, of_towers
from dgbench.errors import DgbenchError
from dgbench.recipe import load_method

CPU = torch.device("cpu")


def towers(vfm: str, vlm: str, side: int) -> tuple[Subject, list[Any]]:
    subject = Subject(load_method("mfuser", {"vfm": vfm, "vlm": vlm}, ()), (side, side))
    model: Any = built(subject, weights="meta", backend="torch").to("meta")
    return subject, [model.vfm, model.vlm]


@pytest.mark.parametrize(("vfm", "vlm", "side"), [("tiny", "tiny", 64), ("dinov2_b", "clip_b", 64), ("dinov2_l", "eva02", 56)])
def test_operations_are_those_of_the_count(vfm: str, vlm: str, side: int) -> None:
    subject, pair = towers(vfm, vlm, side)
    counted = made_now(subject).counted.by_module
    for tower, name in zip(pair, ("vfm", "vlm"), strict=True):
        steps = of_towers([tower], 1, subject.size)
        # the rotary table of the tower costs none
        assert flop(steps) == 2 * counted[name].products


def test_operations_grow_with_the_batch() -> None:
    _, pair = towers("tiny", "tiny", 64)
    one, three = (of_towers(pair, batch, (64, 64)) for batch in (1, 3))
    assert len(one) == len(three)
    assert flop(three) == 3 * flop(one)
    assert flop(three, training=True) == 3 * flop(one, training=True)


@pytest.mark.parametrize("training", [False, True])
def test_what_runs_is_what_was_noted(training: bool) -> None:
    _, pair = towers("tiny", "tiny", 64)
    steps = of_towers(pair, 2, (64, 64))
    # torch's counter knows no fused attention of CPUs
    noted = [step for step in steps if isinstance(step, Product)]
    assert 0 < len(noted) < len(steps)
    call = bare(steps, CPU, torch.float32, training=training)
    with FlopCounterMode(display=False) as counter:
        call()
    assert counter.get_total_flops() == flop(noted, training=training)


def test_frozen_towers_need_gradients_of_inputs_alone_and_only_behind_the_first_block() -> None:
    _, pair = towers("dinov2_b", "clip_b", 64)
    blocks = pair[0].depth
    steps = of_towers(pair[:1], 1, (64, 64))
    weights = [step for step in steps if isinstance(step, Product)]
    attentions = [step for step in steps if isinstance(step, Attention)]
    assert not any(step.second for step in weights)
    assert len(weights) == 1 + 4 * blocks
    assert [step.first for step in weights] == [False] * 5 + [True] * (4 * (blocks - 1))
    assert [step.gradient for step in attentions] == [False] + [True] * (blocks - 1)


def test_trained_towers_need_gradients_of_weights_too() -> None:
    _, pair = towers("tiny", "tiny", 64)
    first, *others = [step for step in of_towers(pair[:1], 1, (64, 64)) if isinstance(step, Product)]
    assert (first.first, first.second) == (False, True)  # images need none
    assert all(step.first and step.second for step in others)


def test_gradients_have_the_operations_of_autograd() -> None:
    x, w = torch.randn(6, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    a, b = torch.randn(2, 4, 5, requires_grad=True), torch.randn(2, 5, 7, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        (F.linear(x, w).sum() + (a @ b).sum()).backward()
    steps = [Product(1, 6, 5, 3, True, True, True), Product(2, 4, 5, 7, False, True, True)]
    assert flop(steps, training=True) == counter.get_total_flops()
    call = bare(steps, CPU, torch.float32, training=True)
    with FlopCounterMode(display=False) as counter:
        call()
    assert flop(steps, training=True) == counter.get_total_flops()


def test_attention_costs_two_products_and_backward_five() -> None:
    step = Attention((2, 3, 7, 8), (2, 3, 5, 8), (2, 3, 5, 4), gradient=True)
    scores = 2 * 3 * 7 * 5
    assert step.flop == 2 * scores * (8 + 4)
    # scores again, and the gradients of values, probabilities, queries and keys
    assert step.training_flop - step.flop == 2 * scores * (8 + 4 + 4 + 8 + 8)
    bare([step], CPU, torch.float32, training=True)()


def test_padding_to_multiples_of_8_changes_only_widths_that_are_none() -> None:
    odd, even, attention = Product(1, 9, 10, 2730), Product(1, 9, 16, 24), Attention((1, 1, 3, 5), (1, 1, 3, 5), (1, 1, 3, 5))
    assert aligned([odd, even, attention]) == [Product(1, 9, 16, 2736), even, attention]


def test_kinds_are_described_with_their_number() -> None:
    lines = list(described([Product(1, 2, 3, 4), Product(1, 2, 3, 4), Attention((1, 2, 5, 8), (1, 2, 6, 8), (1, 2, 6, 8))]))
    assert lines == ["2 x product of 2 x 3 with 3 x 4", "1 x attention of 1 x 2 heads, 5 by 6 tokens of 8"]


class _Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depth = 1

    def embed(self, images: Tensor) -> Tensor:
        return images.flatten(2)

    def rope(self) -> None:
        return None

    def block(self, index: int, tokens: Tensor, rope: None) -> Tensor:
        return F.scaled_dot_product_attention(tokens[:, None], tokens[:, None], tokens[:, None], is_causal=True)[:, 0]


class _Summed(_Masked):
    def block(self, index: int, tokens: Tensor, rope: None) -> Tensor:
        return torch.einsum("blc,bmc->blm", tokens, tokens)


@pytest.mark.parametrize(("tower", "named"), [(_Masked, "mask"), (_Summed, "`einsum`")])
def test_what_is_not_timed_is_an_error_that_names_it(tower: type[Any], named: str) -> None:
    with pytest.raises(DgbenchError, match=named):
        of_towers([tower()], 1, (4, 4))
