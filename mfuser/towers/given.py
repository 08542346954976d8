"""A tower's file that is on this machine already: held against the tower, and put where `HubFile.where` finds it.

A file of weights must hold every tensor that the tower is filled from, in the published shape, and none that is unknown. Where
the Hub states what the file is, its hash must be that, too.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mfuser.towers import hub
from mfuser.towers.files import HubFile
from mfuser.towers.hub import DownloadError, Fetched
from mfuser.towers.table import TOWERS, Tower, tower

if TYPE_CHECKING:
    from torch import Tensor, nn

SAFE = (".safetensors",)
TORCH = (".bin", ".pt", ".pth")  # of which tensors alone are read
TOKENIZER = ("tokenizer.json",)


def kind_fits(file: HubFile, path: Path) -> bool:
    """Whether a path has the name of a file of this kind: of weights, or of a tokenizer."""
    return path.name in TOKENIZER if file.file in TOKENIZER else path.suffix in (*SAFE, *TORCH)


def may_be_of_a_tower(path: Path) -> bool:
    """Whether a path has the name of any file that a tower may have."""
    return path.name in TOKENIZER or path.suffix in (*SAFE, *TORCH)


def difference(name: str, file: HubFile, path: Path) -> str | None:
    """Say why a file is not one of a tower's; None if it is. Of safetensors only the head is read, and no pickle is run.

    Args:
        name: a row of TOWERS, or `timm:<model>`.    file: one of its files, which `path` is to stand for.
    """
    if file.file in TOKENIZER:
        return _no_tokenizer(path)
    try:
        state = _read(path, "meta")
    except ValueError as error:
        return str(error)
    from mfuser.towers.loading import published

    used: set[str] = set()
    for part, module in _parts(name).items():
        for own, target in module.state_dict().items():
            if part == "head" and "adapter" in own:
                continue  # MFuser's own layers, which live there
            source = published(name, part)(own)
            if missing := [key for key in source.keys if key not in state]:
                return f"it has no tensor `{missing[0]}`"
            found, wanted = source.read(state).squeeze().shape, target.squeeze().shape
            # a file has a position for each word that its text may have, the tower for those that are used
            fits = found[1:] == wanted[1:] and found[0] >= wanted[0] if own == "positional_embedding" else found == wanted
            if not fits:
                published_as = "x".join(map(str, wanted))
                return f"`{source.keys[0]}` is {'x'.join(map(str, found))}, the tower's is {published_as}"
            used |= set(source.keys)
    # what timm's other models keep beside the tower, as a classifier, is not known here
    dead = TOWERS[name].dead if name in TOWERS else (r"",)
    unknown = sorted(key for key in state if key not in used and not any(re.search(pattern, key) for pattern in dead))
    return f"`{unknown[0]}` is no tensor of the tower's" if unknown else None


def take(name: str, file: HubFile, path: Path) -> Fetched:
    """Copy a file that fits a tower (`difference`) into the local Hub cache; weights in another format become safetensors.

    Raises: DownloadError for a file that is not what the Hub states, where it can be asked; OSError naming what cannot be
        written.
    """
    stated, checked = hub.stated(file), hub.BY_TENSORS
    if stated is not None and path.suffix not in TORCH:
        checked, problem = hub.compared(path, stated)
        if problem:
            raise DownloadError(
                f"{path} is not the published file of `{name}`, {file.repo}/{file.file}: {problem}",
                f"run: dgbench download {name}; or, with DGBENCH_OFFLINE=1, a file is held against the tower's tensors alone",
            )
    place = _put(file, path, stated.commit_hash if stated else None)
    return Fetched(name, "copied", file.repo, file.file, str(place), place.stat().st_size, checked)


def _put(file: HubFile, path: Path, commit: str | None) -> Path:
    """Copy a file into the Hub cache as huggingface_hub lays it out, whole or not at all."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE, f"models--{file.repo.replace('/', '--')}")
    blobs, refs = folder / "blobs", folder / "refs" / "main"
    for needed in (blobs, refs.parent):
        needed.mkdir(parents=True, exist_ok=True)
    partial = blobs / f".{os.getpid()}.partial"
    try:
        if path.suffix in TORCH:
            from mfuser import tensor_files

            tensor_files.write({key: value.contiguous().clone() for key, value in _read(path, "cpu").items()}, partial)
        else:
            shutil.copyfile(path, partial)
        with partial.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
            os.fsync(opened.fileno())
        # by the name that huggingface_hub gives a large file: it will not fetch that once more
        os.replace(partial, blobs / digest)
    finally:
        partial.unlink(missing_ok=True)
    if refs.is_file():
        commit = refs.read_text(encoding="utf-8").strip()
    commit = commit or digest[:40]  # in the form of one: what is published was not asked
    place = folder / "snapshots" / commit / file.file
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(os.path.relpath(blobs / digest, place.parent))
    if not refs.is_file():
        written = refs.with_name(f".{os.getpid()}.partial")
        written.write_text(commit, encoding="utf-8")
        os.replace(written, refs)
    return place


def _parts(name: str) -> dict[str, nn.Module]:
    """Return the parts of a tower as its weights are published: at timm's own size and patch, and without memory."""
    import timm
    import torch

    from mfuser.towers.embedding import EMBEDDINGS
    from mfuser.towers.meta import unfilled
    from mfuser.towers.text import CONTEXT_LENGTH, TextEncoder
    from mfuser.towers.vit import VisionEncoder

    row = tower(name)
    if row.hierarchical:
        from mfuser.towers.mit import MiTEncoder

        return {"trunk": MiTEncoder(name).trunk}
    assert row.timm is not None
    if row.channels:
        return _parts_of_cnn(name, row)
    with torch.random.fork_rng(devices=[]), unfilled():
        embed = timm.create_model(row.timm, pretrained=False, num_classes=0).patch_embed
        image = VisionEncoder(name, embed.img_size, patch=embed.patch_size[0])
        parts: dict[str, nn.Module] = {"trunk": image.trunk}
        if row.text is not None:
            text = TextEncoder(name, torch.zeros(1, CONTEXT_LENGTH, dtype=torch.long))
            parts |= {"head": EMBEDDINGS[row.text.embedding](image, image, text.dim), "text": text.tower}
    return parts


def _parts_of_cnn(name: str, row: Tower) -> dict[str, nn.Module]:
    import timm
    import torch

    from mfuser.towers.clip_resnet import AttentionPooling, CLIPResNetEncoder
    from mfuser.towers.cnn import CNNEncoder
    from mfuser.towers.meta import unfilled
    from mfuser.towers.text import prompt_tower

    with torch.random.fork_rng(devices=[]), unfilled():
        if row.text is None:
            return {"trunk": timm.create_model(row.timm, pretrained=False, num_classes=0, **row.options)}
        if row.clip_resnet:
            return {"trunk": CLIPResNetEncoder(name).trunk, "head": AttentionPooling(name), "text": prompt_tower(name)}
        return {"trunk": CNNEncoder(name).trunk, "text": prompt_tower(name)}


def _read(path: Path, device: str) -> Mapping[str, Tensor]:
    """Return the tensors of a file, on the meta device without reading their values.

    Raises: ValueError for a file that is damaged, or holds more than tensors.
    """
    import torch
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        if path.suffix in TORCH:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            state = content.get("state_dict", content) if isinstance(content, dict) else content
            if not isinstance(state, dict) or not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
                raise ValueError("it holds more than tensors")
            return {str(key): value.to(device) for key, value in state.items()}
        if device != "meta":
            return load_file(path, device)
        with safe_open(path, framework="pt") as opened:
            names = opened.keys()
            return {key: torch.empty(opened.get_slice(key).get_shape(), device="meta") for key in names}
    except (SafetensorError, OSError, RuntimeError, EOFError) as error:
        raise ValueError(f"it cannot be read: {(str(error).splitlines() or [type(error).__name__])[0][:200]}") from None
    except pickle.UnpicklingError:
        # PyTorch advises to load such a file without its guard; that advice is not passed on
        raise ValueError("it is damaged, or holds more than tensors") from None


def _no_tokenizer(path: Path) -> str | None:
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        return f"it is no tokenizer: {(str(error).splitlines() or [''])[0][:200]}"
    return None
