"""The checkpoints of VLTSeg's re-implementation: EVA02-CLIP-L at 224 pixels, trained on synthetic or on real images."""

from __future__ import annotations

from mfuser.keys import Source, renamed
from mfuser.releases import Release
from mfuser.releases.mmdet import MASK2FORMER
from mfuser.releases.shared import EVA
from mfuser.towers.key_rules import Rules

_REST: Rules = [(r"^fpn1\.", "backbone.fpn1."), (r"^fpn2\.", "backbone.fpn2.0."), *MASK2FORMER]


def _source(name: str) -> Source:
    if name.startswith("vfm.trunk."):
        return renamed(name.removeprefix("vfm.trunk."), [*EVA, (r"^", "backbone.")])
    return renamed(name, _REST)


RELEASES = (
    Release(
        options={"vfm": "eva02_l_224"},
        recipe="vltseg/eva02-gta",
        marks=("decode_head.query_feat.weight", "backbone.rope.freqs_cos", "backbone.fpn2.0.weight"),
        source=_source,
        dead=(r"rope\.freqs_(cos|sin)$",),  # rotary tables, which are computed anew
        needs={"variant": ("release", "whose tower has one norm more in each block")},
    ),
)
