"""Reading the numbers recorded from the authors' code; see goldens/README.md."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from named_weights import named_input, named_tensor, sample_index
from safetensors.torch import load_file
from torch import Tensor, nn

import mfuser
from mfuser.towers.meta import unfilled

FOLDER = Path(__file__).parent / "goldens"
VARIANTS = {"eva": "eva02", "clip": "clip", "siglip": "siglip"}  # the goldens' name -> our tower's


def numbers(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


def description(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return found


@functools.cache
def without_values(vlm: str, variant: str = "release") -> mfuser.Segmentor:
    """MFuser at full size with a released tower, its parameters on the meta device; built once, so tests leave it as it is."""
    released = next(golden for golden, ours in VARIANTS.items() if ours == vlm)
    ids = description(f"layout_{released}")["tokens"]
    with unfilled():
        return mfuser.build("mfuser", vlm=vlm, vfm="dinov2_l", variant=variant, token_ids=ids, weights="meta")


def relative_error(goldens: Mapping[str, Tensor], name: str, value: Tensor) -> float:
    """Relative L2 error on what the golden stores: the whole tensor, or samples of it at places that its name gives."""
    expected = goldens[name].double().flatten()
    actual = value.detach().cpu().double().flatten()
    if len(expected) < len(actual):
        actual = actual[torch.from_numpy(sample_index(name, len(actual), len(expected)))]
    assert actual.shape == expected.shape, name
    return float((actual - expected).norm() / expected.norm())


def noise(name: str, *shape: int) -> Tensor:
    return torch.from_numpy(named_input(name, shape, "noise"))


def fill_by_name(module: nn.Module, prefix: str) -> None:
    """Give every parameter the values of its name."""
    for name, parameter in module.named_parameters():
        parameter.data = torch.from_numpy(named_tensor(f"{prefix}.{name}", tuple(parameter.shape))).reshape(parameter.shape)


class AuthorsWeights(Mapping[str, Tensor]):
    """A checkpoint of the authors' full-size model whose values are functions of their names, made when asked for."""

    def __init__(self, variant: str) -> None:
        self.keys_of = description(f"layout_{variant}")["keys"]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_of)

    def __len__(self) -> int:
        return len(self.keys_of)

    def __getitem__(self, key: str) -> Tensor:
        row = self.keys_of[key]
        if row["named"]:
            return torch.from_numpy(named_tensor(key, row["shape"]))
        return torch.zeros(row["shape"], dtype=getattr(torch, row["dtype"]))
