"""What a change costs: speed, memory, parameters and the loss curve of two models, from the records of their runs.

Times are compared on equal machines alone (device, platform, threads). A ratio is taken of each measurement that both sides
have: one for the training, one for each target that was scored. Its interval is Student's over their logarithms, and at least
as wide as `NOISE`, by which repeated runs on one machine differed when this was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dgbench.report.curves import curves
from dgbench.report.sides import Model, Run

Verdict = Literal["better", "worse", "same", "not comparable"]

NOISE = 0.03
"""Relative change below which two times on one machine are taken for equal: docs/profile.md."""
_MACHINE = ("device", "cpu", "platform", "threads")


@dataclass(frozen=True, slots=True)
class Cost:
    """One cost of a model on both sides; `change` is relative, 0.1 for 10 % more, with its interval where there is one."""

    model: str
    name: str
    base: float | None
    head: float | None
    verdict: Verdict
    change: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""


def compare(name: str, before: Model, after: Model, max_slowdown: float | None = None) -> list[Cost]:
    """Return the costs that the records of both sides have."""
    allowed = max(NOISE, 0.0 if max_slowdown is None else max_slowdown / 100)
    machines = [{tuple(env.get(key, "") for key in _MACHINE) for env in _environments(model)} for model in (before, after)]
    alike = machines[0] == machines[1] and len(machines[0]) == 1
    found: list[Cost] = []
    for what, speeds in (("training, images/s", _training), ("scoring, images/s", _scoring)):
        sides = [[speeds(run) for run in model.runs] for model in (before, after)]
        if all(any(side) for side in sides):
            found.append(_speed(name, what, sides, allowed, alike))
    for what, key in (("peak memory, GiB", "peak_gib"), ("parameters and buffers, M", "values_m")):
        values = [_mean([_extra(run, key) for run in model.runs]) for model in (before, after)]
        if values[0] and values[1]:
            found.append(_amount(name, what, values[0], values[1], alike or key != "peak_gib"))
    if curve := _loss_curve(name, before, after):
        found.append(curve)
    return found


def _environments(model: Model) -> list[dict[str, str]]:
    return [
        record.environment for run in model.runs for record in (*run.scores.values(), *([run.trained] if run.trained else []))
    ]


def _training(run: Run) -> dict[str, float]:
    speed = _extra(run, "images_per_second")
    return {"": speed} if speed else {}


def _scoring(run: Run) -> dict[str, float]:
    """Images a second through the model alone: reading and decoding belong to the disk."""
    return {
        f"{target} {protocol}": record.n_images / seconds
        for (target, _, protocol), record in run.scores.items()
        if (seconds := record.seconds.get("model")) and record.n_images
    }


def _speed(name: str, what: str, sides: Sequence[Sequence[dict[str, float]]], allowed: float, alike: bool) -> Cost:
    """Compare images a second. Every run of one side is held against every run of the other, measurement by measurement."""
    from scipy import special

    base, head = ([value for run in side for value in run.values()] for side in sides)
    means = (_mean(base), _mean(head))
    if not alike:
        return Cost(name, what, *means, "not comparable", note="another machine or number of threads")
    of_base, of_head = (_logarithms(side) for side in sides)
    ratios = [of_head[key] - of_base[key] for key in of_base if key in of_head]
    if not ratios:
        return Cost(name, what, *means, "not comparable", note="measured on other targets")
    middle = math.fsum(ratios) / len(ratios)
    half = math.log1p(NOISE)
    if len(ratios) > 1:
        variance = math.fsum((ratio - middle) ** 2 for ratio in ratios) / (len(ratios) - 1)
        half = max(half, float(special.stdtrit(len(ratios) - 1, 0.975)) * math.sqrt(variance / len(ratios)))
    change, low, high = (math.expm1(value) for value in (middle, middle - half, middle + half))
    verdict: Verdict = "same"
    if high < 0 and change < -allowed:
        verdict = "worse"
    elif low > 0 and change > allowed:
        verdict = "better"
    return Cost(name, what, *means, verdict, change, low, high)


def _logarithms(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the mean logarithm over training runs of each measurement that all of them have."""
    shared = [key for key in runs[0] if all(key in run for run in runs)]
    return {key: math.fsum(math.log(run[key]) for run in runs) / len(runs) for key in shared}


def _amount(name: str, what: str, base: float, head: float, alike: bool) -> Cost:
    if not alike:
        return Cost(name, what, base, head, "not comparable", note="another machine or number of threads")
    change = head / base - 1
    verdict: Verdict = "same" if abs(change) <= NOISE else "worse" if change > 0 else "better"
    return Cost(name, what, base, head, verdict, change)


def _loss_curve(name: str, before: Model, after: Model) -> Cost | None:
    """Return how far apart the loss curves of equal seeds are, relative to the loss of the base.

    Its noise is how far apart curves of different seeds of the base are; with one seed only equal curves get a verdict.
    """
    mine = {run.seed: _losses(run.folder) for run in before.runs}
    others = {run.seed: _losses(run.folder) for run in after.runs}
    if len(mine) == len(others) == 1:
        others = dict(zip(mine, others.values(), strict=True))
    apart = [found for seed in mine if (found := _apart(mine[seed], others.get(seed, {}))) is not None]
    if not apart:
        return None
    distance = math.fsum(apart) / len(apart)
    known = list(mine.values())
    noise = [found for i, a in enumerate(known) for b in known[:i] if (found := _apart(a, b)) is not None]
    floor = math.fsum(noise) / len(noise) if noise else 0.0
    ends = [_mean([curve[max(curve)] for curve in side.values() if curve]) for side in (mine, others)]
    if distance <= floor:
        note = "equal" if distance == 0 else f"curves of other seeds of the base lie {100 * floor:.1f} % apart"
        return Cost(name, "loss curve, distance", ends[0], ends[1], "same", distance, note=note)
    note = (
        f"curves of other seeds of the base lie {100 * floor:.1f} % apart"
        if noise
        else "one seed: the usual distance is not known"
    )
    return Cost(name, "loss curve, distance", ends[0], ends[1], "not comparable", distance, note=note)


def _apart(a: dict[int, float], b: dict[int, float]) -> float | None:
    steps = a.keys() & b.keys()
    total = math.fsum(abs(a[step]) for step in steps)
    return math.fsum(abs(a[step] - b[step]) for step in steps) / total if total > 0 else None


def _losses(folder: Path) -> dict[int, float]:
    """Return the logged loss by step; empty if there is no log that can be read."""
    try:
        found = curves(folder)
    except (OSError, ValueError):
        return {}
    logged = zip(found.steps, found.losses["loss"], strict=True) if found else ()
    return {step: loss for step, loss in logged if math.isfinite(loss)}


def _extra(run: Run, key: str) -> float | None:
    value = run.trained.extra.get(key) if run.trained else None
    return value if isinstance(value, float) and math.isfinite(value) and value > 0 else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
