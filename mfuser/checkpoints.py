"""Models on disk.

`model.safetensors` holds the weights, `model.json` what rebuilds the structure, and `manifest.json` size and SHA-256 of these
files. Nothing is unpickled and nothing is downloaded: a folder written here is loaded without network, tokenizer or recipe.

With `towers="named"`, frozen towers whose weights are those of a published file are named by its SHA-256 instead of stored, in
the metadata of `model.safetensors` (`mfuser.towers.named`): the SHA-256 of that file still tells one model from another.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mfuser import manifest, methods, tensor_files
from mfuser.methods import build
from mfuser.segmentor import Segmentor
from mfuser.towers import named
from mfuser.towers.named import NamedTower
from mfuser.towers.table import TOWERS

FORMAT = 1
NAMED = 2  # the format of a model whose file does not hold all of it: older versions refuse it by this number
_WEIGHTS, _DESCRIPTION = "model.safetensors", "model.json"
_LARGEST = 1 << 20  # bytes of a description
_LARGEST_NUMBER = 1 << 18  # in a description: more than any side or width, and than the ids of SigLIP2's 256,000 tokens
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is written of a model, on the CPU.

    state: its tensors by name.    frozen: names of the parameters among them that are not trained.
    """

    method: str
    options: Mapping[str, Any]
    classes: tuple[str, ...]
    state: Mapping[str, torch.Tensor]
    frozen: frozenset[str]


def snapshot(model: Segmentor, *, copy: bool = False) -> Snapshot:
    """Return what `save` would write of a model.

    Args:
        copy: later steps of a training do not change it: of what is on the CPU, all but frozen parameters are copied.
    """
    frozen = frozenset(name for name, one in model.named_parameters() if not one.requires_grad)
    state = {}
    for name, tensor in model.model_state().items():
        own = tensor.detach().cpu().contiguous()
        shared = own.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        state[name] = own.clone() if copy and shared and name not in frozen else own
    return Snapshot(model.method, dict(model.options), tuple(model.classes), state, frozen)


def save(
    model: Segmentor,
    folder: Path | str,
    *,
    towers: Literal["stored", "named"] = "stored",
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a model into `folder`, which is created if necessary. The manifest is written last.

    Args:
        towers: "named" leaves out frozen towers that equal, bit for bit, the file on this machine that they come from. Loading
            then needs that file; "stored" needs nothing.
        dtype: of all floating-point tensors in the file; None: as they are.

    Raises: ValueError naming a tensor that is not finite, before anything is written; OSError naming the file that cannot be
        written.
    """
    return write(snapshot(model), folder, towers=towers, dtype=dtype)


def write(
    model: Snapshot,
    folder: Path | str,
    *,
    towers: Literal["stored", "named"] = "stored",
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a snapshot of a model, as `save` does."""
    folder, state = Path(folder), dict(model.state)
    if dtype is not None:
        state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    left_out = _named(model, state) if towers == "named" else []
    for tower in left_out:
        for name in tower.tensors:
            del state[name]
    _refuse_unfinite(state, f"the model `{model.method}` is not saved")
    folder.mkdir(parents=True, exist_ok=True)
    # the manifest of the files that are about to be replaced
    (folder / manifest.NAME).unlink(missing_ok=True)
    weights = folder / ".model.safetensors.tmp"
    try:
        tensor_files.write(state, weights, {named.KEY: named.text_of(left_out)} if left_out else None)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder / _WEIGHTS)) from error
    except SafetensorError as error:
        # it wraps the system's error in a text
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder / _WEIGHTS)) from error
    with weights.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(weights, folder / _WEIGHTS)
    form = NAMED if left_out else FORMAT
    description = {"format": form, "method": model.method, "options": dict(model.options), "classes": list(model.classes)}
    manifest.write(folder / _DESCRIPTION, json.dumps(description, indent=1) + "\n")
    manifest.seal(folder, (_WEIGHTS, _DESCRIPTION))
    return folder


def _named(model: Snapshot, state: Mapping[str, torch.Tensor]) -> list[NamedTower]:
    """Return the towers of a model that need not be stored."""
    frozen = {name: state[name] for name in state if name in model.frozen}
    found = []
    own = methods.backbone_names(model.method) - TOWERS.keys()  # a method's own trunks have no files
    for option, parts in methods.towers(model.method, model.options).items():
        tower = model.options[option]
        if tower not in own and (one := named.of_tower(tower, parts, frozen)) is not None:
            found.append(one)
            frozen = {name: value for name, value in frozen.items() if name not in one.tensors}
    return found


_STEP = re.compile(r"step-(\d{1,18})", re.ASCII)


def steps(run: Path | str) -> list[Path]:
    """Return the complete checkpoints of a run's folder, `checkpoint/step-000200`, the newest last; other names are skipped."""
    found = [path for path in (Path(run) / "checkpoint").glob("step-*") if step_of(path) >= 0 and path.is_dir()]
    return sorted(found, key=lambda path: (step_of(path), path.name))


def step_of(folder: Path) -> int:
    """Return the step in the name of a checkpoint's folder; -1 if the name has none."""
    found = _STEP.fullmatch(folder.name)
    return int(found[1]) if found else -1


def load(folder: Path | str) -> Segmentor:
    """Rebuild a model, in evaluation mode: a trainer calls `.train()`.

    Its files are compared with the manifest that `save` wrote; folders of older versions have none and cause a warning.

    Args:
        folder: one that `save` wrote, or a run's, whose newest checkpoint it is.

    Raises: ValueError naming the file and what does not fit: damaged, of another model, not finite; WeightsNotFound, a kind of
        it, for the file of a tower that is named and not here.
    """
    folder = Path(folder)
    if not (folder / _DESCRIPTION).is_file() and (complete := steps(folder)):
        folder = complete[-1]
    method, options, classes = _described(folder)
    path, (state, towers) = folder / _WEIGHTS, _weights(folder)
    try:
        # random weights would only be overwritten
        model = build(method, weights="meta", **options)
    except Exception as error:  # a changed description can cause any error
        if "allocate memory" in str(error) or isinstance(error, MemoryError):
            raise
        raise ValueError(f"{folder / _DESCRIPTION} describes no model: {_first_line(error)}") from None
    if list(model.classes) != classes:
        raise ValueError(f"{folder / _DESCRIPTION} names other classes than `{method}` has")
    state |= _of_towers(model, towers, path)
    _check(model, state, path)
    model.load_state_dict(state, assign=True)
    return model.eval()


def load_weights(model: Segmentor, folder: Path | str) -> None:
    """Load the weights of a saved model of the same method with tensors of the same names and shapes into a model.

    Args:
        folder: one that `save` wrote.

    Raises: ValueError as `load`, and naming the other method or the tensors that do not fit; nothing is changed then.
    """
    folder = Path(folder)
    method, _, _ = _described(folder)
    if method != model.method:
        raise ValueError(f"{folder} holds a model of `{method}`, not of `{model.method}`")
    path, (state, towers) = folder / _WEIGHTS, _weights(folder)
    state |= _of_towers(model, towers, path)
    _check(model, state, path)
    model.load_state_dict(state)


def _weights(folder: Path) -> tuple[dict[str, torch.Tensor], list[NamedTower]]:
    """Read what a model's file holds, and what it says of the towers that it leaves out."""
    path = folder / _WEIGHTS
    if not path.is_file():
        raise ValueError(f"{folder} holds no weights: there is no {_WEIGHTS}")
    if not manifest.check(folder, _WEIGHTS):
        _log.warning("%s has no %s, as in older versions: damage to its files cannot be detected", folder, manifest.NAME)
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    _refuse_unfinite(state, str(path))
    return state, named.in_file(path)


def _of_towers(model: Segmentor, towers: list[NamedTower], path: Path) -> dict[str, torch.Tensor]:
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found: dict[str, torch.Tensor] = {}
    for tower in towers:
        if tower.tower not in model.options.values():
            raise ValueError(f"{path} is damaged: it names the tower `{tower.tower[:80]}`, which the model has not")
        found |= named.read(tower, shapes, path)
    return found


def towers_needed(folder: Path | str) -> list[str]:
    """Return the names of the towers whose files are needed to load a saved model and are not on this machine.

    Raises: ValueError if its file is damaged, OSError if it cannot be read.
    """
    return [one.tower for one in named.missing(named.in_file(Path(folder) / _WEIGHTS))]


def _described(folder: Path) -> tuple[str, dict[str, Any], object]:
    """Read method, options and classes of a saved model."""
    path = folder / _DESCRIPTION
    try:
        text = manifest.read_text(path, _LARGEST)
    except FileNotFoundError:
        raise ValueError(
            f"{folder} holds no model: there is no {_DESCRIPTION} and no checkpoint/step-*; give a folder that mfuser.save "
            "wrote, or a run's"
        ) from None
    manifest.check(folder, _DESCRIPTION)
    try:
        description = json.loads(text, parse_constant=_no_number)
        form, method, options = description["format"], description["method"], description["options"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {_first_line(error)}") from None
    if type(form) is not int or form not in (FORMAT, NAMED):
        raise ValueError(f"{path} has format {form!r:.40}; this version reads {FORMAT} and {NAMED}")
    if not isinstance(method, str) or not isinstance(options, dict):
        raise ValueError(f"{path} is damaged: `method` must be a name and `options` an object")
    try:
        given = _as_declared(method, options)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} describes no model: {_first_line(error)}") from None
    return method, given, description.get("classes")


def _as_declared(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a method with their declared types and within the limits of any model.

    Raises: ValueError naming the option that is not.
    """
    declared = get_type_hints(methods.options(method))
    given = {}
    for name, value in options.items():
        if name not in declared:
            raise ValueError(f"`{method}` has no option `{name[:40]}`")
        pair = get_origin(declared[name]) is tuple and isinstance(value, list)
        given[name] = tuple(value) if pair else value
        if not _fits(given[name], declared[name]):
            raise ValueError(f"{name} is {value!r:.40}, which is not {getattr(declared[name], '__name__', declared[name])}")
    return given


def _fits(value: Any, kind: Any) -> bool:
    parts = get_args(kind)
    if get_origin(kind) in (UnionType, Union):
        return any(_fits(value, part) for part in parts)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(item, parts[0]) for item in value)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(_fits, value, parts))
    if kind is int:
        return type(value) is int and 0 <= value < _LARGEST_NUMBER
    if kind is float:
        return type(value) in (int, float) and abs(value) < _LARGEST_NUMBER
    return type(value) is kind


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _first_line(error: BaseException) -> str:
    return f"{(str(error).splitlines() or [type(error).__name__])[0]:.200}"


def _refuse_unfinite(state: Mapping[str, torch.Tensor], where: str) -> None:
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise ValueError(f"{where}: {name} holds {count:,} values of {tensor.numel():,} that are not finite")


def _check(model: Segmentor, state: dict[str, torch.Tensor], path: Path) -> None:
    expected = model.state_dict()
    missing, extra = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    if missing or extra:
        raise ValueError(
            f"{path} is not a checkpoint of `{model.method}` with these options: {len(missing)} tensors missing "
            f"({', '.join(missing[:3])}), {len(extra)} unknown ({', '.join(extra[:3])})"
        )
    for name, tensor in expected.items():
        if tensor.shape != state[name].shape:
            raise ValueError(f"{path}: {name} is {tuple(state[name].shape)}, expected {tuple(tensor.shape)}")
