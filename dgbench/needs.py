"""Files that a training or an evaluation needs: those of domains and the weights of towers.

They are checked before anything heavy is imported, so that one error names all that is missing, with the command to get it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dgbench.data.domain import Domain
from dgbench.data.index import require
from dgbench.data.places import data_root
from dgbench.download.sources import source
from dgbench.errors import DataError, DgbenchError, RecipeError

if TYPE_CHECKING:
    from dgbench.recipe import Recipe
    from mfuser.towers.files import HubFile

Wanted = tuple[str, Domain, str]  # "source" or "target", a domain, split


def check_training(recipe: Recipe, root: Path | None = None, *, scored: bool = True, from_scratch: bool = True) -> None:
    """Raise a DataError that names all that a training lacks, and how to get it.

    Args:
        recipe: may be one whose method was not checked.
        scored: source and targets are scored afterwards.    from_scratch: the towers' weights are needed.
    """
    from mfuser.methods import backbone_names, names
    from mfuser.towers.table import TOWERS

    if from_scratch and (init := recipe.train.init) is not None:
        if not Path(init).is_dir():
            raise RecipeError(f"train.init: no folder {init}", "give a run folder (runs/...), or one that mfuser.save wrote")
        from_scratch = False  # of towers it takes no published weights
    options = recipe.method.options
    # backbones that a method defines itself have no files
    own = backbone_names(recipe.method.name) - TOWERS.keys() if recipe.method.name in names() else set()
    towers = [name for key in recipe.method.towers if isinstance(name := options.get(key), str) and name not in own]
    if any(name not in TOWERS and not name.startswith("timm:") for name in towers):
        return  # a wrong name is reported before gigabytes are downloaded for it
    data = recipe.data
    wanted: list[Wanted] = [
        ("source", row, split) for row, split in zip(data.rows(data.sources, root), data.source_splits, strict=True)
    ]
    wanted += scoring(recipe, root) if scored else []
    try:
        _check(wanted, towers if from_scratch else (), root, tokenized=bool(options.get("token_ids")))
    except DataError:
        # towers of the same size fit each other; others are checked, which takes torch, before anything is downloaded
        rows = [TOWERS.get(name) for name in towers]
        if None in rows or len({(row.width, row.depth) for row in rows if row is not None}) > 1:
            _build(recipe)
        raise


def check_scoring(wanted: Sequence[Wanted], root: Path | None = None, no_run: DgbenchError | None = None) -> None:
    """Raise a DataError that names all the domains whose files are not here, and how to get them.

    Args:
        no_run: the error that there is nothing to score, to be reported with the others.
    """
    _check(wanted, (), root, no_run)


def scoring(recipe: Recipe, root: Path | None = None) -> list[Wanted]:
    """Return what a run is scored on by default: its recipe's targets, and the validation splits of its sources."""
    data = recipe.data
    sources: list[Wanted] = [("source", row, "val") for row in data.rows(data.sources, root) if "val" in row.splits]
    return [*sources, *(("target", row, "val") for row in data.rows(data.targets, root))]


def _build(recipe: Recipe) -> None:
    """Raise a RecipeError if the towers do not fit each other."""
    import mfuser

    try:
        mfuser.build(recipe.method.name, **recipe.method.options, image_size=recipe.data.crop)
    except mfuser.WeightsNotFound:  # only raised for towers that fit
        return
    except ValueError as error:
        raise RecipeError(f"`{recipe.method.name}` cannot be built: {error}", "change `method` or `data.crop`") from error


def _check(
    wanted: Sequence[Wanted],
    towers: Sequence[str],
    root: Path | None,
    no_run: DgbenchError | None = None,
    *,
    tokenized: bool = False,
) -> None:
    absent, odd = _domains(wanted, root)
    weights = _weights(towers, absent or odd, tokenized)
    parts = [f"weights {', '.join(str(file) for files in weights.values() for file in files)}"] if weights else []
    for role in ("source", "target"):
        names = [name for name, its_role in absent.items() if its_role == role]
        parts += [f"{role}{'s' * (len(names) > 1)} {', '.join(f'`{name}`' for name in names)}"] if names else []
    problems = [no_run] if no_run else []
    if parts:
        problems.append(DataError(f"not on this disk: {'; '.join(parts)}", _how_to_get(absent, weights, root)))
    problems += odd
    if len(problems) == 1:
        raise problems[0]
    if problems:
        hints = dict.fromkeys(problem.hint for problem in problems if problem.hint)
        raise DataError("\nand ".join(problem.message for problem in problems), "\n".join(hints))


def _domains(wanted: Iterable[Wanted], root: Path | None) -> tuple[dict[str, str], list[DgbenchError]]:
    """Return the domains that are missing completely, each with its role, and the errors of others."""
    absent: dict[str, str] = {}
    odd: dict[str, DgbenchError] = {}
    base = data_root(root)
    for role, row, split in wanted:
        name = row.name
        if row.procedural or name in absent or name in odd:
            continue
        try:
            require(row, split, root)
        except DataError as error:
            if split in row.splits and source(name) is not None and not _holds_anything(row, base):
                absent[name] = role
            else:
                odd[name] = error
    return absent, list(odd.values())


def _holds_anything(row: Domain, base: Path) -> bool:
    return any(not entry.name.startswith(".") for folder in row.roots(base) for entry in os.scandir(folder))


def _weights(towers: Sequence[str], more: object, tokenized: bool) -> dict[str, list[HubFile]]:
    """Return the missing files of each tower."""
    from mfuser.towers.table import TOWERS
    from mfuser.towers.weights import files

    missing = {}
    for tower in dict.fromkeys(towers):
        if tower not in TOWERS and not more:
            continue  # timm's are reported when the model is built, if nothing else is missing
        try:
            lacking = [file for file in files(tower) if file.where is None]
        except ValueError:  # no model of timm's: reported when the model is built
            continue
        if tokenized and tower in TOWERS:
            lacking = [file for file in lacking if file is TOWERS[tower].weights]
        if lacking:
            missing[tower] = lacking
    return missing


def _how_to_get(absent: Iterable[str], weights: Iterable[str], root: Path | None) -> str:
    command = f"run: dgbench download {' '.join([*weights, *absent])}"
    places = [f"data is looked for in {data_root(root)} (--root or DGBENCH_DATA name another folder)"] if absent else []
    if weights:
        from huggingface_hub.constants import HF_HUB_CACHE

        places.append(f"weights are looked for in {HF_HUB_CACHE} (HF_HUB_CACHE; copy it from a machine with a network)")
    return "; ".join([command, *places])
