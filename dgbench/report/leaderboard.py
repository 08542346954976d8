"""The leaderboard: own records, reference results of recipes, and published numbers, kept separate.

Rows are ranked only inside one group: one source, one protocol by name and digest, one set of targets with equal protocol
hashes, all of them published sets or all exports of rendered scenes. Runs that differ in the seed alone are one row.
Reference rows stand in for recipes that have not been run here; published rows were measured under protocols that
differ from paper to paper, so they get groups of their own and no rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dgbench.data.catalog import names
from dgbench.errors import ResultError, spelled, unknown
from dgbench.protocol import PROTOCOLS
from dgbench.report import seeds
from dgbench.report.columns import Order, tables
from dgbench.report.entries import PLAIN, Detail, of_models, of_reference
from dgbench.report.expected import SOURCE, Measured, Reference, mismatch, weights_of
from dgbench.report.models import Model, compatible, models, not_replaced
from dgbench.report.modes import difference
from dgbench.report.published import load_published
from dgbench.report.ranks import Entry, ranked
from dgbench.report.rows import Group, Leaderboard
from dgbench.results import Record


def leaderboard(
    records: Iterable[Record],
    references: Sequence[Reference] = (),
    *,
    targets: Sequence[str] | None = None,
    source: str | None = None,
    every: bool = False,
    published: bool = True,
    beside: bool = False,
    protocol: str | None = None,
    tested: bool = True,
    detail: Detail = PLAIN,
) -> Leaderboard:
    """Arrange records into ranked groups.

    Args:
        records: of any kind and order; only evaluations are rows.
        references: shown where the recipe has no row of its own.
        targets: the columns of every group; by default those that the runs' recipes name, and further groups for
            other targets.
        source: only models trained on this domain; by default all.
        every: a row for each run: no seeds put together, and models kept that a newer run of the same recipe replaces.
        beside: show references beside rows of the same recipe, too, except those of other tower weights.
        protocol: only scores under the protocol of this name; by default all.
        tested: compare rows by their matrices, so that only significant differences make ranks.
        detail: scores by class and by condition.

    Raises: ResultError if nothing was scored under the protocol, and there is none of this name.
    """
    records = [r for r in records if source in (None, r.source)]
    references = [r for r in references if source in (None, r.source)]
    if protocol is not None:
        protocol = _protocol(protocol, records)
        records = [r for r in records if r.protocol == protocol or r.kind == "train"]
        references = [r for r in references if r.protocol == protocol]
    columns = tuple(dict.fromkeys(targets)) if targets is not None else None
    parts: dict[Measured, list[Model]] = {}
    for measured, model in models(records):
        parts.setdefault(measured, []).append(model)
    weights = {r.checkpoint: weights_of([r]) for r in records if r.kind == "train"} if beside else None
    options = _Options(columns, _table_order(), every, weights, tested, detail)
    groups: list[Group] = []
    shown: set[int] = set()
    for measured, alike in parts.items():
        for cluster in compatible(alike):
            hashes = {column: value for model in cluster for column, value in model.hashes.items()}
            mine = [i for i, r in enumerate(references) if _belongs(r, measured, hashes)]
            shown.update(mine)
            groups += _groups(measured, cluster, [references[i] for i in mine], options)
    lonely = [r for i, r in enumerate(references) if i not in shown]
    while lonely:
        first = lonely[0]
        together = [r for r in lonely if _belongs(r, first.measured, first.hashes)]
        groups += _groups(first.measured, [], together, replace(options, weights=None))
        lonely = [r for r in lonely if r not in together]
    sets = [table for table in load_published() if source in (None, table.source)] if published and protocol is None else []
    return Leaderboard(tuple(groups), tuple(sets))


def of_run(board: Leaderboard, run: Path) -> Leaderboard:
    """Return only the groups in which this run has a row."""
    return replace(board, groups=tuple(g for g in board.groups if any(str(run) in (row.origin, *row.runs) for row in g.rows)))


@dataclass(frozen=True, slots=True)
class _Options:
    """What holds for all groups of one leaderboard."""

    targets: tuple[str, ...] | None
    order: Order
    every: bool
    weights: Mapping[str, Mapping[str, str]] | None
    tested: bool
    detail: Detail


def _protocol(name: str, records: Iterable[Record]) -> str:
    """Return the protocol of this name, in capitals or not: a preset, or one that something was scored under."""
    known = dict.fromkeys([*PROTOCOLS, *(r.protocol for r in records if r.protocol)])
    if (found := spelled(name, known)) is None:
        raise ResultError(*unknown("protocol", name, known))
    return found


def _belongs(reference: Reference, measured: Measured, hashes: Mapping[str, str]) -> bool:
    """Return whether a reference was scored as the models of a group were."""
    shared = hashes.keys() & reference.hashes.keys()
    same = all(hashes[column] == reference.hashes[column] for column in shared)
    return reference.measured == measured and same


def _groups(measured: Measured, models: Sequence[Model], references: Sequence[Reference], options: _Options) -> list[Group]:
    seeds.tell_apart(models, every=options.every)
    if options.targets is not None:
        chosen = [(options.targets, list(range(len(models))))]
    elif models:
        chosen = tables([model.scored for model in models], options.order)
    else:
        sets = [frozenset(r.miou) - {r.source} for r in references]
        most = max(sets, key=lambda own: (len(own) * sum(own <= other for other in sets), len(own)))
        chosen = [(tuple(sorted(most, key=options.order)), [])]
    groups = []
    for number, (columns, members) in enumerate(chosen):
        # a reference with fewer targets is only in the first table
        fitting = [r for r in references if set(columns) <= r.miou.keys() or (number == 0 and set(columns) & r.miou.keys())]
        groups.append(_group(measured, [models[i] for i in members], fitting, columns, options))
    return groups


def _group(
    measured: Measured,
    models: Sequence[Model],
    references: Sequence[Reference],
    columns: tuple[str, ...],
    options: _Options,
) -> Group:
    kept = list(models) if options.every else not_replaced(models, {*columns, SOURCE})
    together = [[model] for model in kept] if options.every else seeds.of_one_row(kept, set(columns))
    entries = [_noted(of_models(members, columns, options.detail), models) for members in together]
    for reference in references:
        own = [model for model in kept if model.newest.recipe == reference.recipe]
        # unknown weights, as of runs without a training record, do not speak for it either
        weights = options.weights
        others = weights is not None and any(mismatch(reference.weights, weights.get(m.newest.checkpoint, {})) for m in own)
        if not own or (weights is not None and not others):
            entries.append(of_reference(reference, columns))
    hashes = {column: value for model in models for column, value in model.hashes.items()}
    all_shown = options.targets is None
    others_ = [] if all_shown else sorted({c for model in kept for c in model.records} - {*columns, SOURCE})
    used = tuple(hashes[column] for column in (*columns, SOURCE) if column in hashes)
    return Group(
        measured.source,
        columns,
        measured.protocol,
        used,
        tuple(ranked(entries, tested=options.tested)),
        tuple(others_),
        measured.digest,
        measured.rendered,
        measured.source_rendered,
    )


def _noted(entry: Entry, models: Sequence[Model]) -> Entry:
    """Return an entry whose row says how far its mode is from the exact one."""
    return replace(entry, row=replace(entry.row, note=difference(entry.models, models)))


def _table_order() -> Order:
    """Order columns as in the table of domains, a severity after its domain, independently of when they were scored."""
    known = {name: place for place, name in enumerate(names())}
    return lambda column: (known.get(column.partition("@")[0], len(known)), column)
