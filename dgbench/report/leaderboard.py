"""The leaderboard: own records, reference results of recipes, and published numbers, each kept apart.

Rows are ranked only inside one group: one source, one protocol by name and digest, one set of targets with equal protocol
hashes.
Reference rows stand in for recipes that have not been run here; published rows were measured under protocols that
differ from paper to paper, so they get groups of their own and no rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from dgbench import protocol as protocols
from dgbench.data.domains import RENDER_SIZE, lookup, names
from dgbench.results import Record

if TYPE_CHECKING:
    from dgbench.recipe import Recipe

PUBLISHED = Path(__file__).parents[1] / "published.yaml"


@dataclass(frozen=True, slots=True)
class Score:
    """One mIoU in 0..1 with its 95 % interval."""

    miou: float
    low: float | None = None
    high: float | None = None
    n_images: int | None = None
    partial: bool = False  # only some images of the split: shown, never ranked or averaged

    @property
    def half(self) -> float | None:
        """Half the interval's width."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


@dataclass(frozen=True, slots=True)
class Row:
    """One model: a checkpoint of ours, a recipe's reference result, or a line of a paper's table."""

    kind: Literal["run", "reference", "published"]
    method: str
    variant: str
    recipe: str
    recipe_hash: str
    origin: str  # run folder, where the reference comes from, or paper and table
    created: str
    source_score: Score | None  # on the source's own validation split
    scores: tuple[Score | None, ...]  # in the order of the group's targets
    mean: Score | None = None  # over all targets, only if each is there in full
    rank: int | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that may be compared with each other."""

    source: str
    targets: tuple[str, ...]
    protocol: str
    protocol_hashes: tuple[str, ...]
    rows: tuple[Row, ...]
    other_targets: tuple[str, ...] = ()  # scored by some row, but not a column
    protocol_digest: str = ""  # of the protocol alone; "" for published rows and records from before it was kept


@dataclass(frozen=True, slots=True)
class Leaderboard:
    """Own and reference rows by group, and the published tables."""

    groups: tuple[Group, ...]
    published: tuple[Group, ...]


@dataclass(frozen=True, slots=True)
class Reference:
    """The expected results of one recipe."""

    recipe: str
    method: str
    variant: str
    source: str
    protocol: str
    miou: Mapping[str, float]  # target -> 0..1; the source stands for its validation split
    origin: str
    hashes: Mapping[str, str] = field(default_factory=dict)  # column -> protocol hash that the recipe scores under
    protocol_digest: str = ""

    @property
    def measured(self) -> _Measured:
        """What it can be ranked with."""
        return self.source, self.protocol, self.protocol_digest


@dataclass(slots=True)
class _Model:
    """The newest record per split of one checkpoint."""

    records: dict[str, Record]  # by column

    @property
    def newest(self) -> Record:
        return max(self.records.values(), key=_age)

    @property
    def hashes(self) -> dict[str, str]:
        return {column: record.protocol_hash for column, record in self.records.items()}

    def full_targets(self) -> frozenset[str]:
        return frozenset(c for c, r in self.records.items() if c != _SOURCE and r.complete and r.miou is not None)


_SOURCE = ""  # the column of the source's validation split
_Measured = tuple[str, str, str]  # source, protocol, the protocol's digest: what all rows of a group share


def leaderboard(
    records: Iterable[Record],
    references: Sequence[Reference] = (),
    *,
    targets: Sequence[str] | None = None,
    source: str | None = None,
    every: bool = False,
    published: bool = True,
) -> Leaderboard:
    """Arrange records into ranked groups.

    Args:
        records: of any kind and order; only evaluations count.
        references: shown where the recipe has no row of its own.
        targets: the columns; by default, per group, the set that most models were scored on in full.
        source: only models trained on this domain; by default all.
        every: keep models that a newer run of the same recipe replaces.
    """
    records = [r for r in records if source in (None, r.source)]
    references = [r for r in references if source in (None, r.source)]
    parts: dict[_Measured, list[_Model]] = {}
    for key, model in _models(records).items():
        parts.setdefault((key[0], key[1], key[2]), []).append(model)
    groups, shown = [], []
    for measured, models in parts.items():
        for cluster in _compatible(models):
            hashes = {column: value for model in cluster for column, value in model.hashes.items()}
            mine = [r for r in references if _belongs(r, measured, hashes)]
            groups.append(_group(measured, cluster, mine, targets, every=every))
            shown.append((measured, hashes))
    lonely = [r for r in references if not any(_belongs(r, *group) for group in shown)]
    while lonely:
        first = lonely[0]
        together = [r for r in lonely if _belongs(r, first.measured, first.hashes)]
        groups.append(_group(first.measured, [], together, targets, every=every))
        lonely = [r for r in lonely if r not in together]
    tables = [table for table in load_published() if source in (None, table.source)] if published else []
    return Leaderboard(tuple(groups), tuple(tables))


def of_run(board: Leaderboard, run: Path) -> Leaderboard:
    """Return only the groups in which this run has a row."""
    return replace(board, groups=tuple(g for g in board.groups if any(row.origin == str(run) for row in g.rows)))


def references() -> list[Reference]:
    """Return the expected results of all shipped recipes that state some."""
    from dgbench.recipe import load_recipe, recipe_names

    found = []
    for name in recipe_names():
        recipe = load_recipe(name, check_method=False)
        for origin in dict.fromkeys(row.origin for row in recipe.expect):
            miou = {row.target: row.miou for row in recipe.expect if row.origin == origin}
            method, source, rules = recipe.method, recipe.data.source, protocols.lookup(recipe.eval.protocol)
            hashes = {_SOURCE if target == source else target: _expected_hash(recipe, target) for target in miou}
            found.append(Reference(name, method.name, method.variant, source, rules.name, miou, origin, hashes, rules.digest))
    return found


def _expected_hash(recipe: Recipe, target: str) -> str:
    rules, domain = protocols.lookup(recipe.eval.protocol), lookup(target)
    size = recipe.data.size or (RENDER_SIZE if domain.procedural else None)
    return protocols.protocol_hash(rules, protocols.domain_row(domain, "val", protocols.label_map(rules, domain), size))


def load_published(path: Path = PUBLISHED) -> tuple[Group, ...]:
    """Return the published tables, one group per paper, table and source."""
    return tuple(_published_group(table) for table in yaml.safe_load(path.read_text(encoding="utf-8")))


def _published_group(table: Mapping[str, Any]) -> Group:
    cite = f"{table['paper']}, {table['table']} (read {table['read']})"
    rows = []
    for row in table["rows"]:
        scores = tuple(Score(percent / 100) for percent in row["miou"])
        printed = row["mean"] / 100 if "mean" in row else math.fsum(score.miou for score in scores) / len(scores)
        rows.append(Row("published", row["method"], row["backbone"], row.get("recipe", ""), "", cite, str(table["read"]), None,
                        scores, Score(printed), note=row.get("note", "")))  # fmt: skip
    rows.sort(key=lambda row: -(row.mean.miou if row.mean else 0))
    return Group(table["source"], tuple(table["targets"]), table["protocol"], (), tuple(rows))


def _age(record: Record) -> tuple[str, str]:
    return record.created, record.id


def _column(record: Record) -> str:
    if record.target == record.source and record.split == "val":
        return _SOURCE
    return record.target if record.split == "val" else f"{record.target} ({record.split})"


def _models(records: Iterable[Record]) -> dict[tuple[str, ...], _Model]:
    """Collect the newest record per column of every checkpoint, newest first."""
    models: dict[tuple[str, ...], _Model] = {}
    for record in sorted((r for r in records if r.kind == "eval"), key=_age, reverse=True):
        measured = (record.source, record.protocol, record.protocol_digest)
        key = (*measured, record.method, record.variant, record.recipe_hash, record.checkpoint)
        models.setdefault(key, _Model({})).records.setdefault(_column(record), record)
    return models


def _belongs(reference: Reference, measured: _Measured, hashes: Mapping[str, str]) -> bool:
    """Whether a reference was scored as the models of a group were."""
    shared = hashes.keys() & reference.hashes.keys()
    same = all(hashes[column] == reference.hashes[column] for column in shared)
    return reference.measured == measured and same


def _compatible(models: Sequence[_Model]) -> list[list[_Model]]:
    """Split models, newest first, into clusters whose protocol hashes agree wherever two share a column."""
    clusters: list[tuple[dict[str, str], list[_Model]]] = []
    for model in models:
        for hashes, members in clusters:
            shared = hashes.keys() & model.hashes.keys()
            if shared and all(hashes[column] == model.hashes[column] for column in shared):
                hashes.update(model.hashes)
                members.append(model)
                break
        else:
            clusters.append((dict(model.hashes), [model]))
    return [members for _, members in clusters]


def _group(
    measured: _Measured,
    models: Sequence[_Model],
    references: Sequence[Reference],
    targets: Sequence[str] | None,
    *,
    every: bool,
) -> Group:
    columns = tuple(targets) if targets is not None else _usual_targets(models, references)
    kept = list(models) if every else _not_replaced(models)
    rows = [_run_row(model, columns) for model in kept]
    own = {row.recipe for row in rows}
    rows += [_reference_row(reference, columns) for reference in references if reference.recipe not in own]
    hashes = {column: value for model in models for column, value in model.hashes.items()}
    others = sorted({c for model in kept for c in model.records} - {*columns, _SOURCE})
    used = tuple(hashes[column] for column in (*columns, _SOURCE) if column in hashes)
    source, protocol, digest = measured
    return Group(source, columns, protocol, used, tuple(_ranked(rows)), tuple(others), digest)


def _usual_targets(models: Sequence[_Model], references: Sequence[Reference]) -> tuple[str, ...]:
    """Return the set of targets that fills the most cells with models scored on all of it."""
    scored = [model.full_targets() for model in models if model.full_targets()]
    scored = scored or [frozenset(r.miou) - {r.source} for r in references]
    if not scored:
        scored = [frozenset(c for model in models for c in model.records if c != _SOURCE)]
    best = max(scored, key=lambda chosen: (len(chosen) * sum(chosen <= other for other in scored), len(chosen)))
    return tuple(sorted(best, key=_table_order))


def _table_order(column: str) -> tuple[int, str]:
    """Columns follow the table of domains, a severity its domain, whatever order they were scored in."""
    base = column.partition("@")[0]
    known = names()
    return (known.index(base) if base in known else len(known)), column


def _not_replaced(models: Sequence[_Model]) -> list[_Model]:
    """Drop a model if a newer one of the same recipe was scored on all that it was."""
    kept: list[_Model] = []
    for model in models:
        mine = model.newest
        newer = [m for m in kept if (m.newest.method, m.newest.variant, m.newest.recipe_hash)
                 == (mine.method, mine.variant, mine.recipe_hash)]  # fmt: skip
        if not any(model.records.keys() <= other.records.keys() for other in newer):
            kept.append(model)
    return kept


def _score(record: Record | None) -> Score | None:
    if record is None or record.miou is None:
        return None
    return Score(record.miou, *record.interval, n_images=record.n_images, partial=not record.complete)


def _run_row(model: _Model, columns: Sequence[str]) -> Row:
    newest = model.newest
    scores = tuple(_score(model.records.get(column)) for column in columns)
    row = Row("run", newest.method, newest.variant, newest.recipe, newest.recipe_hash, str(newest.run or ""),
              newest.created, _score(model.records.get(_SOURCE)), scores)  # fmt: skip
    return replace(row, mean=_mean(scores))


def _reference_row(reference: Reference, columns: Sequence[str]) -> Row:
    def score(target: str) -> Score | None:
        return Score(reference.miou[target]) if target in reference.miou else None

    scores = tuple(score(column) for column in columns)
    return Row("reference", reference.method, reference.variant, reference.recipe, "", reference.origin, "",
               score(reference.source), scores, _mean(scores))  # fmt: skip


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

    def order(row: Row) -> tuple[bool, bool, float, str]:
        return row.kind != "run", row.mean is None, -round(row.mean.miou, 4) if row.mean else 0.0, row.method

    ordered = sorted(rows, key=order)
    means = [round(row.mean.miou, 4) for row in ordered if row.kind == "run" and row.mean]
    return [
        replace(row, rank=means.index(round(row.mean.miou, 4)) + 1) if row.kind == "run" and row.mean else row for row in ordered
    ]
