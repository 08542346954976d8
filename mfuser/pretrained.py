"""Towers' published weights: where they come from, what to say when they are not here, and how they get into a model.

A large tower is built with its parameters on the meta device (`unfilled`): no memory, no random draws. It is then
filled from a file (`load_tower`, or a checkpoint), or drawn cheaply (`fill`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.keys import published


@dataclass(frozen=True)
class HubFile:
    """One file on the Hugging Face Hub."""

    repo: str
    file: str
    gigabytes: float  # about: what the Hub states is what a download is held against
    licence: str = "see its page"

    @property
    def size(self) -> str:
        """About how large it is, as `1.7 GB`."""
        return f"{self.gigabytes:g} GB" if self.gigabytes >= 0.1 else f"{1000 * self.gigabytes:.2g} MB"

    @property
    def where(self) -> Path | None:
        """The file in the local Hub cache, or None."""
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.repo, self.file)
        return Path(path) if isinstance(path, str) and os.path.exists(path) else None

    def __str__(self) -> str:
        return f"{self.repo}/{self.file} ({self.size})"


WEIGHTS: dict[str, HubFile | None] = {
    "dinov2_l": HubFile("timm/vit_large_patch14_dinov2.lvd142m", "model.safetensors", 1.2, "Apache-2.0"),
    "eva02": HubFile("timm/eva02_large_patch14_clip_336.merged2b_s6b_b61k", "open_clip_model.safetensors", 1.7, "MIT"),
    "clip": HubFile("timm/vit_large_patch14_clip_336.openai", "open_clip_model.safetensors", 1.7, "MIT"),
    "siglip": HubFile("timm/ViT-L-16-SigLIP-384", "open_clip_model.safetensors", 2.6, "Apache-2.0"),
    "tiny": None,  # trained from scratch, like the next
    "small": None,
}
# vocabularies that open_clip does not bring along; open_clip's configuration of the tower names the repository
TOKENIZERS: dict[str, HubFile] = {
    "siglip": HubFile("timm/ViT-B-16-SigLIP", "tokenizer.json", 0.0024, "Apache-2.0"),
}


def files(tower: str) -> list[HubFile]:
    """The files that a tower is loaded from: weights, and the tokenizer's vocabulary where it is a file of its own."""
    return [row for row in (WEIGHTS[tower], TOKENIZERS.get(tower)) if row is not None]


class WeightsNotFound(ValueError):
    """Pretrained weights are not on this machine, or not whole."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(f"{message}; {hint}")
        self.message, self.hint = message, hint


def require(towers: Sequence[str]) -> dict[str, Path]:
    """Paths of the towers' weights in the local Hub cache.

    Raises: WeightsNotFound naming every missing file, its size, and how to get it.
    """
    found: dict[str, Path] = {}
    missing: dict[str, list[HubFile]] = {}
    for tower in dict.fromkeys(towers):
        row = WEIGHTS[tower]
        if row is None:
            continue
        if path := row.where:
            found[tower] = path
        else:
            missing[tower] = [file for file in files(tower) if file.where is None]
    if missing:
        listed = ", ".join(str(file) for rows in missing.values() for file in rows)
        raise WeightsNotFound(f"pretrained weights are not on this machine: {listed}", how_to_get(missing))
    return found


def how_to_get(towers: Iterable[str]) -> str:
    """What to do about towers whose files are not here, with and without a network."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return (
        f"where there is a network, run: dgbench download {' '.join(towers)} (the files go to {HF_HUB_CACHE}; copy that "
        "folder to a machine without one, or point HF_HUB_CACHE at it)"
    )


@contextmanager
def unfilled() -> Iterator[None]:
    """Within, parameters of new modules are on the meta device; buffers are real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def fill(model: nn.Module) -> None:
    """Give values to the parameters that are still on the meta device: matrices N(0, 0.02), scales 1, biases 0."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                value = torch.empty(parameter.shape, dtype=parameter.dtype)
                if value.dim() > 1:
                    value.normal_(std=0.02)
                else:
                    value.fill_(1.0 if name in ("weight", "gamma") else 0.0)
                module._parameters[name] = nn.Parameter(value, parameter.requires_grad)


def load_tower(tower: str, file: Path, parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Fill modules with a tower's published weights, resampled to the modules' grids as the authors' release does.

    Args:
        parts: our modules by role: `trunk` (timm's image tower), `head` (what follows it), `text` (open_clip's tower).
    Returns: the file's scalars that no part holds, such as SigLIP's `logit_scale` and `logit_bias`.
    Raises: WeightsNotFound for a damaged file, ValueError naming the tensor that is missing or does not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(file)
    except (SafetensorError, OSError) as error:
        raise WeightsNotFound(f"{file} is damaged: {error}", f"delete it and run: dgbench download {tower}") from None
    for part, module in parts.items():
        source_of = published(tower, part)
        values = {}
        for name, target in module.state_dict().items():
            if part == "head" and "adapter" in name:
                continue  # MFuser's own layers, which live there
            source = source_of(name)
            try:
                value = source.read(state)
            except KeyError as error:
                raise ValueError(f"{file} is not `{tower}`: it has no tensor {error}") from None
            value = fitted(tower, name, value, target, getattr(module, "num_prefix_tokens", 0))
            if value.shape != target.shape:
                raise ValueError(f"{file}: {source.keys[0]} is {tuple(value.shape)}, `{tower}` needs {tuple(target.shape)}")
            values[name] = value.to(torch.float32).contiguous()
        module.load_state_dict(values, strict=False, assign=True)
    return {name: value for name, value in state.items() if value.numel() == 1}


def fitted(tower: str, name: str, value: Tensor, target: Tensor, prefix: int) -> Tensor:
    """Resample a published tensor to our grid, kernel or context length; without antialiasing, as released."""
    mode = "bicubic" if tower in ("dinov2_l", "eva02") else "bilinear"
    if name == "pos_embed":
        return resampled_positions(value.reshape(-1, value.shape[-1]), target.shape[1] - prefix, prefix, mode)[None]
    if name == "patch_embed.proj.weight" and value.shape[2:] != target.shape[2:]:
        return F.interpolate(value.float(), target.shape[2:], mode=mode, align_corners=False)
    if name == "positional_embedding":
        return value[: len(target)]
    return value.reshape(target.shape) if value.numel() == target.numel() else value


def resampled_positions(table: Tensor, cells: int, prefix: int, mode: str) -> Tensor:
    """Position table (prefix + s*s, C) of a square grid to (prefix + cells, C) of another; class rows are kept.

    Raises: ValueError if either grid is not a square.
    """
    before, after = (round(n**0.5) for n in (len(table) - prefix, cells))
    if before**2 != len(table) - prefix or after**2 != cells:
        raise ValueError(f"published positions are resampled between square grids only, not {len(table) - prefix} to {cells}")
    if before == after:
        return table
    grid = table[prefix:].float().T.reshape(1, -1, before, before)
    grid = F.interpolate(grid, (after, after), mode=mode, align_corners=False)
    return torch.cat([table[:prefix].float(), grid.flatten(2)[0].T])
