"""Training runs that differ in the seed alone make one row, and what tells rows of one method and recipe apart."""

from __future__ import annotations

from collections.abc import Sequence

from dgbench.report import settings
from dgbench.report.models import Model

SEED = "train.seed"


def families(models: Sequence[Model]) -> list[list[Model]]:
    """Put together models whose recipes, read from their runs' folders, differ in the seed alone; in the order of the first.

    Models that started from other files of a tower's weights stay apart.
    """
    found: dict[object, list[Model]] = {}
    for model in models:
        place = _but_seed(model)
        found.setdefault(id(model) if place is None else (place, model.weights), []).append(model)
    return list(found.values())


def of_one_row(models: Sequence[Model], columns: set[str]) -> list[list[Model]]:
    """Return which models make a row each: runs with other seeds together if all were scored in full on all columns."""
    rows: list[list[Model]] = []
    for family in families(models):
        newest: dict[str, Model] = {}
        for model in family:
            if columns <= model.scored.full and not any(model.source_images()):
                newest.setdefault(model.newest.recipe_hash, model)
        together = list(newest.values())
        rows += [together] if len(together) > 1 else []
        rows += [[model] for model in family if len(together) < 2 or not any(model is other for other in together)]
    return rows


def tell_apart(models: Sequence[Model], *, every: bool) -> None:
    """Give each model the settings that tell it from others of its method and recipe: the same in all tables.

    Args:
        every: each run has a row of its own, and its seed may be what tells it apart.
    """
    alike: dict[tuple[str, str, str], dict[object, settings.Settings]] = {}
    for model in models:
        if model.settings is not None:
            shown = model.settings if every else {key: value for key, value in model.settings.items() if key != SEED}
            alike.setdefault(_name(model), {}).setdefault(_place(model, every=every), shown)
    told: dict[tuple[object, ...], dict[str, object]] = {}
    for name, recipes in alike.items():
        told |= {(*name, key): found for key, found in zip(recipes, settings.telling(list(recipes.values())), strict=True)}
    hashes: dict[object, set[str]] = {}
    for model in models:
        hashes.setdefault(_but_seed(model), set()).add(model.newest.recipe_hash)
    for model in models:
        model.telling = told.get((*_name(model), _place(model, every=every)), {})
        # beside others of its family, but not in one row with them
        place = _but_seed(model)
        others = place is not None and not every and len(hashes[place]) > 1
        model.telling_alone = {**model.telling, **({SEED: (model.settings or {})[SEED]} if others else {})}


def _name(model: Model) -> tuple[str, str, str]:
    return model.newest.method, model.newest.variant, model.newest.recipe


def _place(model: Model, *, every: bool) -> object:
    return model.newest.recipe_hash if every else _but_seed(model)


def _but_seed(model: Model) -> tuple[object, ...] | None:
    """Return a key that runs share if their recipes differ in the seed alone; None of a run whose recipe is unknown."""
    if model.settings is None or SEED not in model.settings:
        return None
    rest = tuple((key, settings.value_text(value)) for key, value in model.settings.items() if key != SEED)
    return (*_name(model), rest)
