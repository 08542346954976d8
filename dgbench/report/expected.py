"""Expected scores of recipes: as rows beside own ones, and as ranges that the scores of a training are compared with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dgbench import protocol as protocols
from dgbench.data.domains import RENDER_SIZE
from dgbench.report import settings
from dgbench.results import Record

if TYPE_CHECKING:
    from dgbench.recipe import Expectation, Recipe

SOURCE = ""  # the column of the source's validation split
WEIGHTS = "weights."  # prefix of a tower's option in a training record's `extra`: sha256 of the published weights it started from

ORIGIN = "origin."  # likewise: the tower and the file on the Hub whose name the weights have
_SHOWN = 12  # digits of a sha256

# an expected row does not depend on the seed, nor on which of its targets are scored
_FREE = (*settings.INCIDENTAL, "train.seed", "data.targets")


@dataclass(frozen=True, slots=True)
class Measured:
    """The key of a group: only scores with the same key are ranked together."""

    source: str
    protocol: str
    digest: str = ""  # the protocol's
    source_rendered: bool = False
    rendered: bool = False


@dataclass(frozen=True, slots=True)
class Reference:
    """The expected results of one recipe."""

    recipe: str
    method: str
    variant: str
    source: str
    protocol: str
    miou: Mapping[str, float]  # target -> 0..1; the source means its validation split
    origin: str
    hashes: Mapping[str, str] = field(default_factory=dict)  # column -> protocol hash that the recipe scores under
    protocol_digest: str = ""
    weights: Mapping[str, str] = field(default_factory=dict)  # option -> beginning of the sha256 of the tower's weights

    @property
    def measured(self) -> Measured:
        """The key of its group."""
        return Measured(self.source, self.protocol, self.protocol_digest)


@dataclass(frozen=True, slots=True)
class Verdict:
    """One score and its expected range; all in 0..1."""

    target: str
    miou: float
    low: float
    high: float

    @property
    def within(self) -> bool:
        """Whether the score is in the range, ends included, to the digits that are shown."""
        return round(self.low, 4) <= round(self.miou, 4) <= round(self.high, 4)


@dataclass(frozen=True, slots=True)
class Expected:
    """Comparison of a training with its recipe's expected scores: a verdict per domain, or why there is none."""

    recipe: str
    verdicts: tuple[Verdict, ...]
    origin: str
    seeds: int | None  # training runs that the ranges' width was measured from; None: it is an estimate
    reason: str = ""  # why the expected scores do not apply


def references() -> list[Reference]:
    """Return the expected results of all shipped recipes that state some."""
    from dgbench.recipe import load_recipe, recipe_names

    found = []
    for name in recipe_names():
        recipe = load_recipe(name, check_method=False)
        for first in {(row.origin, str(row.weights)): row for row in recipe.expect}.values():
            together = [row for row in recipe.expect if (row.origin, row.weights) == (first.origin, first.weights)]
            miou = {row.target: row.miou for row in together}
            method, source, rules = recipe.method, recipe.data.source, protocols.lookup(recipe.eval.protocol)
            hashes = {SOURCE if target == source else target: _protocol_hash(recipe, target) for target in miou}
            found.append(
                Reference(
                    name, method.name, method.variant, source, rules.name, miou, first.origin, hashes, rules.digest, first.weights
                )
            )
    return found


def held_against(recipe: Recipe, shipped: Recipe | None, records: Iterable[Record]) -> Expected | None:
    """Compare the scores of a training with the expected ones of its recipe; None if the recipe has none.

    Args:
        recipe: what was trained, with its method's options filled in.
        shipped: the recipe in its file; None if the file is unknown.
        records: of this training: its own, which names the towers' weights, and the scores.
    """
    if not recipe.expect:
        return None
    if shipped is None:
        return Expected(recipe.name, (), "", None, "the recipe's own file cannot be found")
    mine, base = (settings.flat(r.model_dump(mode="json")) for r in (recipe, shipped))
    if changed := settings.differences(mine, base, but=_FREE):
        listed = ", ".join(f"{key}={settings.value_text(value)}" for key, value in changed.items())
        return Expected(recipe.name, (), "", None, f"not as in the recipe: {listed}")
    known = list(records)
    weights = weights_of(known)
    rows = [row for row in shipped.expect if not mismatch(row.weights, weights)]
    if not rows:
        return Expected(recipe.name, (), "", None, mismatch(shipped.expect[0].weights, weights))
    verdicts, used = [], []
    for record in (record for record in known if record.kind == "eval"):
        row = next((row for row in rows if row.target == record.target), None)
        if row is None or record.miou is None or not _published_set(record):
            continue
        if record.protocol_hash == _protocol_hash(shipped, row.target):
            used.append(row)
            low, high = max(0.0, row.miou - row.tolerance), min(1.0, row.miou + row.tolerance)
            verdicts.append(Verdict(record.target, record.miou, low, high))
    if not verdicts:
        return Expected(recipe.name, (), "", None, "no domain was scored in full as its expected score was")
    return Expected(recipe.name, tuple(verdicts), "; ".join(dict.fromkeys(row.origin for row in used)), _seeds(used))


def weights_of(records: Iterable[Record]) -> dict[str, str]:
    """Return by option, e.g. `vfm`, the sha256 of the published weights in a training's record."""
    return {
        key.removeprefix(WEIGHTS): str(value)
        for record in records
        if record.kind == "train"
        for key, value in record.extra.items()
        if key.startswith(WEIGHTS) and value is not None
    }


def origins_of(record: Record) -> tuple[str, ...]:
    """Return what a training's record says of the weights that it started from: tower, file and sha256 of each."""
    found = []
    for option, sha in sorted(weights_of([record]).items()):
        origin = record.extra.get(f"{ORIGIN}{option}")
        found.append(f"{origin or option}, sha256 {sha[:_SHOWN]}")
    return tuple(found)


def mismatch(expected: Mapping[str, str], found: Mapping[str, str]) -> str:
    """Return why a run with other tower weights than the expected scores' cannot be compared; "" if they are the same."""
    for option, sha in expected.items():
        if option not in found:
            return f"its scores are of the {option} weights {sha}, and this run's record does not say which it had"
        if not found[option].startswith(sha):
            return f"its scores are of the {option} weights {sha}, this run had {found[option][: len(sha)]}"
    return ""


def _published_set(record: Record) -> bool:
    """Return whether training and scoring used exactly the published images."""
    trained = not record.source_rendered and record.source_complete is not False
    return trained and record.complete and not record.n_extra and not record.rendered


def _seeds(rows: Iterable[Expectation]) -> int | None:
    counts = {row.seeds for row in rows}
    return None if None in counts else min((count for count in counts if count is not None), default=None)


def _protocol_hash(recipe: Recipe, target: str) -> str:
    rules, (domain,) = protocols.lookup(recipe.eval.protocol), recipe.data.rows([target])
    size = recipe.data.size or (RENDER_SIZE if domain.procedural else None)
    return protocols.protocol_hash(rules, protocols.domain_row(domain, "val", protocols.label_map(rules, domain), size))
