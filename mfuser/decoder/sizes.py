"""Sizes of the decoder that methods share: `full` is the published one, `small` and `tiny` go with towers of those sizes."""

from __future__ import annotations

from typing import Any

from mfuser.towers.table import TOWERS

SIZES: dict[str, dict[str, int]] = {
    "full": {
        "decoder_dim": 256,
        "heads": 8,
        "pixel_layers": 6,
        "mask_layers": 9,
        "ffn_dim": 2048,
        "points": 4,
        "groups": 32,
        "mask_points": 12544,
    },
    "small": {
        "decoder_dim": 128,
        "heads": 8,
        "pixel_layers": 3,
        "mask_layers": 6,
        "ffn_dim": 512,
        "points": 4,
        "groups": 32,
        "mask_points": 4096,
    },
    "tiny": {
        "decoder_dim": 64,
        "heads": 4,
        "pixel_layers": 1,
        "mask_layers": 3,
        "ffn_dim": 128,
        "points": 2,
        "groups": 8,
        "mask_points": 1024,
    },
}


def sizes_for(tower: str) -> dict[str, int]:
    """Return the sizes that go with a tower."""
    return SIZES[TOWERS[tower].size] if tower in TOWERS else SIZES["full"]


def complete(options: Any, tower: str) -> None:
    """Set the sizes that a method's frozen Options leave at None to those that go with a tower."""
    for name, value in sizes_for(tower).items():
        if getattr(options, name) is None:
            object.__setattr__(options, name, value)


def chosen(options: Any) -> dict[str, int]:
    """Return the sizes of a method's Options, by name."""
    return {name: getattr(options, name) for name in SIZES["full"]}
