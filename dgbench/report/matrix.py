"""Source by target: what models that were trained on each source score on each domain, one matrix for each protocol.

Scores that were measured otherwise are never in one matrix: another protocol by name or digest, another hash of a column
(image size, label map), exports of rendered scenes beside published sets. Runs that differ in their seeds alone are one row,
mean and standard deviation over the seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dgbench.data.catalog import names
from dgbench.report import settings
from dgbench.results import Record

_SEED = "train.seed"
# what may differ between runs of one row: the seed, which targets were scored, how a run goes
_FREE = (_SEED, "data.targets", *settings.INCIDENTAL)


@dataclass(frozen=True, slots=True)
class Value:
    """One mIoU in 0..1: of one run, or the mean over runs with other seeds."""

    miou: float
    deviation: float | None = None  # standard deviation over seeds (n - 1); None of a single one
    seeds: int = 1
    partial: bool = False  # not of the images of the published split, no more and no fewer
    seen: bool = False  # the model was trained on this domain


@dataclass(frozen=True, slots=True)
class MatrixRow:
    """One model trained on one source: a run, or runs that differ in their seeds."""

    kind: Literal["run", "seeds"]
    method: str
    variant: str
    recipe: str
    source: str
    seeds: tuple[int, ...]
    runs: tuple[str, ...]  # folders
    values: Mapping[str, Value | None]  # by target, in the order of the matrix's targets
    mean: Value | None  # over targets that were not trained on; None unless each is there in full
    settings: Mapping[str, Any] = field(default_factory=dict)  # that tell it from others of its method, recipe and source
    source_rendered: bool = False  # trained on an export of rendered scenes
    partial_source: bool = False  # trained on other images than its source's, a part as a rule


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows and columns of scores that were measured alike."""

    protocol: str
    protocol_digest: str
    rendered: bool  # the targets are exports of rendered scenes, not the published sets
    targets: tuple[str, ...]
    hashes: Mapping[str, str]  # of protocol and domain, by target
    rows: tuple[MatrixRow, ...]


@dataclass(slots=True)
class _Model:
    """The newest record of each target of one checkpoint."""

    records: dict[str, Record]
    settings: settings.Settings | None = None

    @property
    def first(self) -> Record:
        return next(iter(self.records.values()))

    @property
    def age(self) -> tuple[str, str]:
        return max((record.created, record.id) for record in self.records.values())

    def alike(self) -> tuple[object, ...]:
        """What models that differ in their seeds share."""
        record = self.first
        part = (record.source_images, record.source_available) if record.source_complete is False else ()
        known = record.method, record.variant, record.recipe, record.source, record.source_rendered, part
        if self.settings is None:
            return (*known, record.recipe_hash)
        return (*known, *((key, settings.value_text(value)) for key, value in self.settings.items() if key not in _FREE))


def matrices(
    records: Iterable[Record], *, targets: Sequence[str] | None = None, source: str | None = None, each: bool = False
) -> list[Matrix]:
    """Arrange records into matrices.

    Args:
        records: of any kind and order; evaluations of validation splits count, the newest of each checkpoint.
        targets: the columns; by default all that were scored.
        source: only models trained on this.
        each: a row for every run, and below those of several seeds one of their mean; else of one seed the newest run counts.
    """
    parts: dict[tuple[str, str, bool], list[_Model]] = {}
    for key, model in _models(record for record in records if source in (None, record.source)):
        parts.setdefault(key, []).append(model)
    found = []
    for (protocol, digest, rendered), models in parts.items():
        for cluster in _agreeing(models):
            scored = {target for model in cluster for target in model.records}
            columns = tuple(dict.fromkeys(targets)) if targets is not None else tuple(sorted(scored, key=_order()))
            if rows := _rows([model for model in cluster if model.records.keys() & set(columns)], columns, each=each):
                hashes = {t: r.protocol_hash for model in cluster for t, r in model.records.items()}
                used = {column: hashes[column] for column in columns if column in hashes}
                found.append(Matrix(protocol, digest, rendered, columns, used, tuple(rows)))
    return found


def _models(records: Iterable[Record]) -> list[tuple[tuple[str, str, bool], _Model]]:
    """The models of each protocol and kind of target, newest first."""
    by_model: dict[tuple[object, ...], dict[bool, dict[str, Record]]] = {}
    counted = [record for record in records if record.kind == "eval" and record.split == "val"]
    for record in sorted(counted, key=lambda record: (record.created, record.id), reverse=True):
        trained = record.method, record.variant, record.recipe_hash, record.source, record.source_rendered, record.checkpoint
        kinds = by_model.setdefault((record.protocol, record.protocol_digest, *trained), {})
        # what was trained on is no target: it stands beside either kind
        for rendered in (record.rendered, not record.rendered) if _seen(record) else (record.rendered,):
            kinds.setdefault(rendered, {}).setdefault(record.target, record)
    found = []
    for kinds in by_model.values():
        unseen = {rendered for rendered, scored in kinds.items() if not all(map(_seen, scored.values()))}
        for rendered in unseen or {next(iter(kinds))}:
            model = _Model(kinds[rendered])
            model.settings = settings.of_run(model.first.run)
            found.append(((model.first.protocol, model.first.protocol_digest, rendered), model))
    return sorted(found, key=lambda item: item[1].age, reverse=True)


def _agreeing(models: Sequence[_Model]) -> list[list[_Model]]:
    """Split models into sets whose protocol hashes agree wherever two share a target."""
    found: list[tuple[dict[str, str], list[_Model]]] = []
    for model in models:
        mine = {target: record.protocol_hash for target, record in model.records.items()}
        fitting = (one for one in found if all(one[0].get(target, value) == value for target, value in mine.items()))
        hashes, members = next(fitting, ({}, []))
        if not members:
            found.append((hashes, members))
        hashes.update(mine)
        members.append(model)
    return [members for _, members in found]


def _rows(models: Sequence[_Model], columns: Sequence[str], *, each: bool) -> list[MatrixRow]:
    groups: dict[tuple[object, ...], list[_Model]] = {}
    for model in models:
        groups.setdefault(model.alike(), []).append(model)
    telling = _telling(groups)
    rows: list[MatrixRow] = []
    for key in sorted(groups, key=lambda key: tuple(map(str, (key[3], key[0], key[1], key[2])))):
        runs = [replace(_row([model], columns), settings=telling[key]) for model in _by_seed(groups[key], every=True)]
        newest = _by_seed(groups[key], every=False)
        if each:
            rows += runs
        if not each or len(newest) > 1:
            rows.append(replace(_row(newest, columns), settings=telling[key]))
    return rows


def _by_seed(models: Sequence[_Model], *, every: bool) -> list[_Model]:
    """Models in the order of their seeds; of those of one seed every one, the oldest first, or the newest alone."""
    ordered = sorted(models, key=lambda model: (model.first.seed, model.age))
    return ordered if every else list({model.first.seed: model for model in ordered}.values())


def _telling(groups: Mapping[tuple[object, ...], Sequence[_Model]]) -> dict[tuple[object, ...], Mapping[str, Any]]:
    """The settings by which rows of one method, variant, recipe and source differ."""
    alike: dict[tuple[object, ...], list[tuple[object, ...]]] = {}
    for key in groups:
        alike.setdefault(key[:4], []).append(key)
    told: dict[tuple[object, ...], Mapping[str, Any]] = {key: {} for key in groups}
    for keys in alike.values():
        known = [(key, read) for key in keys if (read := groups[key][0].settings) is not None]
        fixed = [{name: value for name, value in read.items() if name not in _FREE} for _, read in known]
        told |= {key: found for (key, _), found in zip(known, settings.telling(fixed), strict=True)}
    return told


def _row(models: Sequence[_Model], columns: Sequence[str]) -> MatrixRow:
    first = models[0].first
    values = {column: _value([model.records.get(column) for model in models]) for column in columns}
    means = [mean for model in models if (mean := _mean(model, columns)) is not None]
    return MatrixRow(
        "run" if len(models) == 1 else "seeds",
        first.method,
        first.variant,
        first.recipe,
        first.source,
        tuple(model.first.seed for model in models),
        tuple(str(model.first.run or "") for model in models),
        values,
        _over_seeds(means) if len(means) == len(models) else None,
        source_rendered=first.source_rendered,
        partial_source=first.source_complete is False,
    )


def _value(records: Sequence[Record | None]) -> Value | None:
    """Scores on one domain, one of each seed; of parts of the split those of as many images, only where none is in full."""
    scored = [record for record in records if record is not None and record.miou is not None]
    if not scored:
        return None
    full = [record for record in scored if record.complete]
    part = [record for record in scored if (record.n_images, record.n_extra) == (scored[-1].n_images, scored[-1].n_extra)]
    value = _over_seeds([record.miou for record in full or part if record.miou is not None])
    return replace(value, partial=not full, seen=_seen(scored[0]))


def _seen(record: Record) -> bool:
    return record.target in record.source.split("+")


def _mean(model: _Model, columns: Sequence[str]) -> float | None:
    unseen = [column for column in columns if column not in model.first.source.split("+")]
    records = [model.records.get(column) for column in unseen]
    full = [record.miou for record in records if record is not None and record.complete and record.miou is not None]
    return math.fsum(full) / len(full) if full and len(full) == len(unseen) else None


def _over_seeds(values: Sequence[float]) -> Value:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Value(statistics.fmean(values), deviation, len(values))


def _order() -> Callable[[str], tuple[int, str]]:
    """Columns follow the table of domains, a severity its domain."""
    known = {name: place for place, name in enumerate(names())}
    return lambda column: (known.get(column.partition("@")[0], len(known)), column)
