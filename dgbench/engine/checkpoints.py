"""Training checkpoints of a run, written completely or not at all.

`run/checkpoint/step-000200/` holds `model.safetensors` + `model.json` (mfuser's format, all that evaluation needs; frozen towers
with published weights are named by the SHA-256 of their files, `dgbench export` writes them, too),
`optimizer.pt` (the optimizer's moments, tensors only) and `training.safetensors` (what a method needs for training but not
for scoring: teachers, memory banks) for resuming, `source.json` (the training images) and `training.json` (the training).
`manifest.json`, written last, has their sizes and hashes; each file is compared with it when it is read. A checkpoint is
written to a hidden folder beside it and renamed when every byte is on disk, so a folder with the final name is complete.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch

import mfuser
import mfuser.checkpoints
from dgbench import atomic, results, untrusted
from dgbench.engine.checkpoint_writer import Snapshot, snapshot
from dgbench.engine.device import memory_refused
from dgbench.errors import CheckpointError, ResultError
from dgbench.recipe import Recipe
from mfuser import manifest
from mfuser.checkpoints import step_of, steps
from mfuser.segmentor import Segmentor
from mfuser.towers import named

_PARTIAL = ".partial-"
_SEEN = "source.json"
_MADE = "training.json"
_MOMENTS = "optimizer.pt"
_TRAINING = "training.safetensors"


@dataclass(frozen=True, slots=True)
class Seen:
    """The part of its source that a model was trained on; stored with the weights, so that every score can state it."""

    images: int
    available: int  # images of the complete split; of a rendered source as many as were drawn
    rendered: bool  # an export of rendered scenes in the files of a published set
    each: dict[str, tuple[int, int, bool]] | None = None  # the same for each of several sources; None: there is one


def told(seen: Seen, name: str) -> str:
    """Say what was trained on, of a source of this name or of several."""
    each = seen.each or {name: (seen.images, seen.available, seen.rendered)}
    return " and ".join(
        f"{images} {'rendered ' * rendered}images of {available} of `{source}`"
        for source, (images, available, rendered) in each.items()
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """How a checkpoint was trained: for the training's record, and to detect what may change a resumed training."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"strict": True, "allow_inf_nan": False, "extra": "forbid"}

    step: int
    began: int  # the step at which the process that wrote this began; seconds and speed are those of its part
    seconds: float | None
    loss: float | None  # the last one in the log
    peak_gib: float | None
    backends: dict[str, str]
    environment: dict[str, str]  # versions, device, threads
    processes: int
    commit: str | None
    dirty: bool | None
    log_bytes: int | None  # of `log.jsonl` at this step; None: not known
    log_sha256: str | None
    init: str | None = None  # SHA-256 of the weights of `train.init`
    streams: dict[str, str] = field(default_factory=dict)  # which images each of `data.extra` holds: `Stream.digest`


def save(
    model: Segmentor,
    optimizer: torch.optim.Optimizer,
    run: Path,
    step: int,
    *,
    keep: int = 1,
    seen: Seen | None = None,
    made: Made | None = None,
) -> Path:
    """Write the checkpoint of `step` and drop all but the newest `keep`.

    Raises: CheckpointError for weights that are not finite: nothing is written then.
    """
    return write(snapshot(model, optimizer), run, step, keep=keep, seen=seen, made=made)


def write(own: Snapshot, run: Path, step: int, *, keep: int = 1, seen: Seen | None = None, made: Made | None = None) -> Path:
    """Write a snapshot of a training at `step`, as `save` does."""
    folder = run / "checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    clean(run)
    partial, final = folder / f"{_PARTIAL}{step:06d}", folder / f"step-{step:06d}"
    try:
        mfuser.checkpoints.write(own.model, partial, towers="named")
    except ValueError as error:
        raise CheckpointError(
            f"step {step}: {error}",
            "lower optim.lr, or set train.clip_norm=1.0; an earlier checkpoint is kept"
            if newest(run)
            else "lower optim.lr, or set train.clip_norm=1.0",
        ) from None
    for name, content in ((_SEEN, seen), (_MADE, made)):
        if content is not None:
            values = {key: value for key, value in asdict(content).items() if (key, value) != ("each", None)}
            atomic.write(partial / name, json.dumps(values) + "\n")
    _write_moments(own.moments, partial / _MOMENTS)
    if own.training:
        # written by Python instead of safetensors, so that a full disk is reported as for every other file
        atomic.write(partial / _TRAINING, safetensors.torch.save(own.training))
    there = {_MOMENTS: True, _TRAINING: bool(own.training), _SEEN: seen is not None, _MADE: made is not None}
    manifest.seal(partial, [name for name, is_there in there.items() if is_there])
    if final.exists():  # the same step again, after a resume from an earlier one
        _remove(final)
    os.replace(partial, final)
    # the rename must be on the disk before an older checkpoint is removed
    atomic.sync_folder(folder)
    prune(run, keep)
    return final


def _write_moments(moments: dict[str, Any], path: Path) -> None:
    try:
        with path.open("wb") as file:
            torch.save(moments, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        # torch wraps a full disk in an error of its own; neither names the file
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error


def prune(run: Path, keep: int = 1) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for old in steps(run)[:-keep]:
        _remove(old)


def _remove(folder: Path) -> None:
    # renamed first: a kill in the middle of the removal must not leave a step folder with files missing
    doomed = folder.with_name(f"{_PARTIAL}old-{folder.name}")
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def clean(run: Path) -> None:
    """Remove partly written or partly removed checkpoints of killed processes."""
    for partial in (run / "checkpoint").glob(f"{_PARTIAL}*"):
        shutil.rmtree(partial)


def newest(run: Path) -> tuple[Path, int] | None:
    """Return the newest complete checkpoint of a run and its step, or None."""
    complete = steps(run)
    return (complete[-1], step_of(complete[-1])) if complete else None


def folder_of(path: Path) -> Path:
    """Return the model folder meant by `path`: a run, or a folder that holds a model itself.

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
    """Return what the model in a folder was trained on; None if that is not recorded: older checkpoints, converted ones.

    Raises: CheckpointError if the file that says it is damaged.
    """
    path = folder / _SEEN
    _check(folder, _SEEN)
    try:
        told = untrusted.read_object(untrusted.read_bytes(path, 10_000)) or {}
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CheckpointError(f"{path} {error}", _advice(folder)) from None
    each = told.pop("each", None)
    triples = [list(told.values())] if each is None else [list(told.values()), *each.values()] if isinstance(each, dict) else []
    if list(told) != ["images", "available", "rendered"] or not triples or not all(map(_plausible, triples)):
        raise CheckpointError(f"{path} does not say what was trained on", _advice(folder))
    return Seen(**told, each=None if each is None else {str(name): tuple(one) for name, one in each.items()})


def _plausible(triple: Any) -> bool:
    if not isinstance(triple, list) or [type(value) for value in triple] != [int, int, bool]:
        return False
    return bool(0 < triple[0] < 10**12 > triple[1] > 0)


def in_record(seen: Seen | None) -> dict[str, Any]:
    """Return the fields of a record that say what was trained on."""
    return {} if seen is None else {f"source_{name}": getattr(seen, name) for name in ("images", "available", "rendered")}


def made_how(folder: Path) -> Made | None:
    """Return how the model in a folder was trained; None if that is not recorded: older checkpoints, converted ones.

    Raises: CheckpointError if the file that says it is damaged, or of another step than the folder's name.
    """
    from pydantic import TypeAdapter, ValidationError

    path = folder / _MADE
    _check(folder, _MADE)
    try:
        made = TypeAdapter(Made).validate_json(untrusted.read_bytes(path, 100_000))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        problem = untrusted.in_words(error.errors(include_url=False)[0])
        raise CheckpointError(f"{path} does not say how it was trained: {problem}", _advice(folder)) from None
    except ValueError as error:
        raise CheckpointError(f"{path} {error}", _advice(folder)) from None
    if step_of(folder) not in (-1, made.step):
        raise CheckpointError(f"{folder} holds the checkpoint of step {made.step}", f"rename it to step-{made.step:06d}")
    return made


def load_model(path: Path) -> Segmentor:
    """Return the model of a run or model folder, in evaluation mode.

    Raises: CheckpointError when the files are missing, damaged or do not fit together, or when the weights are not those
        that the record of their training names.
    """
    folder = folder_of(path)
    try:
        model = mfuser.load(folder)
    except mfuser.WeightsNotFound as error:
        raise CheckpointError(f"{folder} cannot be loaded: {error.message}", error.hint) from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{folder} cannot be loaded: {error}", _advice(folder)) from error
    except (RuntimeError, MemoryError) as error:
        if refused := memory_refused(error):
            raise CheckpointError(f"{folder} cannot be loaded: {refused}", "use a machine with more memory") from None
        raise
    _check_recorded(folder)
    return model


def in_fp32(model: Segmentor) -> str | None:
    """Bring a model of 16 bits to fp32, in which dgbench scores; return `bf16` or `fp16` if its weights were rounded to that.

    Trained weights are meant: towers may be frozen in 16 bits while the rest is trained.
    """
    kinds = {tensor.dtype for tensor in model.model_state().values()}
    trained = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    if kinds & _NARROW.keys():
        model.to(torch.float32)
    return next((name for dtype, name in _NARROW.items() if dtype in trained), None)


_NARROW = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def _check(folder: Path, name: str) -> None:
    try:
        manifest.check(folder, name)
    except ValueError as error:
        raise CheckpointError(f"{folder} cannot be loaded: {error}", _advice(folder)) from None


def _advice(folder: Path) -> str:
    """Return what to do about a damaged checkpoint."""
    older = [other for other in steps(folder.parent.parent) if step_of(other) < step_of(folder)]
    if older:
        return f"restore the file, or remove {folder} to go on from step {step_of(older[-1])}"
    return "restore the file, or train again"


def _check_recorded(folder: Path) -> None:
    step = step_of(folder)
    records = [] if step < 0 else [one for one in trainings(folder.parent.parent) if one.steps == step and one.checkpoint]
    if records and (sha := sha256(folder)) not in {one.checkpoint for one in records}:
        raise CheckpointError(
            f"{folder} holds other weights than its training wrote: SHA-256 {sha[:12]}..., {records[-1].checkpoint[:12]}... "
            f"by {records[-1].path}",
            "put back the run's own checkpoint, or train again",
        )


def trainings(run: Path) -> list[results.Record]:
    """Return the records of trainings that a run holds, oldest first; those that cannot be read are left out."""
    found = []
    for path in sorted(run.glob("record-*.json")):
        try:
            found.append(results.read(path))
        except ResultError:  # reported where results are listed
            continue
    return [record for record in found if record.kind == "train"]


def load_for(recipe: Recipe, path: Path) -> Segmentor:
    """Return the model of a run or model folder, if it is what the recipe trains.

    Raises: CheckpointError when it is another method's, was built with other options, or cannot be loaded.
    """
    model = load_model(path)
    wanted = {"name": recipe.method.name, **recipe.method.options}
    found: dict[str, Any] = {"name": model.method, **model.options}
    for key, value in wanted.items():
        # options that a recipe leaves open (None) are filled in by the model
        if value is not None and found.get(key) != value:
            raise CheckpointError(
                f"{folder_of(path)} holds a model with {key} `{found.get(key)}`, but the recipe says `{value}`",
                "put back the run's own checkpoint, or give the folder that the model was trained in",
            )
    return model


def sha256(folder: Path) -> str:
    """Return the hash that identifies the weights in a model folder; hashes of towers that it names are part of the file."""
    with (folder / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def values(folder: Path) -> int:
    """Return how many numbers a checkpoint's model has: parameters and buffers, those of towers that it names included."""
    from safetensors import safe_open

    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        stored: int = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118  it is no dict
    return stored + sum(tower.values for tower in named.in_file(path))


def begin_with(model: Segmentor, path: Path) -> str:
    """Load the weights of a run or model folder into a model, to start a training from; return their SHA-256.

    Raises: CheckpointError when there is no such folder, its files are damaged, or it is another method's or has tensors
        that do not fit, which are named.
    """
    folder = init_folder(path)
    try:
        mfuser.checkpoints.load_weights(model, folder)
    except mfuser.WeightsNotFound as error:
        raise CheckpointError(f"train.init: {folder} cannot be started from: {error.message}", error.hint) from error
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"train.init: {folder} cannot be started from: {error}", "give a model of the same method, options and crop"
        ) from error
    return sha256(folder)


def init_folder(path: Path) -> Path:
    """Return the model folder that `train.init` means.

    Raises: CheckpointError when there is none.
    """
    if not path.is_dir():
        raise CheckpointError(f"train.init: no folder {path}", "give a run folder (runs/...), or one that mfuser.save wrote")
    try:
        return folder_of(path)
    except CheckpointError as error:
        raise CheckpointError(f"train.init: {error.message}", error.hint) from None


def load_training(model: Segmentor, folder: Path) -> None:
    """Restore a method's training-only state: `training_only`, as `enter_training` made it.

    Raises: CheckpointError if the file is missing, damaged or of another model.
    """
    path = folder / _TRAINING
    _check(folder, _TRAINING)
    try:
        state = safetensors.torch.load_file(path) if path.exists() else {}
        model.load_training_state(state)
    except (ValueError, OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be resumed from: {error}", _advice(folder)) from error


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Restore the optimizer's moments. Tensors only: nothing in the file is executed.

    Raises: CheckpointError if the file is missing, damaged or of another model.
    """
    path = folder / _MOMENTS
    _check(folder, _MOMENTS)
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state)
    except Exception as error:
        # PyTorch's message advises unsafe loading, which is not passed on
        reason = (str(error).splitlines() or ["it is empty or cut short"])[0]
        reason = "it is damaged, or holds more than tensors" if isinstance(error, pickle.UnpicklingError) else reason
        raise CheckpointError(
            f"{path} cannot be resumed from: {reason}",
            f"start a new run, or remove {folder} to resume from an earlier step",
        ) from error
