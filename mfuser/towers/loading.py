"""Loading of towers' published weights into a model; `mfuser.towers.weights` knows where they are.

A large tower is built with its parameters on the meta device (`unfilled`): no memory, no random draws. It is then
filled from a file (`load_tower`, or a checkpoint), or drawn cheaply (`fill`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.keys import Source, renamed
from mfuser.lowrank import factors
from mfuser.towers.key_rules import TIMM_FILE
from mfuser.towers.table import TOWERS
from mfuser.towers.weights import WeightsNotFound

VOCABULARY = 49408  # words of CLIP's tokenizer


def fill(model: nn.Module, drawn: Collection[str] = ()) -> None:
    """Give values to the parameters that are still on the meta device: matrices N(0, 0.02), scales 1, biases 0.

    Args:
        drawn: dotted names of others that get such values, too.
    """
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and (parameter.is_meta or f"{path}.{name}".removeprefix(".") in drawn):
                value = torch.empty(parameter.shape, dtype=parameter.dtype)
                if value.dim() > 1:
                    value.normal_(std=0.02)
                else:
                    value.fill_(1.0 if name in ("weight", "gamma") else 0.0)
                module._parameters[name] = nn.Parameter(value, parameter.requires_grad)


def published(tower: str, part: str) -> Callable[[str], Source]:
    """Return the map from our names in a part of a tower (`trunk`, `head`, `text`) to those of its file on the Hub."""
    # a model by its name in timm has timm's own names
    rules = (TOWERS[tower].keys if tower in TOWERS else TIMM_FILE)[part]
    return lambda name: renamed(name, rules)


def load_tower(tower: str, file: Path, parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Fill modules with a tower's published weights, resampled to the modules' grids as the authors' release does.

    Args:
        parts: our modules by role: `trunk` (timm's image tower), `head` (what follows it), `text` (open_clip's tower).
    Returns: the file's scalars that no part holds, such as SigLIP's `logit_scale` and `logit_bias`.
    Raises: WeightsNotFound for a damaged file, ValueError naming the tensor that is missing or does not fit.
    """
    from safetensors import SafetensorError

    try:
        state = contents(file)
    except (SafetensorError, OSError) as error:
        raise WeightsNotFound(f"{file} is damaged: {error}", f"delete it and run: dgbench download {tower}") from None
    for part, module in parts.items():
        values, _ = taken(tower, part, module, state, file)
        module.load_state_dict(values, strict=False, assign=True)
    return {name: value for name, value in state.items() if value.numel() == 1}


def contents(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a tower's file by their published names.

    A word table that has the words of `text.words` alone gets zeros for all others.

    Raises: SafetensorError, OSError.
    """
    from safetensors.torch import load_file

    state = load_file(file)
    if (words := state.pop("text.words", None)) is None:
        return state
    rows = state["text.token_embedding.weight"]
    table = rows.new_zeros(VOCABULARY, rows.shape[1])
    table[words] = rows
    return state | {"text.token_embedding.weight": table}


def taken(
    tower: str, part: str, module: nn.Module, state: Mapping[str, Tensor], file: Path
) -> tuple[dict[str, Tensor], set[str]]:
    """Return the tensors of a part of a tower from its published file, and the file's names that they come from.

    Raises: ValueError naming the tensor that is missing or does not fit.
    """
    source_of = published(tower, part)
    added = {f"{path}.{name}" for path, part_ in module.named_modules() for name in getattr(part_, "unpublished", ())}
    ours = {*factors(module), *added}
    values, used = {}, set()
    for name, target in module.state_dict().items():
        if name in ours or (part == "head" and "adapter" in name):
            continue  # what a method adds: low-rank factors, what its modules name; MFuser's own layers in this module
        source = source_of(name)
        if name.endswith("num_batches_tracked") and source.keys[0] not in state:
            continue  # batch norms count their batches, which older files leave out and evaluation does not read
        try:
            value = source.read(state)
        except KeyError as error:
            raise ValueError(f"{file} is not `{tower}`: it has no tensor {error}") from None
        # towers with registers have position embeddings for patches only
        prefix = 0 if getattr(module, "no_embed_class", False) else getattr(module, "num_prefix_tokens", 0)
        embed: Any = getattr(module, "patch_embed", None)
        grid = embed.grid_size if embed is not None else None
        value = fitted(tower, name, value, target, prefix, grid)
        if value.shape != target.shape:
            raise ValueError(f"{file}: {source.keys[0]} is {tuple(value.shape)}, `{tower}` needs {tuple(target.shape)}")
        values[name] = value.to(torch.float32 if target.is_floating_point() else target.dtype).contiguous()
        used |= set(source.keys)
    return values, used


def fitted(tower: str, name: str, value: Tensor, target: Tensor, prefix: int, grid: tuple[int, int] | None = None) -> Tensor:
    """Resample a published tensor to our grid (None: a square), kernel or context length; without antialiasing, as released."""
    mode = TOWERS[tower].resample if tower in TOWERS else "bicubic"
    if name == "pos_embed":
        side = round((target.shape[1] - prefix) ** 0.5)
        return resampled_positions(value.reshape(-1, value.shape[-1]), grid or (side, side), prefix, mode)[None]
    if name == "patch_embed.proj.weight" and value.shape[2:] != target.shape[2:]:
        return F.interpolate(value.float(), target.shape[2:], mode=mode, align_corners=False)
    if name == "positional_embedding":
        return value[: len(target)]
    return value.reshape(target.shape) if value.numel() == target.numel() else value


def resampled_positions(table: Tensor, grid: tuple[int, int], prefix: int, mode: str) -> Tensor:
    """Resample a square grid's position table (prefix + s*s, C) to (prefix + rows * columns, C); class rows are kept.

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
