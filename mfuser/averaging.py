"""A moving average of the trained weights, which is scored in their place."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class WeightAverage(nn.Module):
    """Exponential moving average of parameters, as mmengine's hook makes it.

    It is a copy of the parameters until `start` steps are done; from then on, behind every step,
    average <- (1 - momentum) average + momentum parameter.
    """

    done: Tensor

    def __init__(self, model: nn.Module, start: int, momentum: float) -> None:
        """Begin with a copy of the trained parameters of `model`."""
        super().__init__()
        self.start, self.momentum = start, momentum
        self.names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        held = dict(model.named_parameters())
        self.values = nn.ParameterList(nn.Parameter(held[name].detach().clone(), requires_grad=False) for name in self.names)
        self.register_buffer("done", torch.zeros((), dtype=torch.long))
        self._taken = 0  # `done` as a number: to ask a GPU for it would be to wait for the GPU

    @torch.no_grad()
    def follow(self, model: nn.Module, done: int) -> None:
        """Update by the parameters after `done` steps; a second call for the same step changes nothing."""
        if done <= self._taken:
            return
        held = dict(model.named_parameters())
        now: list[Tensor] = [held[name] for name in self.names]
        averages: list[Tensor] = list(self.values)
        # of hundreds of tensors at a time on a GPU; on a CPU one by one
        if not averages:
            pass
        elif done <= self.start:
            torch._foreach_copy_(averages, now)
        else:
            torch._foreach_lerp_(averages, now, self.momentum)
        self._taken = done
        self.done.fill_(done)

    def exchanged(self, state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """Return a model's state with averages and parameters in each other's places; the tensors are those of `state`.

        Args:
            prefix: of this module in the state.
        """
        exchanged = dict(state)
        for i, name in enumerate(self.names):
            own = f"{prefix}values.{i}"
            exchanged[name], exchanged[own] = state[own], state[name]
        return exchanged

    def resume(self) -> None:
        """Continue from the number of steps that was loaded into `done`."""
        self._taken = int(self.done)
