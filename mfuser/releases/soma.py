"""SoMA's checkpoints: low-rank factors, all biases of the tower and the head; those of a training hold the tower, too.

Where the blocks are not adapted, their one layer of queries, keys and values may be three in a file, or one.
"""

from __future__ import annotations

import re
from functools import partial

from mfuser.keys import Source, renamed
from mfuser.releases import Release
from mfuser.releases.mmdet import MASK2FORMER
from mfuser.towers.key_rules import Rules

_TRUNK = "vfm.trunk."
_FACTORS: Rules = [(r"\.lora_a$", ".lora_A.weight"), (r"\.lora_b$", ".lora_B.weight")]
_FIRST = 8  # block that is adapted


def _source(split: bool, name: str) -> Source:
    if not name.startswith(_TRUNK):
        return renamed(name, MASK2FORMER)
    block = re.match(r"blocks\.(\d+)\.", name.removeprefix(_TRUNK))
    apart = split or (block is not None and int(block[1]) >= _FIRST)
    rules: Rules = [(r"\.attn\.qkv\.", ".attn.{q,k,v}.")] if apart else []
    return renamed(name.removeprefix(_TRUNK), [*_FACTORS, *rules, (r"^", "backbone.model.")])


RELEASES = tuple(
    Release(
        options={"vfm": "dinov2_l"},
        recipe="soma/dinov2_l-gta",
        marks=("backbone.model.blocks.8.attn.q.lora_A.weight", f"backbone.model.blocks.0.attn.{mark}.bias", *tells),
        source=partial(_source, split),
        dead=(r"^backbone\.model\.mask_token$",),
        absent=absent,
        beside=(r"\.bias$", r"\.lora_[ab]$"),
        needs={
            "variant": ("release", "from whose tower the terms were subtracted"),
            "rank": (16, "which needs other factors"),
            "alpha": (16.0, "by which the terms would be scaled otherwise"),
            "first_block": (None, "which adapts other blocks"),
            "patch": (16, "to which the authors resample the tower"),
        },
    )
    for split, mark in ((True, "q"), (False, "qkv"))
    for absent, tells in ((("vfm",), ()), ((), ("backbone.model.cls_token",)))
)
