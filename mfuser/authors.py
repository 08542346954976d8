"""Checkpoints of the methods' authors: reading without running their code, recognition, and conversion in both directions.

A method's `RELEASES` describe its checkpoints.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mfuser import methods
from mfuser.keys import Source
from mfuser.releases import Release
from mfuser.segmentor import Segmentor


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Result of loading an authors' checkpoint."""

    used: tuple[str, ...]
    dead: tuple[str, ...]  # tensors that the authors' model holds and never reads


class _Inert:
    """Placeholder for an object of the authors' tools (a log's history, a NumPy scalar): accepts anything, does nothing."""

    def __new__(cls, *_: object, **__: object) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


# modules of objects that the authors' trainer stores beside the weights; objects of other modules are refused
_KNOWN_MODULES = ("mmengine", "mmcv", "mmseg", "numpy", "_codecs")


def read_authors(path: Path | str) -> dict[str, torch.Tensor]:
    """Read the `state_dict` of a file that a trainer such as mmcv's or detectron2's wrote, without running any of its code.

    Raises: ValueError for a file that is no such checkpoint, is damaged, or asks for code to be run.
    """
    path = Path(path)
    # files from before torch 1.6 are no archives: only plain tensors are read from those
    archive = zipfile.is_zipfile(path)
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path) if archive else []
        if hostile := sorted(name for name in foreign if name.partition(".")[0] not in _KNOWN_MODULES):
            raise ValueError(f"{path} asks to run {', '.join(hostile)}, which no checkpoint needs; it was not loaded")
        inert: list[Any] = [(_Inert, name) for name in foreign]
        with torch.serialization.safe_globals(inert):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        # PyTorch's message advises unsafe loading, which is not passed on
        reason = (
            "it is damaged, or holds more than tensors"
            if isinstance(error, pickle.UnpicklingError)
            else (str(error).splitlines() or [type(error).__name__])[0][:200]
        )
        raise ValueError(f"{path} cannot be read as a PyTorch checkpoint: {reason}") from None
    # mmcv and mmengine say `state_dict`, detectron2 `model`, FAMix `model_state`
    names = ("state_dict", "model", "model_state")
    state = next((content[name] for name in names if name in content), content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no `state_dict` of tensors; a checkpoint of the authors' trainer is expected")
    return {str(key): value for key, value in state.items()}


def recognise(state: Mapping[str, torch.Tensor]) -> list[tuple[str, Release]]:
    """Return the method and release that a checkpoint belongs to, recognised by its tensors' names.

    Returns: several where a checkpoint leaves out what would tell them apart, as one without its frozen tower does. A release
        whose marks are only some of another's that fits is left out: the other tells more.

    Raises: ValueError if it is of none.
    """
    known = [(name, release) for name in methods.names() for release in methods.releases(name)]
    found = [(name, release) for name, release in known if release.marked(state)]
    if not found:
        kinds = ", ".join(dict.fromkeys(f"`{name}`" for name, _ in known))
        raise ValueError(
            f"is not a checkpoint that the authors of {kinds} published: the tensors that tell it are not among its "
            f"{len(state)} ({', '.join(sorted(state)[:3])}, ...)"
        )
    return [(name, release) for name, release in found if not any(set(release.marks) < set(r.marks) for _, r in found)]


def _fullest(release: Release, others: Iterable[Release]) -> Release:
    """Return the release with the most marks among those with the same options."""
    return max((other for other in others if other.options == release.options), key=lambda other: len(other.marks))


def load_authors_checkpoint(model: Segmentor, state: Mapping[str, torch.Tensor]) -> LoadReport:
    """Load the tensors of an authors' checkpoint into a model; nothing is changed unless all fit.

    Args:
        model: as `build` makes it, with the options of one of its method's `RELEASES`. If the release says that the checkpoint
            leaves out a frozen tower, it must be built with `weights="published"`.
        state: the checkpoint's `state_dict`.

    Raises: ValueError for other options than the release's, or naming tensors that are missing, unknown, or of another shape.
    """
    release = release_of(model, state)
    target = model.state_dict()
    sources = sources_of(model, release, target)
    used = {key for source in sources.values() for key in source.keys}
    missing = sorted(used - set(state))
    dead = sorted(key for key in set(state) - used if release.is_dead(key))
    unknown = sorted(set(state) - used - set(dead))
    if missing or unknown:
        raise ValueError(
            f"this is not an authors' checkpoint of `{model.method}` with {release.named}: {len(missing)} tensors missing "
            f"({', '.join(missing[:3])}), {len(unknown)} unknown ({', '.join(unknown[:3])})"
        )
    empty = [name for name, tensor in target.items() if tensor.is_meta and name not in sources]
    if empty or (release.absent and model.random_towers):
        left = empty or [name for name in target if name not in sources]
        raise ValueError(
            f"the checkpoint leaves out {len(left)} tensors ({', '.join(left[:3])}), as of a frozen tower; "
            'build the model with weights="published"'
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
    """Return the model's tensors by the authors' names, without those that their model holds and never reads.

    Raises: ValueError for options that the authors' code does not have, or would run differently.
    """
    state = model.state_dict()
    written: dict[str, torch.Tensor] = {}
    for name, source in sources_of(model, release_of(model), state).items():
        written |= source.write(state[name])
    return written


def release_of(model: Segmentor, state: Mapping[str, torch.Tensor] | None = None) -> Release:
    """Return the release whose weights fit a model.

    Args:
        state: a checkpoint's; of releases with the same options, which of them it is of.

    Raises: ValueError naming the option that is none of the authors'.
    """
    releases = methods.releases(model.method)
    if not releases:
        raise ValueError(f"the authors of `{model.method}` released no checkpoint that is known here")
    for release in releases:
        for option, (value, why) in release.needs.items():
            if (has := model.options.get(option, value)) != value:
                raise ValueError(
                    f"the authors' weights are those of {option} `{value}`, not of `{has}`, {why}; "
                    f'build the model with {option}="{value}"'
                )
    fitting = [row for row in releases if all(model.options.get(option) == value for option, value in row.options.items())]
    if fitting:
        marked = [row for row in fitting if state is not None and row.marked(state)]
        return _fullest(fitting[0], marked) if marked else fitting[0]
    mine = " + ".join(str(model.options.get(option)) for option in releases[0].options)
    raise ValueError(
        f"the authors released no `{model.method}` with {mine}; there are: {', '.join(release.named for release in releases)}"
    )


def sources_of(model: Segmentor, release: Release, names: Iterable[str]) -> dict[str, Source]:
    """Return the key of each of a model's tensors in a release's checkpoint, for those that are in it."""
    towers = methods.towers(model.method)
    absent = tuple(f"{path}." for option in release.absent for path in towers[option].values())
    found = {name: release.source(name) for name in names if not name.startswith(absent) or release.is_beside(name)}
    return {name: source for name, source in found.items() if source is not None}
