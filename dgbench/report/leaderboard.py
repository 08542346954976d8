"""The leaderboard: own records, reference results of recipes, and published numbers, kept separate.

Rows are ranked only inside one group: one source, one protocol by name and digest, one set of targets with equal protocol
hashes, all of them published sets or all exports of rendered scenes.
Reference rows are shown for recipes that have not been run here; published rows were measured under protocols that
differ from paper to paper, so they get groups of their own and no rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dgbench.data.catalog import names
from dgbench.report import settings
from dgbench.report.columns import Order, Scored, tables
from dgbench.report.expected import SOURCE, Measured, Reference, mismatch, weights_of
from dgbench.report.published import load_published
from dgbench.report.rows import Group, Leaderboard, Row, Score
from dgbench.results import Record


@dataclass(slots=True)
class _Model:
    """The newest record per split of one checkpoint."""

    records: dict[str, Record]  # by column
    newest: Record = field(init=False)
    scored: Scored = field(init=False)
    settings: settings.Settings | None = None
    telling: Mapping[str, object] = field(default_factory=dict)  # settings that differ from others of its method and recipe

    def __post_init__(self) -> None:
        self.newest = max(self.records.values(), key=_age)
        full = frozenset(c for c, r in self.records.items() if c != SOURCE and _whole(r) and r.miou is not None)
        self.scored = Scored(None, full, frozenset(self.records) - {SOURCE})

    @property
    def hashes(self) -> dict[str, str]:
        return {column: record.protocol_hash for column, record in self.records.items()}

    @property
    def recipe(self) -> tuple[str, str, str]:
        return self.newest.method, self.newest.variant, self.newest.recipe_hash

    def source_images(self) -> tuple[int, int]:
        """Return the number of training images and that of its source; (0, 0) if these are equal, or unknown."""
        record = next((r for r in self.records.values() if r.source_complete is False), None)
        return (0, 0) if record is None else (record.source_images, record.source_available)


def leaderboard(
    records: Iterable[Record],
    references: Sequence[Reference] = (),
    *,
    targets: Sequence[str] | None = None,
    source: str | None = None,
    every: bool = False,
    published: bool = True,
    beside: bool = False,
) -> Leaderboard:
    """Arrange records into ranked groups.

    Args:
        records: of any kind and order; only evaluations are rows.
        references: shown where the recipe has no row of its own.
        targets: the columns of every group; by default those that the runs' recipes name, and further groups for
            other targets.
        source: only models trained on this domain; by default all.
        every: keep models that a newer run of the same recipe replaces.
        beside: show references beside rows of the same recipe, too, except those of other tower weights.
    """
    records = [r for r in records if source in (None, r.source)]
    references = [r for r in references if source in (None, r.source)]
    columns = tuple(dict.fromkeys(targets)) if targets is not None else None
    parts: dict[Measured, list[_Model]] = {}
    for measured, model in _models(records):
        parts.setdefault(measured, []).append(model)
    _read_settings([model for models in parts.values() for model in models])
    weights = {r.checkpoint: weights_of([r]) for r in records if r.kind == "train"} if beside else None
    order = _table_order()
    groups: list[Group] = []
    shown: set[int] = set()
    for measured, models in parts.items():
        for cluster in _compatible(models):
            hashes = {column: value for model in cluster for column, value in model.hashes.items()}
            mine = [i for i, r in enumerate(references) if _belongs(r, measured, hashes)]
            shown.update(mine)
            groups += _groups(measured, cluster, [references[i] for i in mine], columns, order, every=every, weights=weights)
    lonely = [r for i, r in enumerate(references) if i not in shown]
    while lonely:
        first = lonely[0]
        together = [r for r in lonely if _belongs(r, first.measured, first.hashes)]
        groups += _groups(first.measured, [], together, columns, order, every=every, weights=None)
        lonely = [r for r in lonely if r not in together]
    sets = [table for table in load_published() if source in (None, table.source)] if published else []
    return Leaderboard(tuple(groups), tuple(sets))


def of_run(board: Leaderboard, run: Path) -> Leaderboard:
    """Return only the groups in which this run has a row."""
    return replace(board, groups=tuple(g for g in board.groups if any(row.origin == str(run) for row in g.rows)))


def _age(record: Record) -> tuple[str, str]:
    return record.created, record.id


def _whole(record: Record) -> bool:
    """Return whether exactly the images of the published split were scored."""
    return record.complete and not record.n_extra


def _column(record: Record) -> str:
    if record.target == record.source and record.split == "val":
        return SOURCE
    return record.target if record.split == "val" else f"{record.target} ({record.split})"


def _models(records: Iterable[Record]) -> list[tuple[Measured, _Model]]:
    """Collect the newest record per column of every checkpoint, newest first, exports apart from published sets."""
    targets: dict[tuple[str, ...], dict[bool, dict[str, Record]]] = {}
    # with several sources, their validation splits are not targets and do not fit into one column
    shown = (r for r in records if r.kind == "eval" and (r.target == r.source or r.target not in r.source.split("+")))
    for record in sorted(shown, key=_age, reverse=True):
        trained = (record.source, record.protocol, record.protocol_digest, "rendered" if record.source_rendered else "")
        sets = targets.setdefault((*trained, record.method, record.variant, record.recipe_hash, record.checkpoint), {})
        column = _column(record)
        # the source's own validation split is no target: it is shown with both kinds
        for rendered in (True, False) if column == SOURCE else (record.rendered,):
            sets.setdefault(rendered, {}).setdefault(column, record)
    found = []
    for (source, protocol, digest, source_rendered, *_), sets in targets.items():
        for rendered, columns in sets.items():
            other = sets.get(not rendered, {})
            if columns.keys() != {SOURCE} or (other.keys() == {SOURCE} and not rendered):
                measured = Measured(source, protocol, digest, bool(source_rendered), rendered)
                found.append((measured, _Model(columns)))
    return sorted(found, key=lambda item: _age(item[1].newest), reverse=True)


def _read_settings(models: Iterable[_Model]) -> None:
    """Give each model the settings of its run; runs of one recipe hash have the same, and one file is read for them."""
    known: dict[str, settings.Settings] = {}
    for model in models:
        sha = model.newest.recipe_hash
        if sha not in known and (read := settings.of_run(model.newest.run)) is not None:
            known[sha] = read
        model.settings = known.get(sha)
        model.scored = replace(model.scored, named=settings.targets(model.settings))


def _belongs(reference: Reference, measured: Measured, hashes: Mapping[str, str]) -> bool:
    """Return whether a reference was scored as the models of a group were."""
    shared = hashes.keys() & reference.hashes.keys()
    same = all(hashes[column] == reference.hashes[column] for column in shared)
    return reference.measured == measured and same


def _compatible(models: Sequence[_Model]) -> list[list[_Model]]:
    """Split models, newest first, into clusters whose protocol hashes agree wherever two share a column."""
    clusters: list[tuple[dict[str, str], list[_Model]]] = []
    having: dict[tuple[str, str], set[int]] = {}  # (column, hash) -> clusters that a model can join
    for model in models:
        hashes = model.hashes
        near = sorted(set().union(*(having.get(pair, ()) for pair in hashes.items())))
        fitting = (i for i in near if all(clusters[i][0].get(column, value) == value for column, value in hashes.items()))
        chosen = next(fitting, len(clusters))
        if chosen == len(clusters):
            clusters.append(({}, []))
        clusters[chosen][0].update(hashes)
        clusters[chosen][1].append(model)
        for pair in hashes.items():
            having.setdefault(pair, set()).add(chosen)
    return [members for _, members in clusters]


def _groups(
    measured: Measured,
    models: Sequence[_Model],
    references: Sequence[Reference],
    targets: tuple[str, ...] | None,
    order: Order,
    *,
    every: bool,
    weights: Mapping[str, Mapping[str, str]] | None,
) -> list[Group]:
    _tell_apart(models)
    if targets is not None:
        chosen = [(targets, list(range(len(models))))]
    elif models:
        chosen = tables([model.scored for model in models], order)
    else:
        sets = [frozenset(r.miou) - {r.source} for r in references]
        most = max(sets, key=lambda own: (len(own) * sum(own <= other for other in sets), len(own)))
        chosen = [(tuple(sorted(most, key=order)), [])]
    groups = []
    for number, (columns, members) in enumerate(chosen):
        # a reference with fewer targets is only in the first table
        fitting = [r for r in references if set(columns) <= r.miou.keys() or (number == 0 and set(columns) & r.miou.keys())]
        rows = [models[i] for i in members]
        groups.append(_group(measured, rows, fitting, columns, every=every, weights=weights, all_shown=targets is None))
    return groups


def _group(
    measured: Measured,
    models: Sequence[_Model],
    references: Sequence[Reference],
    columns: tuple[str, ...],
    *,
    every: bool,
    weights: Mapping[str, Mapping[str, str]] | None,
    all_shown: bool,
) -> Group:
    kept = list(models) if every else _not_replaced(models, {*columns, SOURCE})
    rows = [_run_row(model, columns) for model in kept]
    for reference in references:
        own = [model for model in kept if model.newest.recipe == reference.recipe]
        # runs with unknown weights (without a training record) are not compared with it either
        others = weights is not None and any(mismatch(reference.weights, weights.get(m.newest.checkpoint, {})) for m in own)
        if not own or (weights is not None and not others):
            rows.append(_reference_row(reference, columns))
    hashes = {column: value for model in models for column, value in model.hashes.items()}
    others_ = [] if all_shown else sorted({c for model in kept for c in model.records} - {*columns, SOURCE})
    used = tuple(hashes[column] for column in (*columns, SOURCE) if column in hashes)
    return Group(
        measured.source,
        columns,
        measured.protocol,
        used,
        tuple(_ranked(rows)),
        tuple(others_),
        measured.digest,
        measured.rendered,
        measured.source_rendered,
    )


def _table_order() -> Order:
    """Order columns as in the table of domains, a severity after its domain, independently of when they were scored."""
    known = {name: place for place, name in enumerate(names())}
    return lambda column: (known.get(column.partition("@")[0], len(known)), column)


def _not_replaced(models: Sequence[_Model], columns: set[str]) -> list[_Model]:
    """Drop a model if a newer one of the same recipe was scored on the same of these columns, at least as completely."""
    kept: list[_Model] = []
    newer: dict[tuple[object, ...], list[tuple[frozenset[str], frozenset[str]]]] = {}
    for model in models:
        mine = frozenset(model.records) & columns, model.scored.full & columns
        others = newer.setdefault((*model.recipe, model.source_images()), [])
        if not any(mine[0] <= some and mine[1] <= full for some, full in others):
            kept.append(model)
            others.append(mine)
    return kept


def _tell_apart(models: Sequence[_Model]) -> None:
    """Give each model the settings that differ from others of its method and recipe: the same in all tables."""
    alike: dict[tuple[str, str, str], dict[str, settings.Settings]] = {}
    for model in models:
        if model.settings is not None:
            newest = model.newest
            alike.setdefault((newest.method, newest.variant, newest.recipe), {}).setdefault(newest.recipe_hash, model.settings)
    told: dict[tuple[str, str, str, str], dict[str, object]] = {}
    for key, recipes in alike.items():
        told |= {(*key, sha): found for sha, found in zip(recipes, settings.telling(list(recipes.values())), strict=True)}
    for model in models:
        newest = model.newest
        model.telling = told.get((newest.method, newest.variant, newest.recipe, newest.recipe_hash), {})


def _score(record: Record | None) -> Score | None:
    if record is None or record.miou is None:
        return None
    return Score(record.miou, *record.interval, n_images=record.n_images, partial=not _whole(record))


def _run_row(model: _Model, columns: Sequence[str]) -> Row:
    newest = model.newest
    scores = {column: _score(model.records.get(column)) for column in columns}
    images, available = model.source_images()
    return Row(
        "run",
        newest.method,
        newest.variant,
        newest.recipe,
        newest.recipe_hash,
        str(newest.run or ""),
        newest.created,
        _score(model.records.get(SOURCE)),
        scores,
        _mean(list(scores.values())),
        settings=model.telling,
        source_images=images,
        source_available=available,
    )


def _reference_row(reference: Reference, columns: Sequence[str]) -> Row:
    def score(target: str) -> Score | None:
        return Score(reference.miou[target]) if target in reference.miou else None

    scores = {column: score(column) for column in columns}
    return Row(
        "reference",
        reference.method,
        reference.variant,
        reference.recipe,
        "",
        reference.origin,
        "",
        score(reference.source),
        scores,
        _mean(list(scores.values())),
    )


def _mean(scores: Sequence[Score | None]) -> Score | None:
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


def _ranked(rows: Sequence[Row]) -> list[Row]:
    """Sort by mean; own complete rows get ranks, equal ones (to 0.01 points) the same."""

    def ranks(row: Row) -> bool:
        return row.kind == "run" and row.mean is not None and not row.partial_source

    def order(row: Row) -> tuple[bool, bool, bool, float, str]:
        return row.kind != "run", row.partial_source, row.mean is None, -_rounded(row), row.method

    ordered = sorted(rows, key=order)
    places: dict[float, int] = {}
    for place, row in enumerate((row for row in ordered if ranks(row)), 1):
        places.setdefault(_rounded(row), place)
    return [replace(row, rank=places[_rounded(row)]) if ranks(row) else row for row in ordered]


def _rounded(row: Row) -> float:
    return round(row.mean.miou, 4) if row.mean else 0.0
