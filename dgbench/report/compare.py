"""Two sides of runs compared: what changed in mIoU, by target and class, and in cost; what is significant; and a verdict.

Scores are compared by the matrices stored beside the records, on the same images of the same protocol, as a difference of
corpus-level mIoU (`report.statistics`). What cannot be compared is never taken for a pass or a regression.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dgbench import matrices, metrics, results
from dgbench import protocol as protocols
from dgbench.data.labels import CLASSES
from dgbench.errors import ResultError
from dgbench.report import costs, statistics
from dgbench.report.sides import ENVIRONMENT, Model, Run, Side, pairs
from dgbench.report.statistics import Difference

Verdict = Literal["better", "worse", "same", "new", "missing", "not comparable"]
MEAN = "mean of targets"
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Score:
    """A change of mIoU on a target, or of the mean over the unseen ones; scores in 0..1.

    Attributes:
        target: a domain, with `(source)` behind it for the source's own validation split, or `MEAN`.
        power: probability with which a drop of one point is found.
        detectable: the smallest drop that is found with a probability of 0.8.
        classes: change of each class's IoU, by name; significant ones, Holm-corrected over the classes, are in `changed`.
    """

    model: str
    target: str
    base: float | None
    head: float | None
    verdict: Verdict
    difference: Difference | None = None
    images: int = 0
    detectable: float | None = None
    power: float | None = None
    classes: Mapping[str, Difference] = field(default_factory=dict)
    changed: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """All changes from one side to the other.

    Attributes:
        max_drop: points of mIoU that a significant drop may have without being a regression.
        max_slowdown: percent that speed may fall without being a regression; None: speed does not decide.
        problems: a line for each file that cannot be read.
        notes: what the intervals cover, and in what the two trainings differ.
        regressions: a line for each.
    """

    base: str
    head: str
    max_drop: float
    max_slowdown: float | None
    scores: tuple[Score, ...]
    costs: tuple[costs.Cost, ...]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    regressions: tuple[str, ...] = ()
    verdict: Literal["pass", "regression", "not comparable"] = "not comparable"

    @property
    def exit_code(self) -> int:
        """0 pass, 1 regression, 3 not comparable."""
        return {"pass": 0, "regression": 1, "not comparable": 3}[self.verdict]


def compare(
    base: Side, head: Side, *, max_drop: float = 0.0, max_slowdown: float | None = None, noise: float | None = None
) -> Comparison:
    """Compare all models that two sides share.

    Args:
        max_drop: in points of mIoU: a significant drop up to this is no regression.
        max_slowdown: in percent, for training and scoring; None: costs are told, but do not decide.
        noise: standard deviation of the mIoU between training runs, in points, for sides of one run each; None: unknown.
    """
    matched, only_base, only_head = pairs(base, head)
    problems = [f"{side.name}: {problem}" for side in (base, head) for problem in side.problems]
    problems += [f"no records in {side.name}" for side in (base, head) if not side.models]
    scores: list[Score] = []
    cost: list[costs.Cost] = []
    notes: list[str] = []
    for before, after in matched:
        name = after.label if before.identity == after.identity else f"{before.label} → {after.label}"
        scores += _scores(name, before, after, max_drop / 100, noise)
        cost += costs.compare(name, before, after, max_slowdown)
        notes += _notes(name, before, after, noise)
    scores += [
        Score(model.label, target, _stored(model, key), None, "missing") for model in only_base for target, key in _targets(model)
    ]
    scores += [
        Score(model.label, target, None, _stored(model, key), "new") for model in only_head for target, key in _targets(model)
    ]
    regressions = [f"{score.model}: mIoU on {score.target}" for score in scores if score.verdict == "worse"]
    if max_slowdown is not None:
        regressions += [f"{one.model}: {one.name}" for one in cost if one.verdict == "worse"]
    unknown = problems or not scores or any(score.verdict in ("missing", "not comparable") for score in scores)
    return Comparison(
        base.name,
        head.name,
        max_drop,
        max_slowdown,
        tuple(scores),
        tuple(cost),
        tuple(problems),
        tuple(dict.fromkeys(notes)),
        tuple(regressions),
        # a regression that was found stands; otherwise what could not be compared keeps it from being a pass
        "regression" if regressions else "not comparable" if unknown else "pass",
    )


Key = tuple[str, str, str]  # target, split, protocol


def _targets(model: Model) -> list[tuple[str, Key]]:
    """Return what a model was scored on, in any of its runs, and how that is shown."""
    keys = dict.fromkeys(key for run in model.runs for key in run.scores)
    rules = {key[2] for key in keys}
    shown = []
    for key in keys:
        target, split, rule = key
        source = " (source)" if target in model.source.split("+") else ""
        shown.append((target + source + (f" {split}" if split != "val" else "") + (f" [{rule}]" if len(rules) > 1 else ""), key))
    return shown


def _stored(model: Model, key: Key) -> float | None:
    """Return the mean over training runs of a stored score."""
    values = [run.scores[key].miou for run in model.runs if key in run.scores]
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(model.runs) else None


@dataclass(slots=True)
class _Paired:
    """The matrices of both sides on one target, a list for each side in the order of its training runs."""

    base: list[NDArray[np.int64]]
    head: list[NDArray[np.int64]]
    classes: tuple[int, ...] | None
    absent: metrics.Absent


def _scores(name: str, before: Model, after: Model, allowed: float, noise: float | None) -> list[Score]:
    mine, others = dict(_targets(after)), dict(_targets(before))
    found: list[Score] = []
    paired: dict[str, _Paired] = {}
    for target in dict.fromkeys((*others, *mine)):
        base = _stored(before, others[target]) if target in others else None
        head = _stored(after, mine[target]) if target in mine else None
        if target not in mine or target not in others:
            found.append(Score(name, target, base, head, "missing" if target in others else "new"))
            continue
        try:
            paired[target] = _pair(before, after, others[target], mine[target])
        except ResultError as error:
            found.append(Score(name, target, base, head, "not comparable", note=error.message))
            continue
        both = paired[target]
        change = _with_noise(
            statistics.difference(both.base, both.head, classes=both.classes, absent=both.absent), before, after, noise
        )
        found.append(_with_classes(Score(name, target, base, head, "same", change, len(both.base[0])), both))
    unseen = {target: both for target, both in paired.items() if "(source)" not in target}
    if len(unseen) > 1 and len({(both.classes, both.absent) for both in unseen.values()}) == 1:
        rules = next(iter(unseen.values()))
        change = statistics.mean_difference(
            {target: both.base for target, both in unseen.items()},
            {target: both.head for target, both in unseen.items()},
            classes=rules.classes,
            absent=rules.absent,
        )
        values = [[s.base for s in found if s.target in unseen], [s.head for s in found if s.target in unseen]]
        means = [math.fsum(v for v in side if v is not None) / len(side) for side in values]
        images = sum(len(both.base[0]) for both in unseen.values())
        found.append(Score(name, MEAN, means[0], means[1], "same", _with_noise(change, before, after, noise), images))
    return _judged(found, allowed)


def _judged(scores: Sequence[Score], allowed: float) -> list[Score]:
    """Give verdicts to one model's scores: significance is corrected over its targets and their mean (Holm 1979)."""
    significant = statistics.holm([math.nan if s.difference is None else s.difference.p for s in scores])
    judged = []
    for score, real in zip(scores, significant, strict=True):
        change = score.difference
        if change is None:
            judged.append(score)
            continue
        verdict: Verdict = "same"
        if math.isnan(change.p):
            verdict = "not comparable"
        elif real and change.value > 0:
            verdict = "better"
        elif real and change.value < -allowed:
            verdict = "worse"
        note = "fewer than two images, or a score that hangs on one" if verdict == "not comparable" else score.note
        judged.append(
            dataclasses.replace(score, verdict=verdict, detectable=change.detectable(), power=change.power(0.01), note=note)
        )
    return judged


def _with_classes(score: Score, both: _Paired) -> Score:
    """Add the change of each class's IoU, and which are significant."""
    among = range(both.base[0].shape[1]) if both.classes is None else both.classes
    changes = {}
    for k in among:
        change = statistics.difference(both.base, both.head, classes=(k,), absent=both.absent)
        if not math.isnan(change.value):
            changes[CLASSES[k].name] = change
    real = statistics.holm([change.p for change in changes.values()])
    return dataclasses.replace(
        score, classes=changes, changed=tuple(name for name, found in zip(changes, real, strict=True) if found)
    )


def _pair(before: Model, after: Model, of_base: Key, of_head: Key) -> _Paired:
    """Read the matrices of one target of all training runs, image by image the same.

    Raises: ResultError saying why they cannot be compared.
    """
    first = _record(before.runs[0], of_base)
    rules = protocols.PROTOCOLS.get(first.protocol)
    if rules is None or (first.protocol_digest and rules.digest != first.protocol_digest):
        raise ResultError(f"protocol {first.protocol} is another one in this version of dgbench", "score both sides again")
    reference = results.read_matrices(first)
    sides = []
    for model, key in ((before, of_base), (after, of_head)):
        counts = []
        for run in model.runs:
            record = _record(run, key)
            if (record.protocol, record.protocol_hash) != (first.protocol, first.protocol_hash):
                raise ResultError(
                    "the sides were scored by different protocols, image sizes or label maps", "score both sides by one"
                )
            if record.rendered != first.rendered:
                raise ResultError("one side was scored on an export of a rendered domain", "score both sides on one set")
            counts.append(_checked(record, reference, rules))
        sides.append(counts)
    classes = None if rules.classes == len(CLASSES) else protocols.CLASS_SETS[rules.classes]
    return _Paired(sides[0], sides[1], classes, rules.absent_classes)


def _record(run: Run, key: Key) -> results.Record:
    if key not in run.scores:
        raise ResultError(f"the run with seed {run.seed} ({run.folder.name}) was not scored on it", "score it: dgbench eval")
    return run.scores[key]


def _checked(record: results.Record, reference: matrices.Matrices, rules: protocols.Protocol) -> NDArray[np.int64]:
    """Return the matrices of a record in the order of the reference's images.

    Raises: ResultError if they belong to other images, or their score is not the record's.
    """
    try:
        _, counts = matrices.paired(reference, results.read_matrices(record))
    except ValueError as error:
        raise ResultError(f"{record.path}: {error}", "score both sides on the same images") from None
    classes = protocols.CLASS_SETS[rules.classes]
    score = metrics.miou(counts.sum(axis=0), classes=classes, absent=rules.absent_classes)
    if record.miou is None or not math.isclose(score, record.miou, abs_tol=_ROUNDING):
        raise ResultError(f"{record.path}: its matrices give another mIoU than it says", "score the checkpoint again")
    return counts


def _with_noise(change: Difference, before: Model, after: Model, noise: float | None) -> Difference:
    """Widen a difference of single runs by the known spread between training runs, unless both are the same weights."""
    if noise is None or _same_weights(before, after) or max(change.seeds) > 1:
        return change
    return statistics.widened(change, 2 * (noise / 100) ** 2)


def _same_weights(before: Model, after: Model) -> bool:
    return {run.checkpoint for run in before.runs} == {run.checkpoint for run in after.runs} != {""}


def _notes(name: str, before: Model, after: Model, noise: float | None) -> Iterable[str]:
    if _same_weights(before, after):
        yield f"{name}: the same weights on both sides"
        return
    single = [side for side, model in (("base", before), ("head", after)) if len(model.runs) == 1]
    if len(single) == 2 and noise is None:
        yield f"{name}: one training run on each side: intervals cover other images, not other training runs"
    elif len(single) == 2:
        yield f"{name}: intervals are widened by a deviation of {noise:g} points between training runs"
    elif single:
        yield f"{name}: one training run of the {single[0]}: its spread between runs is not in the intervals"
    if differing := _differing(before, after):
        yield f"{name}: trained in another environment: {differing}"


def _differing(before: Model, after: Model) -> str:
    """Return what differs between the environments in which two models were trained."""
    told: dict[str, tuple[Any, Any]] = {}
    for key in ENVIRONMENT:
        values = [{run.trained.environment.get(key) for run in model.runs if run.trained} for model in (before, after)]
        if values[0] != values[1] and all(values):
            told[key] = (*(" or ".join(sorted(str(v) for v in side)) for side in values),)  # type: ignore[assignment]
    return ", ".join(f"{key} {a}, now {b}" for key, (a, b) in told.items())
