"""Training checkpoints of a run: written whole or not at all, newest complete one found again.

`run/checkpoint/step-000200/` holds `model.safetensors` + `model.json` (mfuser's format, all that evaluation needs) and
`optimizer.pt` (AdamW's moments, tensors only, for resuming). A checkpoint is written to a hidden folder beside it and
renamed when every byte is on disk, so whatever carries the final name is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import mfuser
from dgbench import atomic, untrusted
from dgbench.errors import CheckpointError
from dgbench.recipe import Recipe
from mfuser.checkpoints import steps
from mfuser.segmentor import Segmentor

_PARTIAL = ".partial-"
_SEEN = "source.json"


@dataclass(frozen=True, slots=True)
class Seen:
    """What of its source a model was trained on; it lies beside the weights, so that every score of them can say it."""

    images: int
    available: int  # images of the complete split; of a rendered source as many as were drawn
    rendered: bool  # an export of rendered scenes in the files of a published set


def save(
    model: Segmentor, optimizer: torch.optim.Optimizer, run: Path, step: int, *, keep: int = 1, seen: Seen | None = None
) -> Path:
    """Write the checkpoint of `step` and drop all but the newest `keep`."""
    folder = run / "checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    clean(run)
    partial, final = folder / f"{_PARTIAL}{step:06d}", folder / f"step-{step:06d}"
    mfuser.save(model, partial)
    if seen is not None:
        atomic.write(partial / _SEEN, json.dumps(asdict(seen)) + "\n")
    moments = partial / "optimizer.pt"
    try:
        with moments.open("wb") as file:
            torch.save(optimizer.state_dict(), file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        # torch wraps a full disk in an error of its own; neither names the file
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, str(moments)) from error
    if final.exists():  # the same step again, after a resume from an earlier one
        _remove(final)
    os.replace(partial, final)
    for old in steps(run)[:-keep]:
        _remove(old)
    return final


def _remove(folder: Path) -> None:
    # renamed first: a kill in the middle of the removal must not leave a step folder with files missing
    doomed = folder.with_name(f"{_PARTIAL}old-{folder.name}")
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def clean(run: Path) -> None:
    """Remove what a kill left half-written or half-removed."""
    for partial in (run / "checkpoint").glob(f"{_PARTIAL}*"):
        shutil.rmtree(partial)


def newest(run: Path) -> tuple[Path, int] | None:
    """The newest complete checkpoint of a run and its step, or None."""
    complete = steps(run)
    return (complete[-1], int(complete[-1].name.removeprefix("step-"))) if complete else None


def folder_of(path: Path) -> Path:
    """The model folder meant by `path`: a run, or a folder that holds a model itself.

    Raises: CheckpointError when there is neither.
    """
    if (path / "model.json").is_file():
        return path
    if found := newest(path):
        return found[0]
    if (path / "recipe.yaml").is_file():
        raise CheckpointError(
            f"{path} has no checkpoint yet: its training stopped before the first one",
            f"start it again: dgbench train --resume {path}",
        )
    raise CheckpointError(f"{path} holds no checkpoint", "give a run folder (runs/...), `latest`, or a saved model")


def seen_by(folder: Path) -> Seen | None:
    """What the model in a folder was trained on; None where nothing says it: older checkpoints, converted ones.

    Raises: CheckpointError if the file that says it is damaged.
    """
    path = folder / _SEEN
    try:
        told = untrusted.read_object(untrusted.read_bytes(path, 10_000)) or {}
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CheckpointError(f"{path} {error}", "restore the file, or train again") from None
    types = {name: type(value) for name, value in told.items()}
    if types != {"images": int, "available": int, "rendered": bool} or not 0 < told["images"] < 10**12 > told["available"] > 0:
        raise CheckpointError(f"{path} does not say what was trained on", "restore the file, or train again")
    return Seen(**told)


def in_record(seen: Seen | None) -> dict[str, Any]:
    """The fields of a record that say what was trained on."""
    return {} if seen is None else {f"source_{name}": value for name, value in asdict(seen).items()}


def load_model(path: Path) -> Segmentor:
    """The model of a run or model folder, in evaluation mode.

    Raises: CheckpointError when the files are missing, damaged or do not fit together.
    """
    folder = folder_of(path)
    try:
        return mfuser.load(folder)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{folder} cannot be loaded: {error}", "train again, or restore the folder") from error


def load_for(recipe: Recipe, path: Path) -> Segmentor:
    """The model of a run or model folder, if it is what the recipe trains.

    Raises: CheckpointError when it is another method's, was built with other options, or cannot be loaded.
    """
    model = load_model(path)
    wanted = {"name": recipe.method.name, **recipe.method.options}
    found: dict[str, Any] = {"name": model.method, **model.options}
    for key, value in wanted.items():
        # what a recipe leaves to the model (None) is filled in by it
        if value is not None and found.get(key) != value:
            raise CheckpointError(
                f"{folder_of(path)} holds a model with {key} `{found.get(key)}`, but the recipe says `{value}`",
                "put back the run's own checkpoint, or give the folder that the model was trained in",
            )
    return model


def sha256(folder: Path) -> str:
    """What identifies the weights in a model folder."""
    with (folder / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Restore AdamW's moments. Tensors only: nothing in the file is executed."""
    try:
        state: dict[str, Any] = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state)
    except Exception as error:
        raise CheckpointError(
            f"{folder / 'optimizer.pt'} cannot be resumed from: {str(error).splitlines()[0]}",
            "start a new run, or remove this step's folder to resume from an earlier one",
        ) from error
