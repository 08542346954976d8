"""Frozen tensors that a model's file leaves out: it names the published file of their tower by its SHA-256.

What is written of a tower is enough to read its tensors again, whatever later versions do when they build one: the names in
the published file, whether they are transposed, and the type. Only exact copies are left out; positions and patch kernels that
were resampled are stored, since an interpolation need not round alike everywhere. A tower of which any other frozen tensor
differs from the file, as after a training or with random weights, is stored whole.

Importing this needs no torch.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mfuser.keys import Source
from mfuser.towers.files import HubFile, PackagedFile
from mfuser.towers.weights import WeightsNotFound, how_to_get, hub_file

if TYPE_CHECKING:
    from torch import Tensor

KEY = "towers"  # in the metadata of a model's file
_TYPES = ("float32", "float16", "bfloat16", "float64")
_OF_ANOTHER_GRID = "pos_embed"  # resampled to it, perhaps without another number of values


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of a model is in a tower's file: its values there in fp32, brought to the model's shape, then to `dtype`."""

    source: Source
    dtype: str = "float32"


@dataclass(frozen=True, slots=True)
class NamedTower:
    """The tensors of a model that are in the file of one tower."""

    tower: str  # a row of TOWERS, or `timm:<model>`
    file: str  # its name on the Hub or in this package, for messages
    sha256: str  # its content
    values: int  # numbers in all these tensors
    tensors: Mapping[str, Place]  # by the model's names


def of_tower(tower: str, parts: Mapping[str, str], frozen: Mapping[str, Tensor]) -> NamedTower | None:
    """Return which frozen tensors of a model are copies from the file of a tower; None if it is stored whole.

    Args:
        parts: part of the tower -> path of its module in the model.    frozen: the model's frozen parameters by name.
    """
    import torch
    from safetensors import SafetensorError

    from mfuser.towers.loading import contents, published

    own = {name: (part, at) for name in frozen for part, at in parts.items() if name.startswith(f"{at}.")}
    try:
        row = hub_file(tower) if own else None
    except ValueError:
        return None  # a model of timm's without weights
    path = row.where if row is not None else None
    if row is None or path is None:
        return None
    try:
        digest, state = _digest(path), contents(path)
    except (OSError, SafetensorError):
        return None  # a training must not end because of a file that it does not need
    tensors, values = {}, 0
    for name, (part, at) in own.items():
        short, value = name.removeprefix(f"{at}."), frozen[name]
        source = published(tower, part)(short)
        kind = str(value.dtype).removeprefix("torch.")
        if kind not in _TYPES or any(key not in state for key in source.keys):
            continue  # what a method adds to the tower
        try:
            theirs = source.read(state)
        except RuntimeError:
            return None  # a file of that name, but not of this tower
        other_size = theirs.numel() != value.numel()
        if not other_size and torch.equal(_bits(_as(theirs, value.shape, value.dtype)), _bits(value)):
            tensors[name] = Place(source, kind)
            values += value.numel()
        elif not other_size and short != _OF_ANOTHER_GRID:
            return None
    return NamedTower(tower, _called(row), digest, values, tensors) if tensors else None


def read(named: NamedTower, shapes: Mapping[str, Sequence[int]], where: Path) -> dict[str, Tensor]:
    """Return a model's tensors that are in the file of a tower, whose SHA-256 is compared.

    Args:
        shapes: of all the model's tensors, by name.    where: the model's file, for messages.

    Raises: WeightsNotFound naming the tower's file and its hash if that is not here; ValueError for names that are not in it.
    """
    import torch
    from safetensors import SafetensorError

    from mfuser.towers.loading import contents

    path = _found(named, where)
    try:
        state = contents(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    values = {}
    for name, place in named.tensors.items():
        if name not in shapes:
            raise ValueError(f"{where} names `{named.tower}` for `{name[:80]}`, which the model has not")
        try:
            values[name] = _as(place.source.read(state), shapes[name], getattr(torch, place.dtype)).contiguous()
        except (KeyError, RuntimeError) as error:
            if "allocate memory" in str(error):
                raise
            raise ValueError(f"{where}: {name} is not in {path} as it says: {str(error)[:100]}") from None
    return values


def in_file(path: Path) -> list[NamedTower]:
    """Return the towers that a model's file names; only its head is read.

    Raises: ValueError if the file is damaged, OSError if it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as opened:
            metadata: dict[str, str] = opened.metadata() or {}
        return parsed(metadata[KEY]) if KEY in metadata else []
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def text_of(towers: Sequence[NamedTower]) -> str:
    """Return what is written of towers: JSON that `parsed` reads."""
    rows = [
        {
            "tower": one.tower,
            "file": one.file,
            "sha256": one.sha256,
            "values": one.values,
            "tensors": {name: _row(place) for name, place in one.tensors.items()},
        }
        for one in towers
    ]
    return json.dumps(rows)


def parsed(text: str) -> list[NamedTower]:
    """Read what `text_of` wrote; nothing in it is trusted.

    Raises: ValueError saying what is wrong.
    """
    try:
        return [_tower(row) for row in _typed(json.loads(text), list)]
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"what it says of its towers is not in their form: {str(error)[:100]}") from None


def missing(towers: Sequence[NamedTower]) -> list[NamedTower]:
    """Return the towers whose files are not on this machine; the hashes of those that are there are not compared."""
    return [one for one in towers if not _candidates(one)]


def _row(place: Place) -> dict[str, Any]:
    row: dict[str, Any] = {"keys": list(place.source.keys)}
    if place.source.transposed:
        row["transposed"] = True
    return row if place.dtype == "float32" else {**row, "dtype": place.dtype}


def _tower(row: Any) -> NamedTower:
    tensors = {name: _place(place) for name, place in _typed(row["tensors"], dict).items()}
    tower, file, sha256 = (_typed(row[key], str) for key in ("tower", "file", "sha256"))
    return NamedTower(tower, file, sha256, _typed(row["values"], int), tensors)


def _place(row: Any) -> Place:
    keys = tuple(_typed(key, str) for key in _typed(row["keys"], list))
    dtype = row.get("dtype", "float32")
    if dtype not in _TYPES or not keys:
        raise TypeError(f"a tensor of type {dtype!r:.20} from {len(keys)} others")
    return Place(Source(keys, transposed=_typed(row.get("transposed", False), bool)), dtype)


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r:.40} is no {kind.__name__}")
    return value


def _called(row: HubFile | PackagedFile) -> str:
    return row.file if isinstance(row, PackagedFile) else f"{row.repo}/{row.file}"


def _candidates(named: NamedTower) -> list[Path]:
    """Return the files that may be the one that is named: an older one stays in the Hub's cache by its hash."""
    try:
        row = hub_file(named.tower)
    except ValueError:
        return []
    blob = row.blob(named.sha256) if isinstance(row, HubFile) else None
    return [path for path in (row.where if row else None, blob) if path is not None]


def _found(named: NamedTower, where: Path) -> Path:
    candidates = _candidates(named)
    other = ""
    for path in candidates:
        # always read: a file that was damaged on the disk must not be taken
        found = _sha256(path)
        if found == named.sha256:
            return path
        other = other or f"; {path} has {found}"
    packaged = "/" not in named.file
    if packaged:
        get = "install the version of dgbench that the model was saved with"
    elif other:
        repo, _, file = named.file.rpartition("/")
        get = f"fetch the revision that has it: hf download {repo} {file} --revision COMMIT"
    else:
        get = how_to_get([named.tower])
    raise WeightsNotFound(
        f"{where} holds no weights of the frozen tower `{named.tower}`; they are those of {named.file} with SHA-256 "
        f"{named.sha256}, which is not on this machine{other}",
        f"{get}; or, where the tower is, write the model with all its weights: dgbench export RUN OUT",
    )


def _as(value: Tensor, shape: Sequence[int], dtype: Any) -> Tensor:
    import torch

    # towers are built in fp32, whatever type their file has
    return value.reshape(tuple(shape)).to(torch.float32).to(dtype)


def _bits(value: Tensor) -> Tensor:
    """Return a tensor's bits as integers: as numbers, 0 and -0 would be equal."""
    import torch

    return value.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()])


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file; of one that has not changed since this process last asked, without reading it again."""
    state = os.stat(path)
    return _digest_of(path, state.st_ino, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _digest_of(path: Path, *_: int) -> str:
    return _sha256(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
