"""The authors' checkpoints as runs of ours: converted once, then evaluated like anything trained here."""

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
    """What became of a foreign checkpoint."""

    source: str
    run: str
    recipe: str
    vlm: str
    used: int  # tensors
    dead: tuple[str, ...]  # tensors that the authors' model holds and never reads


def convert(path: Path, out: Path, *, recipe: str | None = None, token_ids: Sequence[Sequence[int]] | None = None) -> Converted:
    """Turn a checkpoint of the authors' MFuser into a run folder that `evaluate` and `predict` take.

    Args:
        recipe: what it was trained by; by default the tower's on GTA5.
        token_ids: (19, 5) ids of the class prompts; None asks the tower's tokenizer.

    Raises: CheckpointError naming the file and what does not fit; WeightsNotFound for a missing tokenizer.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is there already and not empty", "name a new folder")
    if not path.is_file():
        raise CheckpointError(f"no such checkpoint: {path}", "give the file that the authors published, e.g. mfuser_eva02.pth")
    if recipe is not None:
        load_recipe(recipe, check_method=False)
    # here and not above: what is wrong so far need not wait for torch
    from mfuser.checkpoints import authors_tower, load_authors_checkpoint, read_authors

    try:
        state = read_authors(path)
        vlm = authors_tower(state)
        trained = load_recipe(recipe or f"mfuser/{vlm}-gta")
        if trained.method.name != "mfuser" or trained.method.options["vlm"] != vlm:
            raise CheckpointError(f"{path} is MFuser with `{vlm}`, which `{trained.name}` is not", "give another --recipe")
        options = {**trained.method.options, **({"token_ids": [list(row) for row in token_ids]} if token_ids else {})}
        model = mfuser.build("mfuser", **options, image_size=trained.data.crop, pretrained=False, filled=False)
        report = load_authors_checkpoint(model, state)
        # made beside the place and renamed whole: what carries the name is complete
        partial = out.with_name(f".{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        mfuser.save(model, partial / "checkpoint" / f"step-{trained.train.steps:06d}")
    except mfuser.WeightsNotFound:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {str(error).removeprefix(f'{path} ')}", "nothing was written") from None
    trained = trained.model_copy(update={"name": f"{trained.name}-authors"})
    dump(trained, partial / "recipe.yaml")
    os.replace(partial, out)
    return Converted(str(path), str(out), trained.name, vlm, len(report.used), report.dead)


def read_token_ids(path: Path) -> list[list[int]]:
    """Token ids (19, 5) from a JSON file.

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
