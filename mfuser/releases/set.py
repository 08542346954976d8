"""Checkpoints that SET's code writes: Rein's, with further tokens. The authors published none."""

from __future__ import annotations

from functools import partial

from mfuser.releases import Release
from mfuser.releases.rein import MARKS, source

_MARKS = (*MARKS, "backbone.reins.learnable_tokens2")

RELEASES = tuple(
    Release(
        options={"vfm": "dinov2_l"},
        recipe="set/dinov2-gta",
        marks=marks,
        source=partial(source, []),
        dead=(r"^backbone\.mask_token$",),
        absent=absent,
        needs={
            "variant": ("release", "whose transforms are others"),
            "patch": (16, "to which the authors resample the tower"),
        },
    )
    for absent, marks in ((("vfm",), _MARKS), ((), (*_MARKS, "backbone.blocks.0.ls1.gamma")))
)
