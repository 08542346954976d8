"""Models on disk: `model.safetensors` with the weights, `model.json` with what rebuilds the structure.

Nothing is unpickled and nothing is fetched: a folder written here is loaded without network, tokenizer or recipe.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mfuser.keys import AUTHORS_MARKS, authors, is_dead
from mfuser.methods import build
from mfuser.pretrained import unfilled
from mfuser.segmentor import Segmentor

FORMAT = 1


def save(model: Segmentor, folder: Path | str) -> Path:
    """Write a model into `folder`, which is made if need be. The description comes last: it marks a complete model.

    Raises: OSError naming the file that cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    weights = folder / ".model.safetensors.tmp"
    try:
        save_file(state, weights)
    except SafetensorError as error:
        # it wraps the system's refusal in a text
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder / "model.safetensors")) from error
    with weights.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(weights, folder / "model.safetensors")
    description = {"format": FORMAT, "method": model.method, "options": model.options, "classes": list(model.classes)}
    text = folder / ".model.json.tmp"
    with text.open("w", encoding="utf-8") as out:
        out.write(json.dumps(description, indent=1) + "\n")
        out.flush()
        os.fsync(out.fileno())
    os.replace(text, folder / "model.json")
    return folder


def steps(run: Path | str) -> list[Path]:
    """The complete checkpoints of a run's folder, `checkpoint/step-000200`, the newest last."""
    found = [path for path in (Path(run) / "checkpoint").glob("step-*") if path.is_dir() and path.name[5:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def load(folder: Path | str) -> Segmentor:
    """Rebuild a model, in evaluation mode: a trainer calls `.train()`.

    Args:
        folder: one that `save` wrote, or a run's, whose newest checkpoint it is.

    Raises: ValueError naming the file and what does not fit.
    """
    folder = Path(folder)
    if not (folder / "model.json").is_file() and (complete := steps(folder)):
        folder = complete[-1]
    try:
        description = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        form, method, options = description["format"], description["method"], description["options"]
    except FileNotFoundError:
        raise ValueError(
            f"{folder} holds no model: there is no model.json and no checkpoint/step-*; give a folder that mfuser.save wrote, "
            "or a run's"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'model.json'} is damaged: {error}") from None
    if form != FORMAT:
        raise ValueError(f"{folder / 'model.json'} has format {form}; this version reads {FORMAT}")
    options = {key: tuple(value) if key == "image_size" else value for key, value in options.items()}
    try:
        state = load_file(folder / "model.safetensors")
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no weights: there is no model.safetensors") from None
    except SafetensorError as error:
        raise ValueError(f"{folder / 'model.safetensors'} is damaged: {error}") from None
    # random weights would be drawn only to be overwritten; the caller's generator is left as it was
    with torch.random.fork_rng(devices=[]), unfilled():
        model = build(method, **options, pretrained=False, filled=False)
    _check(model, state, folder / "model.safetensors")
    model.load_state_dict(state, assign=True)
    return model.eval()


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What became of a foreign checkpoint's tensors."""

    used: tuple[str, ...]
    dead: tuple[str, ...]  # tensors that the authors' model holds and never reads


class _Inert:
    """Stands for an object of the authors' tools (a log's history, a NumPy scalar): takes anything, does nothing."""

    def __new__(cls, *_: object, **__: object) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


# what the authors' trainer keeps beside the weights; of other modules nothing is accepted, not even inertly
_KNOWN_MODULES = ("mmengine", "mmcv", "mmseg", "numpy", "_codecs")


def read_authors(path: Path | str) -> dict[str, torch.Tensor]:
    """The `state_dict` of a checkpoint file that mmcv or mmengine wrote, read without running any code of it.

    Raises: ValueError for a file that is no such checkpoint, is damaged, or asks for code to be run.
    """
    path = Path(path)
    # files from before torch 1.6 are no archives: only plain tensors are read from those
    archive = zipfile.is_zipfile(path)
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path) if archive else []
        if hostile := sorted(name for name in foreign if name.partition(".")[0] not in _KNOWN_MODULES):
            raise ValueError(f"{path} asks to run {', '.join(hostile)}, which no checkpoint of MFuser needs; it was not loaded")
        inert: list[Any] = [(_Inert, name) for name in foreign]
        with torch.serialization.safe_globals(inert):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be read as a PyTorch checkpoint: {reason}") from None
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no `state_dict` of tensors; a checkpoint of the authors' trainer is expected")
    return {str(key): value for key, value in state.items()}


def authors_tower(state: Mapping[str, torch.Tensor]) -> str:
    """The vision-language tower of one of the authors' checkpoints, told by its names.

    Raises: ValueError if they fit none.
    """
    for vlm, key in AUTHORS_MARKS.items():
        if key in state:
            return vlm
    raise ValueError(
        f"this is not an authors' checkpoint of MFuser: none of {', '.join(AUTHORS_MARKS.values())} is among its "
        f"{len(state)} tensors ({', '.join(sorted(state)[:3])}, ...)"
    )


def load_authors_checkpoint(model: Segmentor, state: Mapping[str, torch.Tensor]) -> LoadReport:
    """Fill an MFuser with the tensors of one of the authors' checkpoints; nothing is changed unless all fits.

    Args:
        model: as `build("mfuser", vlm=...)` makes it, of the same towers.    state: the checkpoint's `state_dict`.

    Raises: ValueError for the variant `sane` or another fuser, or naming tensors that are missing, unknown, or of another shape.
    """
    _as_released(model)
    target, vlm = model.state_dict(), str(model.options.get("vlm"))
    sources = authors(vlm, target)
    used = {key for source in sources.values() for key in source.keys}
    missing = sorted(used - set(state))
    dead = sorted(key for key in set(state) - used if is_dead(vlm, key))
    unknown = sorted(set(state) - used - set(dead))
    if missing or unknown:
        raise ValueError(
            f"this is not an authors' checkpoint of MFuser with `{vlm}`: {len(missing)} tensors missing "
            f"({', '.join(missing[:3])}), {len(unknown)} unknown ({', '.join(unknown[:3])})"
        )
    values = {}
    for name, source in sources.items():
        value = source.read(state)
        if value.squeeze().shape != target[name].squeeze().shape:
            raise ValueError(f"{source.keys[0]} is {tuple(value.shape)}, expected {tuple(target[name].shape)}")
        values[name] = value.reshape(target[name].shape).to(target[name].dtype).contiguous()
    model.load_state_dict(values, strict=False, assign=True)
    return LoadReport(tuple(sorted(used)), tuple(dead))


def to_authors_state_dict(model: Segmentor) -> dict[str, torch.Tensor]:
    """The model's tensors by the authors' names, without those that their model holds and never reads.

    Raises: ValueError for the variant `sane`, which their code would run otherwise, or a fuser that it has not.
    """
    _as_released(model)
    state = model.state_dict()
    written: dict[str, torch.Tensor] = {}
    for name, source in authors(str(model.options.get("vlm")), state).items():
        written |= source.write(state[name])
    return written


def _as_released(model: Segmentor) -> None:
    if (fuser := model.options.get("fuser", "mvfuser")) != "mvfuser":
        raise ValueError(f'the authors\' weights are those of `mvfuser`, not of `{fuser}`; build the model with fuser="mvfuser"')
    if model.options.get("variant", "release") != "release":
        raise ValueError(
            "the authors' weights were trained with the release's accidents, which the variant "
            f'`{model.options["variant"]}` has not; build the model with variant="release"'
        )


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
