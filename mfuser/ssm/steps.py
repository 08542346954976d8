"""Step sizes as these layers start: log-uniform over two decades."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

LOW, HIGH = 1e-3, 1e-1


def log_steps(channels: int, low: float = LOW, high: float = HIGH) -> Tensor:
    """Return logarithms of step sizes (D,), uniform between those of `low` and `high`."""
    return torch.rand(channels) * (math.log(high) - math.log(low)) + math.log(low)


def reset_steps(dt_proj: nn.Linear, low: float = LOW, high: float = HIGH, floor: float = 1e-4) -> None:
    """Step sizes log-uniform in low..high, as Mamba starts; softplus(bias) is the step."""
    bound = dt_proj.in_features**-0.5
    nn.init.uniform_(dt_proj.weight, -bound, bound)
    step = torch.exp(log_steps(len(dt_proj.bias), low, high)).clamp(min=floor)
    with torch.no_grad():
        # the inverse of softplus, in a form that keeps its digits for small steps
        dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))
