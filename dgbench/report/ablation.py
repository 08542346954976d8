"""The accuracy of each fuser: in own runs, which train the same recipe with every fuser, and as published."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgbench.errors import DgbenchError
from dgbench.results import Record

if TYPE_CHECKING:
    from dgbench.recipe import Recipe

PUBLISHED = Path(__file__).parents[1] / "published_fusers.yaml"
AVERAGE = "average"  # of a published row, as it is printed


@dataclass(frozen=True, slots=True)
class Accuracy:
    """mIoU in 0..1, averaged over unseen domains: mean and standard deviation over training runs with other seeds."""

    mean: float
    spread: float  # 0 of a single run
    seeds: int


@dataclass(frozen=True, slots=True)
class Ablation:
    """Comparable accuracies by fuser, and a sentence on their origin."""

    accuracy: dict[str, Accuracy]
    described: str
    left_out: tuple[str, ...] = ()  # towers of runs that `fits` refused, as `tiny + tiny`


@dataclass(frozen=True, slots=True)
class Published:
    """A paper's table: by fuser, mIoU in 0..1 by target and AVERAGE."""

    width: int  # of the towers
    targets: tuple[str, ...]
    scores: Mapping[str, Mapping[str, float]]
    cite: str


def published(path: Path = PUBLISHED) -> Published:
    """Return the published accuracy of each fuser."""
    import yaml

    table = yaml.safe_load(path.read_text(encoding="utf-8"))
    targets = tuple(table["targets"])
    scores = {
        row["fuser"]: {
            name: percent / 100 for name, percent in zip((*targets, AVERAGE), (*row["miou"], row["mean"]), strict=True)
        }
        for row in table["rows"]
    }
    cite = f"{table['backbone']} trained on {table['source']}: {table['paper']}, {table['table']} (read {table['read']})"
    return Published(table["width"], targets, scores, cite)


def ablation(records: Iterable[Record], fits: Callable[[str, str], bool] = lambda _vfm, _vlm: True) -> Ablation:
    """Arrange the records of runs that differ in the fuser and the seed alone.

    Args:
        fits: whether runs with these towers (vfm, vlm) can be compared with what is shown; others are only named.

    Of several such sets, the one with the most fusers and then the most runs is used; of a fuser's runs of one seed, the newest.
    A run counts only if it was scored in full on all targets of its recipe under the recipe's protocol.
    """
    runs: dict[Any, list[Record]] = {}
    for record in records:
        counts = record.kind == "eval" and record.split == "val" and record.miou is not None
        if counts and record.run is not None and not record.rendered and not record.source_rendered and not record.n_extra:
            runs.setdefault(record.run, []).append(record)
    sets: dict[str, dict[tuple[str, int], tuple[str, float]]] = {}
    told: dict[str, str] = {}
    left_out: dict[str, None] = {}
    for run, scored in runs.items():
        try:
            from dgbench.recipe import load_recipe

            recipe = load_recipe(run / "recipe.yaml", check_method=False)
        except (DgbenchError, OSError):
            continue
        fuser, mean = recipe.method.options.get("fuser"), _mean(recipe, scored)
        if fuser is None or mean is None:
            continue
        towers = [str(recipe.method.options.get(kind)) for kind in ("vfm", "vlm")]
        if not fits(*towers):
            left_out[" + ".join(towers)] = None
            continue
        key, newest = _but_fuser_and_seed(recipe, scored), max(record.created for record in scored)
        targets = ", ".join(recipe.data.targets)
        told[key] = (
            f"{recipe.name} trained for {recipe.train.steps} steps on {recipe.data.source}, mean over {targets}, "
            f"protocol {recipe.eval.protocol}; ± standard deviation over training runs, their number behind"
        )
        known = sets.setdefault(key, {})
        place = (fuser, recipe.train.seed)
        known[place] = max(known.get(place, ("", 0.0)), (newest, mean))
    if not sets:
        return Ablation({}, "", tuple(left_out))
    best = max(sets, key=lambda key: (len({fuser for fuser, _ in sets[key]}), len(sets[key]), max(sets[key].values())))
    values: dict[str, list[float]] = {}
    for (fuser, _), (_, mean) in sorted(sets[best].items()):
        values.setdefault(fuser, []).append(mean)
    return Ablation({fuser: _over_seeds(means) for fuser, means in values.items()}, told[best], tuple(left_out))


def _mean(recipe: Recipe, scored: Iterable[Record]) -> float | None:
    """Return the mean over the recipe's targets, by the newest record of each; None unless all are complete."""
    found: dict[str, Record] = {}
    for record in sorted(scored, key=lambda record: (record.created, record.id)):
        if record.complete and record.protocol == recipe.eval.protocol:
            found[record.target] = record
    values = [found[target].miou for target in recipe.data.targets if target in found]
    complete = [value for value in values if value is not None]
    return statistics.fmean(complete) if len(complete) == len(recipe.data.targets) else None


def _but_fuser_and_seed(recipe: Recipe, scored: Iterable[Record]) -> str:
    content = recipe.model_dump(mode="json", exclude={"name", "expect"})
    content["method"].pop("fuser")
    content["train"].pop("seed")
    hashes = sorted({record.protocol_hash for record in scored if record.target in recipe.data.targets})
    return repr((content, hashes))


def _over_seeds(means: list[float]) -> Accuracy:
    return Accuracy(statistics.fmean(means), statistics.stdev(means) if len(means) > 1 else 0.0, len(means))
