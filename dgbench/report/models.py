"""The models of a leaderboard: checkpoints with the newest record of each split that they were scored on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dgbench.report import settings
from dgbench.report.columns import Scored
from dgbench.report.expected import SOURCE, Measured, origins_of
from dgbench.results import Record


@dataclass(slots=True)
class Model:
    """The newest record per split of one checkpoint."""

    records: dict[str, Record]  # by column
    newest: Record = field(init=False)
    scored: Scored = field(init=False)
    weights: tuple[str, ...] = ()  # published ones that its training started from: tower, file and sha256
    settings: settings.Settings | None = None
    telling: Mapping[str, object] = field(default_factory=dict)  # settings that tell it from others of its method and recipe
    telling_alone: Mapping[str, object] = field(default_factory=dict)  # likewise, where other seeds of it are not in its row

    def __post_init__(self) -> None:
        self.newest = max(self.records.values(), key=_age)
        full = frozenset(c for c, r in self.records.items() if c != SOURCE and whole(r) and r.miou is not None)
        self.scored = Scored(None, full, frozenset(self.records) - {SOURCE})

    @property
    def hashes(self) -> dict[str, str]:
        return {column: record.protocol_hash for column, record in self.records.items()}

    @property
    def recipe(self) -> tuple[str, str, str]:
        return self.newest.method, self.newest.variant, self.newest.recipe_hash

    def source_images(self) -> tuple[int, int]:
        """How many images it was trained on, and how many its source has; (0, 0) if these are equal, or unknown."""
        record = next((r for r in self.records.values() if r.source_complete is False), None)
        return (0, 0) if record is None else (record.source_images, record.source_available)


def models(records: Iterable[Record]) -> list[tuple[Measured, Model]]:
    """Collect the newest record per column of every checkpoint, newest first, exports apart from published sets."""
    records = list(records)
    weights = {record.checkpoint: origins_of(record) for record in records if record.kind == "train"}
    targets: dict[tuple[str, ...], dict[bool, dict[str, Record]]] = {}
    # of several sources, none's validation split is a target, and one column cannot hold them all
    shown = (r for r in records if r.kind == "eval" and (r.target == r.source or r.target not in r.source.split("+")))
    for record in sorted(shown, key=_age, reverse=True):
        trained = (record.source, record.protocol, record.protocol_digest, "rendered" if record.source_rendered else "")
        sets = targets.setdefault((*trained, record.method, record.variant, record.recipe_hash, record.checkpoint), {})
        column = _column(record)
        # the source's own validation split is no target: it stands beside either kind
        for rendered in (True, False) if column == SOURCE else (record.rendered,):
            sets.setdefault(rendered, {}).setdefault(column, record)
    found = []
    for (source, protocol, digest, source_rendered, *_), sets in targets.items():
        for rendered, columns in sets.items():
            other = sets.get(not rendered, {})
            if columns.keys() != {SOURCE} or (other.keys() == {SOURCE} and not rendered):
                measured = Measured(source, protocol, digest, bool(source_rendered), rendered)
                checkpoint = next(iter(columns.values())).checkpoint
                found.append((measured, Model(columns, weights=weights.get(checkpoint, ()))))
    found.sort(key=lambda item: _age(item[1].newest), reverse=True)
    _read_settings([model for _, model in found])
    return found


def compatible(models: Sequence[Model]) -> list[list[Model]]:
    """Split models, newest first, into clusters whose protocol hashes agree wherever two share a column."""
    clusters: list[tuple[dict[str, str], list[Model]]] = []
    having: dict[tuple[str, str], set[int]] = {}  # (column, hash) -> clusters: only these can take a model in
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


def not_replaced(models: Sequence[Model], columns: set[str]) -> list[Model]:
    """Drop a model if a newer one of the same recipe was scored on all that it was, of these columns and as fully."""
    kept: list[Model] = []
    newer: dict[tuple[object, ...], list[tuple[frozenset[str], frozenset[str]]]] = {}
    for model in models:
        mine = frozenset(model.records) & columns, model.scored.full & columns
        others = newer.setdefault((*model.recipe, model.source_images(), model.weights), [])
        if not any(mine[0] <= some and mine[1] <= full for some, full in others):
            kept.append(model)
            others.append(mine)
    return kept


def whole(record: Record) -> bool:
    """Whether the images that were scored are those of the published split, all and no others."""
    return record.complete and not record.n_extra


def _age(record: Record) -> tuple[str, str]:
    return record.created, record.id


def _column(record: Record) -> str:
    if record.target == record.source and record.split == "val":
        return SOURCE
    return record.target if record.split == "val" else f"{record.target} ({record.split})"


def _read_settings(models: Iterable[Model]) -> None:
    """Give each model the settings of its run; runs of one recipe hash have the same, and one file is read for them."""
    known: dict[str, settings.Settings] = {}
    for model in models:
        sha = model.newest.recipe_hash
        if sha not in known and (read := settings.of_run(model.newest.run)) is not None:
            known[sha] = read
        model.settings = known.get(sha)
        model.scored = replace(model.scored, named=settings.targets(model.settings))
