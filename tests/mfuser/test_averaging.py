"""The moving average of weights, against numbers recorded from mmengine's (tests/goldens/README.md) and torch's own."""

from __future__ import annotations

import torch
from golden_files import numbers, relative_error
from named_weights import named_tensor
from torch import nn

from mfuser.averaging import WeightAverage


def named(name: str) -> torch.Tensor:
    return torch.from_numpy(named_tensor(f"soma/{name}", (2, 3)))


def model() -> nn.Module:
    made = nn.Linear(3, 2, bias=False)
    made.weight.data = named("ema.start")
    return made


def test_three_updates_give_the_authors_average():
    """The first of them, at the start, is a copy, as mmengine's is."""
    trained = model()
    average = WeightAverage(trained, 1, 2e-4)
    for done in (1, 2, 3):
        trained.weight.data = named(f"ema.{done - 1}")
        average.follow(trained, done)
    assert relative_error(numbers("soma"), "ema.after3", average.values[0]) < 1e-6


def test_from_its_start_it_is_torchs_average_and_before_it_a_copy():
    trained = model()
    average, oracle = WeightAverage(trained, 2, 0.1), None
    for done in range(1, 7):
        trained.weight.data = torch.randn(2, 3)
        average.follow(trained, done)
        if done == 2:
            oracle = torch.optim.swa_utils.AveragedModel(trained, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
            oracle.update_parameters(trained)
        elif oracle is not None:
            oracle.update_parameters(trained)
        expected = trained.weight if oracle is None else oracle.module.weight
        torch.testing.assert_close(average.values[0], expected)


def test_the_same_step_counts_once():
    trained = model()
    average = WeightAverage(trained, 0, 0.5)
    trained.weight.data = named("ema.0")
    average.follow(trained, 1)
    before = average.values[0].clone()
    average.follow(trained, 1)
    assert torch.equal(average.values[0], before)


def test_frozen_parameters_are_not_averaged():
    assert len(WeightAverage(nn.Linear(3, 2).requires_grad_(False), 0, 0.5).values) == 0
