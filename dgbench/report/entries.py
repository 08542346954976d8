"""Rows of a leaderboard: of one model, of several that differ in their seed alone, and of a recipe's expected results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dgbench.report import conditions
from dgbench.report.expected import SOURCE, Reference
from dgbench.report.models import Model, whole
from dgbench.report.ranks import Entry
from dgbench.report.rows import Row, Score, Shift
from dgbench.results import Record


@dataclass(frozen=True, slots=True)
class Detail:
    """What scores say beside their mIoU."""

    per_class: bool = False
    per_condition: bool = False  # reads the matrices of targets with several conditions


PLAIN = Detail()


def of_models(models: Sequence[Model], columns: Sequence[str], detail: Detail) -> Entry:
    """Return the row of one model, or of several: then means and deviations over seeds, all of them full on all columns."""
    newest = models[0].newest
    each = [{column: _score(model.records.get(column), detail) for column in columns} for model in models]
    scores = {column: _over_seeds([one[column] for one in each]) for column in columns}
    source_score = _over_seeds([_score(model.records.get(SOURCE), detail) for model in models])
    mean = mean_of(list(scores.values()))
    if mean is not None and len(models) > 1:
        means = [found for one in each if (found := mean_of(list(one.values()))) is not None]
        mean = replace(mean, deviation=statistics.stdev(score.miou for score in means))
    images, available = models[0].source_images()
    row = Row(
        "run",
        newest.method,
        newest.variant,
        newest.recipe,
        newest.recipe_hash,
        str(newest.run or ""),
        newest.created,
        source_score,
        scores,
        mean,
        settings=models[0].telling if len(models) > 1 else models[0].telling_alone,
        source_images=images,
        source_available=available,
        shift=shift(source_score, scores, mean),
        seeds=len(models),
        runs=tuple(dict.fromkeys(str(model.newest.run) for model in models if model.newest.run)),
        commits=tuple(dict.fromkeys(commit for model in models if (commit := _commit(model.newest)))),
        weights=models[0].weights,
    )
    return Entry(row, tuple(models))


def of_reference(reference: Reference, columns: Sequence[str]) -> Entry:
    """Return the row of a recipe's expected results."""

    def score(target: str) -> Score | None:
        return Score(reference.miou[target]) if target in reference.miou else None

    scores = {column: score(column) for column in columns}
    mean = mean_of(list(scores.values()))
    row = Row(
        "reference",
        reference.method,
        reference.variant,
        reference.recipe,
        "",
        reference.origin,
        "",
        score(reference.source),
        scores,
        mean,
        shift=shift(score(reference.source), scores, mean),
    )
    return Entry(row)


def mean_of(scores: Sequence[Score | None]) -> Score | None:
    """Average complete rows only; half-widths add in quadrature, as the targets' images are drawn independently."""
    full = [score for score in scores if score is not None and not score.partial]
    if not full or len(full) < len(scores):
        return None
    value = math.fsum(score.miou for score in full) / len(full)
    n_images = sum(score.n_images or 0 for score in full) or None
    halves = [score.half for score in full if score.half is not None]
    if len(halves) < len(full):
        return Score(value, n_images=n_images)
    half = math.sqrt(math.fsum(h * h for h in halves)) / len(halves)
    return Score(value, value - half, value + half, n_images)


def shift(source: Score | None, scores: Mapping[str, Score | None], mean: Score | None) -> Shift:
    """Return what is lost from the source to the targets; nothing where a mean or a full score of the source is missing."""
    if mean is None:
        return Shift()
    full = {target: score.miou for target, score in scores.items() if score is not None}
    spread, worst = (max(full.values()) - min(full.values()), min(full, key=full.__getitem__)) if len(full) > 1 else (None, "")
    if source is None or source.partial:
        return Shift(spread=spread, worst=worst)
    retention = mean.miou / source.miou if source.miou > 0 else None
    return Shift(source.miou - mean.miou, retention, spread, worst)


def _score(record: Record | None, detail: Detail) -> Score | None:
    if record is None or record.miou is None:
        return None
    return Score(
        record.miou,
        *record.interval,
        n_images=record.n_images,
        partial=not whole(record),
        iou=record.iou if detail.per_class else (),
        conditions=conditions.of_record(record) if detail.per_condition else {},
    )


def _over_seeds(scores: Sequence[Score | None]) -> Score | None:
    """Return the mean over seeds with its sample deviation; None if a seed has no score.

    The interval is over images alone. Its half is the mean of the seeds' halves, as if their errors rose and fell together:
    it is not too short, whatever they share.
    """
    if len(scores) == 1:
        return scores[0]
    full = [score for score in scores if score is not None]
    if len(full) < len(scores) or any(score.partial for score in full):
        return None
    value = statistics.fmean(score.miou for score in full)
    halves = [score.half for score in full if score.half is not None]
    half = statistics.fmean(halves) if len(halves) == len(full) else None
    shared = [name for name in full[0].conditions if all(name in score.conditions for score in full)]
    return Score(
        value,
        None if half is None else value - half,
        None if half is None else value + half,
        full[0].n_images,
        deviation=statistics.stdev(score.miou for score in full),
        iou=tuple(_mean_or_none(values) for values in zip(*(score.iou for score in full), strict=False)),
        conditions={name: _mean_or_none([score.conditions[name] for score in full]) for name in shared},
    )


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _commit(record: Record) -> str:
    return f"{record.commit[:12]}{'+' if record.dirty else ''}" if record.commit else ""
