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
from typing import Any

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
    "dinov2_l_reg4": HubFile("timm/vit_large_patch14_reg4_dinov2.lvd142m", "model.safetensors", 1.2, "Apache-2.0"),
    "dinov3_l": HubFile("timm/vit_large_patch16_dinov3.lvd1689m", "model.safetensors", 1.2, "DINOv3"),
    "eva02": HubFile("timm/eva02_large_patch14_clip_336.merged2b_s6b_b61k", "open_clip_model.safetensors", 1.7, "MIT"),
    "clip": HubFile("timm/vit_large_patch14_clip_336.openai", "open_clip_model.safetensors", 1.7, "MIT"),
    "siglip": HubFile("timm/ViT-L-16-SigLIP-384", "open_clip_model.safetensors", 2.6, "Apache-2.0"),
    "siglip2": HubFile("timm/ViT-L-16-SigLIP2-512", "open_clip_model.safetensors", 3.5, "Apache-2.0"),
    "tiny": None,  # trained from scratch, like the next
    "small": None,
}
# vocabularies that open_clip does not bring along; open_clip's configuration of the tower names the repository
TOKENIZERS: dict[str, HubFile] = {
    "siglip": HubFile("timm/ViT-B-16-SigLIP", "tokenizer.json", 0.0024, "Apache-2.0"),
    "siglip2": HubFile("timm/ViT-L-16-SigLIP2-512", "tokenizer.json", 0.034, "Apache-2.0"),
}


def files(tower: str) -> list[HubFile]:
    """The files that a tower is loaded from: weights, and the tokenizer's vocabulary where it is a file of its own."""
    return [row for row in (hub_file(tower), TOKENIZERS.get(tower)) if row is not None]


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
        row = hub_file(tower)
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


def hub_file(tower: str) -> HubFile | None:
    """Where a tower's weights are, None if it has none; of a `timm:<model>`, where timm says.

    Raises: ValueError for an unknown tower, and for a model that timm has no weights of.
    """
    if tower in WEIGHTS:
        return WEIGHTS[tower]
    if not tower.startswith("timm:"):
        raise ValueError(f"unknown tower `{tower}`; choose from {', '.join(sorted(WEIGHTS))}, or timm:<model>")
    import timm

    model = tower.removeprefix("timm:")
    described = timm.get_pretrained_cfg(model)
    if not described or not described.hf_hub_id:
        raise ValueError(f"timm has no weights of `{model}` on the Hub; build it with pretrained=False")
    with unfilled():
        size = sum(4 * p.numel() for p in timm.create_model(model).parameters()) / 1e9
    return HubFile(described.hf_hub_id, "model.safetensors", float(f"{size:.2g}"), described.license or "see its page")


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
        # timm derives buffers from learned rotary frequencies as it builds
        if parameter is not None and name != "freqs":
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
            # towers with registers keep positions of their patches alone
            prefix = 0 if getattr(module, "no_embed_class", False) else getattr(module, "num_prefix_tokens", 0)
            embed: Any = getattr(module, "patch_embed", None)
            grid = embed.grid_size if embed is not None else None
            value = fitted(tower, name, value, target, prefix, grid)
            if value.shape != target.shape:
                raise ValueError(f"{file}: {source.keys[0]} is {tuple(value.shape)}, `{tower}` needs {tuple(target.shape)}")
            values[name] = value.to(torch.float32).contiguous()
        module.load_state_dict(values, strict=False, assign=True)
    return {name: value for name, value in state.items() if value.numel() == 1}


def fitted(tower: str, name: str, value: Tensor, target: Tensor, prefix: int,
           grid: tuple[int, int] | None = None) -> Tensor:  # fmt: skip
    """Resample a published tensor to our grid (None: a square), kernel or context length; without antialiasing, as released."""
    mode = "bilinear" if tower in ("clip", "siglip", "siglip2") else "bicubic"
    if name == "pos_embed":
        side = round((target.shape[1] - prefix) ** 0.5)
        return resampled_positions(value.reshape(-1, value.shape[-1]), grid or (side, side), prefix, mode)[None]
    if name == "patch_embed.proj.weight" and value.shape[2:] != target.shape[2:]:
        return F.interpolate(value.float(), target.shape[2:], mode=mode, align_corners=False)
    if name == "positional_embedding":
        return value[: len(target)]
    return value.reshape(target.shape) if value.numel() == target.numel() else value


def resampled_positions(table: Tensor, grid: tuple[int, int], prefix: int, mode: str) -> Tensor:
    """Position table (prefix + s*s, C) of a square grid to (prefix + rows * columns, C); class rows are kept.

    Raises: ValueError if the table is not a square's.
    """
    side = round((len(table) - prefix) ** 0.5)
    if side**2 != len(table) - prefix:
        raise ValueError(f"published positions are of a square grid; {len(table) - prefix} are no square")
    if (side, side) == tuple(grid):
        return table
    cells = table[prefix:].float().T.reshape(1, -1, side, side)
    cells = F.interpolate(cells, tuple(grid), mode=mode, align_corners=False)
    return torch.cat([table[:prefix].float(), cells.flatten(2)[0].T])
