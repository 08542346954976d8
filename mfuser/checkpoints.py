"""Models on disk: `model.safetensors` with the weights, `model.json` with what rebuilds the structure.

Nothing is unpickled and nothing is fetched: a folder written here is loaded without network, tokenizer or recipe.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mfuser.keys import authors, is_dead
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


def load(folder: Path | str) -> Segmentor:
    """Rebuild a model from a folder that `save` wrote.

    Raises: ValueError naming the file and what does not fit.
    """
    folder = Path(folder)
    try:
        description = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        form, method, options = description["format"], description["method"], description["options"]
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no model: there is no model.json") from None
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
    return model


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What became of a foreign checkpoint's tensors."""

    used: tuple[str, ...]
    dead: tuple[str, ...]  # tensors that the authors' model holds and never reads


def load_authors_checkpoint(model: Segmentor, state: Mapping[str, torch.Tensor]) -> LoadReport:
    """Fill an MFuser with the tensors of one of the authors' checkpoints; nothing is changed unless all fits.

    Args:
        model: as `build("mfuser", vlm=...)` makes it, of the same towers.    state: the checkpoint's `state_dict`.

    Raises: ValueError for the variant `sane`, or naming tensors that are missing, unknown, or of another shape.
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
        values[name] = value.reshape(target[name].shape).contiguous()
    model.load_state_dict(values, strict=False, assign=True)
    return LoadReport(tuple(sorted(used)), tuple(dead))


def to_authors_state_dict(model: Segmentor) -> dict[str, torch.Tensor]:
    """The model's tensors by the authors' names, without those that their model holds and never reads.

    Raises: ValueError for the variant `sane`, which their code would run otherwise.
    """
    _as_released(model)
    state = model.state_dict()
    written: dict[str, torch.Tensor] = {}
    for name, source in authors(str(model.options.get("vlm")), state).items():
        written |= source.write(state[name])
    return written


def _as_released(model: Segmentor) -> None:
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
