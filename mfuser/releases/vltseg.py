"""The checkpoints of the re-implementation of VLTSeg: EVA02-CLIP-L, trained on one or two of several sources."""

from __future__ import annotations

from mfuser.keys import Source, renamed
from mfuser.releases import Release
from mfuser.releases.mmdet import MASK2FORMER
from mfuser.releases.shared import EVA


def _source(name: str) -> Source:
    if name.startswith("vfm.trunk."):
        return renamed(name.removeprefix("vfm.trunk."), [*EVA, (r"^", "backbone.")])
    if name.startswith("decoder."):
        return renamed(name.removeprefix("decoder."), MASK2FORMER)
    return renamed(name, [(r"^fpn1\.", "backbone.fpn1."), (r"^fpn2\.", "backbone.fpn2.0.")])


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
