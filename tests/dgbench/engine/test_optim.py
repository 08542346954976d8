"""Optimizers and learning rates of a recipe's `optim`, against torch's own and mmengine's formulas."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from golden_files import numbers
from torch import nn

import mfuser
from dgbench.engine.optim import Rate, groups, optimizer_of
from dgbench.engine.train import train
from dgbench.errors import RecipeError
from dgbench.progress import Silent
from dgbench.recipe import OptimSpec, load_recipe, recipe_hash
from mfuser.segmentor import Segmentor

HASH = "deef3dcffd66"  # of streets/source-only, before these keys were


class Plain(Segmentor):
    """A trunk with a norm, a frozen part and a head whose name begins as the trunk's does."""

    def __init__(self) -> None:
        super().__init__()
        self.method = "plain"
        self.trunk = nn.ModuleDict({"stem": nn.Linear(3, 4), "norm": nn.LayerNorm(4)})
        self.trunk_head = nn.Linear(4, 2)
        self.text = nn.Linear(2, 2).requires_grad_(False)


def spec(**given: object) -> OptimSpec:
    return OptimSpec.model_validate({"lr": 0.01, "weight_decay": 0.1, **given})


def by_name(optim: OptimSpec) -> dict[str, tuple[float, float, float, float]]:
    """Learning rate, weight decay, peak and floor of each parameter."""
    model = Plain()
    names = {id(p): n for n, p in model.named_parameters()}
    rows = zip(*groups(model, optim), strict=True)
    return {names[id(p)]: (row["lr"], row["weight_decay"], rate.peak, rate.floor) for row, rate in rows for p in row["params"]}


def test_without_keys_the_groups_are_the_methods_own() -> None:
    model = Plain()
    rows, rates = groups(model, spec())
    own = model.groups(0.01, 0.1)
    assert [{**row, "params": list(map(id, row["params"]))} for row in rows] == [
        {**row, "params": list(map(id, row["params"]))} for row in own
    ]
    assert rates == [Rate(0.01, 0.0, row["weight_decay"]) for row in own]


def test_the_longest_key_path_decides_and_what_it_leaves_out_is_the_methods() -> None:
    found = by_name(spec(min_lr=1e-6, groups={"trunk": {"lr_factor": 0.1}, "trunk.stem": {"weight_decay": 0.3, "min_lr": 0}}))
    assert found["trunk.norm.weight"] == (0.001, 0.0, 0.001, 1e-6), "no decay of norms, as without the recipe's word"
    assert found["trunk.stem.weight"] == (0.01, 0.3, 0.01, 0.0)
    assert found["trunk_head.weight"] == (0.01, 0.1, 0.01, 1e-6), "a key holds whole parts of a name"
    assert "text.weight" not in found
    assert by_name(spec(groups={"trunk": {"weight_decay": 0.2}}))["trunk.norm.bias"][1] == 0.2


@pytest.mark.parametrize(
    ("key", "said", "hint"),
    [
        ("trunk.stm", "`trunk.stm` holds no parameter of `plain`", "did you mean `trunk.stem`?"),
        ("tru", "`tru` holds no parameter of `plain`", "trunk"),
        ("text", "`text` holds frozen parameters only", "its parameters begin with trunk, trunk_head"),
    ],
)
def test_a_key_without_trainable_parameters_is_an_error_with_near_names(key: str, said: str, hint: str) -> None:
    with pytest.raises(RecipeError) as error:
        groups(Plain(), spec(groups={key: {}}))
    assert said in error.value.message
    assert hint in str(error.value.hint)


def mmengine(peak: float, begin: int, steps: int, power: float, eta_min: float) -> list[float]:
    """PolyLR of mmengine 0.10 (optim/scheduler/param_scheduler.py, `PolyParamScheduler._get_value`), a recursion."""
    value, found = peak, []
    for step in range(begin, steps):
        if step > begin:
            value = (value - eta_min) * (1 - 1 / (steps - step + 1)) ** power + eta_min
        found.append(value)
    return found


@pytest.mark.parametrize("peak", [1e-5, 1e-6, 1e-7], ids=["above the floor", "at the floor, as tqdm's backbone", "below it"])
def test_each_groups_rate_is_mmengines_with_an_absolute_floor(peak: float) -> None:
    optim = spec(lr=1e-5, warmup_steps=5, warmup_ratio=1e-6, power=0.9, min_lr=1e-6)
    rate = Rate(peak, optim.min_lr)
    found = [rate.at(step, 30, optim) for step in range(30)]
    warm = [peak * (1e-6 + (1 - 1e-6) * step / 5) for step in range(5)]
    assert found == pytest.approx([*warm, *mmengine(peak, 5, 30, 0.9, 1e-6)], rel=1e-9)


SOMA = {
    "gta512": load_recipe("soma/dinov2_l-gta", check_method=False).optim,
    "c2bm512": load_recipe("soma/dinov2_l-city", check_method=False).optim,
}
SOMA["acdc1024"] = SOMA["gta512"].model_copy(update={"warmup_steps": 10_000, "warmup_ratio": 1e-6})


@pytest.mark.parametrize("setting", SOMA)
def test_with_its_ends_at_the_last_step_the_schedule_is_the_one_that_somas_optimizer_had(setting: str) -> None:
    goldens, optim = numbers("soma"), SOMA[setting]
    rates = [Rate(optim.groups["vfm"].lr_factor * optim.lr, 0.0), Rate(optim.lr, 0.0), Rate(optim.lr, 0.0)]
    for step, theirs in zip(goldens["schedule.iters"].tolist(), goldens[f"schedule.{setting}.lr"].tolist(), strict=True):
        assert [rate.at(step, 40_000, optim) for rate in rates] == pytest.approx(theirs, rel=1e-6, abs=0), step


def test_a_cosine_takes_the_weight_decay_of_every_group_to_its_end_as_somas_does() -> None:
    goldens, optim = numbers("soma"), SOMA["gta512"]
    rates = [Rate(5e-5, 0.0, 0.05), Rate(1e-4, 0.0, 0.05), Rate(1e-4, 0.0, 0.0)]
    for step, theirs in zip(goldens["schedule.iters"].tolist(), goldens["schedule.weight_decay"].tolist(), strict=True):
        if step < 40_000:  # there is no such step
            assert [rate.decay_at(step, 40_000, optim) for rate in rates] == pytest.approx(theirs, rel=1e-6, abs=1e-16), step


def test_without_a_schedule_weight_decay_stays() -> None:
    assert [Rate(0.01, 0.0, 0.1).decay_at(step, 3, spec()) for step in range(3)] == [0.1] * 3


def test_the_weight_decay_of_a_step_is_what_the_optimizer_takes(tmp_path: Path) -> None:
    settings = ["data.size=[64, 128]", "data.crop=[64, 64]", "data.train_images=2", "train.steps=4", "train.batch_size=2"]
    recipe = load_recipe("streets/source-only", [*settings, "optim.weight_decay_schedule={to: 0.5, shape: cosine}"])
    train(recipe, tmp_path / "run", progress=Silent(), device="cpu")
    (folder,) = (tmp_path / "run" / "checkpoint").iterdir()
    held = [group["weight_decay"] for group in torch.load(folder / "optimizer.pt", weights_only=True)["param_groups"]]
    left = (1 + math.cos(math.pi * 3 / 4)) / 2
    assert held == pytest.approx([0.5 - 0.49 * left, 0.5 - 0.5 * left])


def test_a_factor_of_zero_keeps_still_but_for_the_floor() -> None:
    assert [Rate(0.0, 0.0).at(step, 10, spec()) for step in range(10)] == [0.0] * 10
    assert Rate(0.0, 1e-6).at(0, 10, spec()) == 0.0


def test_a_constant_rate_stays_after_warm_up() -> None:
    optim = spec(schedule="constant", warmup_steps=2, warmup_ratio=0.5, min_lr=1e-3)
    assert [Rate(0.01, 1e-3).at(step, 6, optim) for step in range(6)] == [0.005, 0.0075, 0.01, 0.01, 0.01, 0.01]


@pytest.mark.parametrize(
    ("given", "oracle"),
    [
        ({}, lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1)),
        ({"betas": [0.8, 0.9]}, lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.9), weight_decay=0.1)),
        ({"optimizer": "sgd"}, lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1)),
        (
            {"optimizer": "sgd", "momentum": 0.5, "nesterov": True},
            lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.5, nesterov=True, weight_decay=0.1),
        ),
        ({"optimizer": "sgd", "momentum": 0}, lambda p: torch.optim.SGD(p, lr=0.01, weight_decay=0.1)),
    ],
    ids=["adamw", "betas", "sgd", "nesterov", "plain sgd"],
)
def test_steps_are_those_of_torchs_own_optimizer(given: dict, oracle) -> None:
    ours, theirs = Plain(), Plain()
    ours.no_decay = ()
    theirs.load_state_dict(ours.state_dict())
    optimizer, _ = optimizer_of(ours, spec(**given))
    reference = oracle([p for p in theirs.parameters() if p.requires_grad])
    for step in range(4):
        for model, one in ((ours, optimizer), (theirs, reference)):
            for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
                p.grad = torch.sin(torch.arange(p.numel()).float() + i + step).view_as(p)
            one.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("optim.nesterov=true", "nesterov is not used by `adamw`: set optimizer=sgd"),
        ("optim.momentum=0.5", "momentum is not used by `adamw`"),
        ("optim.optimizer=adam", "expected 'adamw' or 'sgd', got 'adam'"),
        ("optim.schedule=cosine", "expected 'poly' or 'constant', got 'cosine'"),
        ("optim.groups.head.lr=1", "unknown key"),
    ],
)
def test_an_optimizer_that_does_not_fit_is_told_with_its_key(setting: str, said: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe("streets/source-only", [setting], check_method=False)
    assert said in error.value.message


def test_keys_left_alone_leave_hashes_and_others_change_them() -> None:
    usual = load_recipe("streets/source-only")
    assert recipe_hash(usual) == HASH
    alone = ["optim.optimizer=adamw", "optim.betas=[0.9, 0.999]", "optim.schedule=poly", "train.init=null"]
    assert recipe_hash(load_recipe("streets/source-only", alone)) == HASH
    for setting in (
        "optim.optimizer=sgd",
        "optim.schedule=constant",
        "optim.groups.head.lr_factor=2",
        "train.init=x",
        "data.extra.style=x",
    ):
        assert recipe_hash(load_recipe("streets/source-only", [setting])) != HASH, setting


def test_every_method_takes_groups_by_the_names_of_its_parts() -> None:
    model = mfuser.build("source-only", backbone="tiny", image_size=(32, 32), weights="random")
    rows, _ = groups(model, spec(groups={"head": {"lr_factor": 10}}))
    assert sorted({row["lr"] for row in rows}) == [0.01, 0.1]
