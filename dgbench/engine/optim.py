"""Optimizers of a recipe's `optim`: parameter groups by key path, and each group's learning rate and weight decay at a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dgbench.errors import RecipeError, suggest
from dgbench.recipe import OptimSpec
from mfuser.segmentor import Segmentor


@dataclass(frozen=True, slots=True)
class Rate:
    """Peak and minimum of a group's learning rate, and its initial weight decay."""

    peak: float
    floor: float
    weight_decay: float = 0.0

    def at(self, step: int, steps: int, optim: OptimSpec) -> float:
        """Return the learning rate of a step: linear warm-up, then poly decay to the floor, or a constant rate.

        The forms are those of mmengine's LinearLR and PolyLR: warm-up rises from `warmup_ratio` of the peak at step 0 to the
        peak; the poly part, (peak - floor) (1 - t)^power + floor, runs over the steps after `warmup_steps`. Peak and floor are
        reached by the step behind the last of each part or, with `ends: last`, by its last, as mmengine has it. The floor is
        absolute: a group whose peak is lower rises to it.
        """
        return self.peak * self.factor(step, steps, optim) if self.peak else self.floor * (1 - _left(step, steps, optim))

    def factor(self, step: int, steps: int, optim: OptimSpec) -> float:
        """Return the rate of a step as a factor on the peak."""
        if step < optim.warmup_steps:
            return optim.warmup_ratio + (1 - optim.warmup_ratio) * step / _length(optim.warmup_steps, optim)
        floor = self.floor / self.peak
        return float((1 - floor) * _left(step, steps, optim) + floor)

    def decay_at(self, step: int, steps: int, optim: OptimSpec) -> float:
        """Return the weight decay of a step; a cosine runs from the group's own to `to`, which the step after the last has."""
        if (schedule := optim.weight_decay_schedule) is None:
            return self.weight_decay
        return schedule.to + (self.weight_decay - schedule.to) * (1 + math.cos(math.pi * step / steps)) / 2


def _left(step: int, steps: int, optim: OptimSpec) -> float:
    """Return (1 - t)^power, 1 until the end of warm-up."""
    if optim.schedule == "constant" or step < optim.warmup_steps:
        return 1.0
    progress = (step - optim.warmup_steps) / _length(steps - optim.warmup_steps, optim)
    return float((1 - min(1.0, progress)) ** optim.power)


def _length(steps: int, optim: OptimSpec) -> int:
    """Return the length of a part of the schedule, at whose end its last value is reached."""
    return max(1, steps - (optim.ends == "last"))


def optimizer_of(model: Segmentor, optim: OptimSpec) -> tuple[torch.optim.Optimizer, list[Rate]]:
    """Return the recipe's optimizer of a model's trainable parameters, and the rates of its groups.

    Raises: RecipeError as `groups`.
    """
    rows, rates = groups(model, optim)
    if optim.optimizer == "sgd":
        # not fused: that form fails for a parameter whose first gradient comes at a later step, and rounds otherwise; on a GPU
        # torch takes hundreds of tensors at a time anyway
        momentum, nesterov = optim.momentum, optim.nesterov
        return torch.optim.SGD(rows, lr=optim.lr, momentum=momentum, nesterov=nesterov, weight_decay=optim.weight_decay), rates
    return torch.optim.AdamW(rows, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True), rates


def groups(model: Segmentor, optim: OptimSpec) -> tuple[list[dict[str, Any]], list[Rate]]:
    """Return the optimizer's groups, and the rates of each: the method's own groups, divided by the recipe's key paths.

    A key matches the parameters whose dotted names begin with its parts; the longest match applies. If it does not set the
    weight decay, the method does (`no_decay`, `no_decay_types`).

    Raises: RecipeError for a key that matches no trainable parameter.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    _check_keys(model, optim)
    rows, rates = [], []
    for base in model.groups(optim.lr, optim.weight_decay):
        by_key: dict[str | None, list[torch.nn.Parameter]] = {}
        for parameter in base["params"]:
            by_key.setdefault(_key_of(names[id(parameter)], optim.groups), []).append(parameter)
        for key, parameters in by_key.items():
            row, floor = {**base, "params": parameters}, optim.min_lr
            if key is not None:
                own = optim.groups[key]
                row["lr"] = base["lr"] * own.lr_factor
                row["weight_decay"] = base["weight_decay"] if own.weight_decay is None else own.weight_decay
                floor = optim.min_lr if own.min_lr is None else own.min_lr
            rows.append(row)
            rates.append(Rate(row["lr"], floor, row["weight_decay"]))
    return rows, rates


def _holds(key: str, name: str) -> bool:
    return name == key or name.startswith(f"{key}.")


def _key_of(name: str, keys: Sequence[str] | dict[str, Any]) -> str | None:
    return max((key for key in keys if _holds(key, name)), key=len, default=None)


def _check_keys(model: Segmentor, optim: OptimSpec) -> None:
    parameters = dict(model.named_parameters())
    for key in optim.groups:
        held = [parameter for name, parameter in parameters.items() if _holds(key, name)]
        if any(parameter.requires_grad for parameter in held):
            continue
        trained = [name.split(".") for name, parameter in parameters.items() if parameter.requires_grad]
        paths = {".".join(parts[:depth]) for parts in trained for depth in range(1, len(parts) + 1)}
        near = suggest(key, paths)
        top = sorted({path.partition(".")[0] for path in paths})
        raise RecipeError(
            f"optim.groups: `{key}` holds {'frozen parameters only' if held else 'no parameter'} of `{model.method}`",
            f"did you mean `{near}`?" if near else f"its parameters begin with {', '.join(top)}",
        )
