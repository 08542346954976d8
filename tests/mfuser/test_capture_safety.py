"""Nothing in `training_outputs` of a model, forward and backward, that a CUDA graph could not hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from captures import found_in
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

import mfuser
from dgbench.engine.parallel import dropping_as_one
from mfuser import keyed_dropout, training_graphs
from mfuser.methods.mfuser import MFuser, Options
from mfuser.processes import part_of


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        return dout * torch.tensor([2.0, 2.0, 2.0], device=dout.device)[:, None, None]


class Scaled(nn.Module):
    """A model of one parameter, and something done to it."""

    def __init__(self, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.scale, self.then = nn.Parameter(torch.ones(3, 1, 1)), then

    def forward(self, images: Tensor) -> Tensor:
        return self.then(images * self.scale)


def found(then: Callable[[Tensor], Tensor]) -> list[str]:
    model = Scaled(then)
    return found_in(model, model, (2, 3, 8, 8), bf16=True).problems


def test_what_a_graph_can_hold_is_no_problem():
    assert found(lambda x: (x / 3 + 1).relu().sum((2, 3)).softmax(-1)) == []


@pytest.mark.parametrize(
    ("then", "operator"),
    [
        (lambda x: x * torch.tensor([1.0, 2.0, 3.0], device=x.device)[:, None, None], "_to_copy"),
        (lambda x: x * torch.ones(3, 1, 1).to(x.device), "_to_copy"),
        (lambda x: x * torch.tensor(2.0), "mul"),
        (lambda x: x[:, [0, 2]], "_to_copy"),
        (lambda x: x * x.cpu().sum(), "_to_copy"),
        (Doubled.apply, "_to_copy"),
    ],
    ids=["list", "host", "number of the host", "index", "copy to the host", "backward"],
)
def test_copies_from_and_to_the_host_are_found(then, operator):
    problems = found(then)
    assert any(operator in problem and "cpu" in problem for problem in problems), problems
    assert "test_capture_safety.py" in problems[0]


@pytest.mark.parametrize(
    ("then", "error"),
    [
        (lambda x: x * x.sum().item(), DataDependentOutputException),
        (lambda x: x if (x > 0).all() else 2 * x, DataDependentOutputException),
        (lambda x: x[x > 0], DynamicOutputShapeException),
    ],
    ids=["item", "condition", "mask"],
)
def test_questions_to_the_device_raise(then, error):
    with pytest.raises(error):
        found(then)


def test_a_parameter_without_a_gradient_is_named():
    model = Scaled(lambda x: x)
    model.other = nn.Parameter(torch.ones(1))
    assert found_in(model, model, (2, 3, 8, 8), bf16=False).unused == ["other"]


MODELS = {
    "mfuser": {"vfm": "tiny", "vlm": "tiny"},
    "rein": {"vfm": "tiny"},
    "set": {"vfm": "tiny"},
    "soma": {"vfm": "tiny"},
    "vltseg": {"vfm": "tiny"},
    "mask2former": {"vfm": "tiny"},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_pass_of_each_method_can_be_captured(name):
    model = mfuser.build(name, **MODELS[name], image_size=(64, 64), weights="random")
    model.enter_training()
    model.train()
    assert training_graphs.captures(model)
    result = found_in(model, model.training_outputs, (2, 3, 64, 64), bf16=True)
    assert result.problems == []
    assert result.unused == []
    assert min(result.forward, result.backward) > 500


@pytest.mark.parametrize("keyed", [False, True], ids=["drawn", "keyed"])
@pytest.mark.parametrize("name", ["mfuser", "rein"])
def test_so_can_that_of_a_process_that_drops_its_part_of_what_the_batch_draws(name, keyed):
    options = {"dropout": 0.3} if name == "mfuser" else {}
    model = mfuser.build(name, **MODELS[name], **options, image_size=(64, 64), weights="random")
    model.enter_training()
    model.train()
    if keyed:  # as in compiled blocks
        keyed_dropout.key(model, keyed_dropout.Place())
    labels = torch.zeros(2, 64, 64, dtype=torch.long)

    def run(images: Tensor) -> Any:
        with part_of((labels, labels), 1), dropping_as_one(model, 2):  # on the device that the model is on by now
            return model.training_outputs(images)

    result = found_in(model, run, (2, 3, 64, 64), bf16=True)
    assert result.problems == []
    assert result.unused == []


@pytest.mark.full
@pytest.mark.parametrize(("vfm", "vlm"), [("dinov2_l", "eva02"), ("dinov2_l", "clip"), ("dinov3_l", "siglip")])
def test_so_can_a_full_size_pass(vfm, vlm):
    """Fake tensors have no memory: the towers' weights are never made."""
    model = MFuser(Options(vfm=vfm, vlm=vlm, token_ids=[[1, 2, 3, 4, 5]] * 19)).train()
    result = found_in(model, model.training_outputs, (2, 3, 512, 512), bf16=True)
    assert result.problems == []
    assert result.unused == []
