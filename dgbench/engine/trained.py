"""The record of a complete training, and what it says of the weights that the training started from."""

from __future__ import annotations

from pathlib import Path

from dgbench import results
from dgbench.data.dataset import SegDataset
from dgbench.data.union import Union
from dgbench.engine import checkpoints
from dgbench.engine.checkpoints import Made
from dgbench.recipe import Recipe, recipe_hash
from dgbench.recipe.files import settings_of
from dgbench.report.expected import ORIGIN, WEIGHTS
from mfuser.methods import backbone_names
from mfuser.towers.files import PackagedFile
from mfuser.towers.table import TOWERS
from mfuser.towers.weights import hub_file


def record_of(
    recipe: Recipe,
    run: Path,
    dataset: SegDataset | Union,
    seen: checkpoints.Seen | None,
    made: Made,
    total: float | None,
    *,
    write: bool,
) -> results.Record:
    """Return the record of a complete training; if it was resumed, seconds and speed are those of its last part.

    If these weights have one already, it is returned; otherwise a kill may have prevented it.
    """
    folder = checkpoints.folder_of(run)
    sha = checkpoints.sha256(folder)
    if there := [record for record in checkpoints.trainings(run) if record.checkpoint == sha]:
        return there[-1]
    trained = (recipe.train.steps - made.began) * recipe.train.batch_size
    record = results.Record(
        id=results.new_id(),
        kind="train",
        created=results.now_iso(),
        method=recipe.method.name,
        variant=recipe.variant,
        recipe=recipe.name,
        recipe_hash=recipe_hash(recipe),
        source=recipe.data.source,
        target=recipe.data.source,
        split=dataset.split,
        n_images=len(dataset),
        n_available=dataset.available,
        n_extra=dataset.extra,
        rendered=dataset.exported,
        **checkpoints.in_record(seen),
        seconds={"train": made.seconds, "total": total},
        seed=recipe.train.seed,
        steps=recipe.train.steps,
        checkpoint=sha,
        backends=made.backends,
        environment=made.environment,
        commit=made.commit,
        dirty=made.dirty,
        extra={
            "loss": made.loss,
            "resumed_at_step": float(made.began),
            "peak_gib": made.peak_gib,
            "values_m": checkpoints.values(folder) / 1e6,
            "images_per_second": trained / made.seconds if made.seconds else None,
            **_began_with(recipe, made),
            **_settings_of(recipe),
        },
    )
    return results.write(record, run) if write else record


def _began_with(recipe: Recipe, made: Made) -> dict[str, float | str | None]:
    """Return the sha256 of the weights that a training started from: of `train.init` as `init`, or of its towers."""
    return _tower_weights(recipe) if recipe.train.init is None else {"init": made.init}


def _tower_weights(recipe: Recipe) -> dict[str, float | str | None]:
    """Return the sha256 of each tower's weights, by `weights.<option>`, and by `origin.<option>` tower and file.

    Towers that are trained from scratch have none. Of those that come with dgbench, `pretraining.<option>` says on what they
    were trained before.
    """
    options = {key: recipe.method.options.get(key) for key in recipe.method.towers}
    own = backbone_names(recipe.method.name) - TOWERS.keys()  # backbones that are not in the table of towers
    rows = {key: hub_file(tower) for key, tower in options.items() if isinstance(tower, str) and tower not in own}
    found: dict[str, float | str | None] = {}
    for key, row in rows.items():
        if row is not None:
            place = row.file if row.repo is None else f"{row.repo}/{row.file}"
            found |= {f"{WEIGHTS}{key}": row.sha256(), f"{ORIGIN}{key}": f"{options[key]}, {place}"}
        if isinstance(row, PackagedFile):
            found[f"pretraining.{key}"] = row.pretraining()
    return found


def _settings_of(recipe: Recipe) -> dict[str, float | str | None]:
    """Return the recipe that the settings were made for, if that is one with other towers."""
    name = settings_of(recipe.name, recipe.method.options)
    return {"settings_of": name} if name else {}
