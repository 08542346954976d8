"""Conversion of authors' checkpoints to run folders, which are then evaluated like any other."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mfuser
from dgbench.errors import CheckpointError
from dgbench.recipe import dump, load_recipe


@dataclass(frozen=True, slots=True)
class Converted:
    """The result of a conversion."""

    source: str
    run: str
    recipe: str
    method: str
    towers: str
    used: int  # tensors
    dead: tuple[str, ...]  # tensors that the authors' model holds and never reads


def convert(path: Path, out: Path, *, recipe: str | None = None, token_ids: Sequence[Sequence[int]] | None = None) -> Converted:
    """Convert a checkpoint that a method's authors published into a run folder for `evaluate` and `predict`.

    Args:
        recipe: the recipe that it was trained with; by default the one that the method declares for such checkpoints.
        token_ids: (19, 5) ids of the class prompts; None: made by the tower's tokenizer.

    Raises: CheckpointError naming the file and what does not fit; WeightsNotFound for a missing tokenizer, or for the weights of
        a frozen tower that the checkpoint leaves out.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is there already and not empty", "name a new folder")
    if not path.is_file():
        raise CheckpointError(f"no such checkpoint: {path}", "give the file that the authors published, e.g. mfuser_eva02.pth")
    if recipe is not None:
        load_recipe(recipe, check_method=False)
    # imported here, so that the errors above are reported without waiting for torch
    from mfuser.authors import load_authors_checkpoint, read_authors, recognise

    try:
        state = read_authors(path)
        kinds = recognise(state)
        if recipe is None and len(kinds) > 1:
            named = ", ".join(f"{method} with {release.named} ({release.recipe})" for method, release in kinds)
            raise CheckpointError(f"{path} may be of {named}: it leaves out the towers that would tell", "name it by --recipe")
        trained = load_recipe(recipe or kinds[0][1].recipe)
        has = trained.method.options
        release = next(
            (r for m, r in kinds if m == trained.method.name and all(has.get(k) == v for k, v in r.options.items())), None
        )
        if release is None:
            named = " or ".join(f"`{method}` with {kind.named}" for method, kind in kinds)
            raise CheckpointError(f"{path} is {named}, which `{trained.name}` is not", "give another --recipe")
        options = {**has, **({"token_ids": [list(row) for row in token_ids]} if token_ids else {})}
        # frozen towers that the checkpoint leaves out keep their published weights
        weights: mfuser.methods.Weights = "published" if release.absent else "meta"
        model = mfuser.build(trained.method.name, weights=weights, **options, image_size=trained.data.crop)
        report = load_authors_checkpoint(model, state)
        # written beside `out` and renamed when complete
        partial = out.with_name(f".{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        mfuser.save(model, partial / "checkpoint" / f"step-{trained.train.steps:06d}", towers="named")
    except mfuser.WeightsNotFound:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {str(error).removeprefix(f'{path} ')}", "nothing was written") from None
    trained = trained.model_copy(update={"name": f"{trained.name}-authors"})
    dump(trained, partial / "recipe.yaml")
    os.replace(partial, out)
    about = (trained.method.name, release.named)
    return Converted(str(path), str(out), trained.name, *about, len(report.used), report.dead)


def read_token_ids(path: Path) -> list[list[int]]:
    """Read token ids (19, 5) from a JSON file.

    Raises: CheckpointError for anything else.
    """
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}", "give a list of 19 lists of 5 integers") from None
    rows = ids if isinstance(ids, list) else []
    numbers = [number for row in rows if isinstance(row, list) and len(row) == 5 for number in row]
    if len(rows) != 19 or len(numbers) != 95 or any(type(number) is not int for number in numbers):
        raise CheckpointError(f"{path} does not hold token ids", "give a list of 19 lists of 5 integers")
    return rows
