"""Rein's checkpoints: the adapter and the head alone, or with the frozen tower where someone merged them.

Files of different towers have the same names; the recipe says which it is.
"""

from __future__ import annotations

from functools import partial

from mfuser.keys import Source, renamed
from mfuser.releases import Release
from mfuser.releases.mmdet import MASK2FORMER
from mfuser.releases.shared import EVA
from mfuser.towers.key_rules import Rules

MARKS = ("backbone.reins.learnable_tokens_a", "decode_head.querys2feat.weight")
# tower -> its name in recipes, rules of its trunk, a tensor that tells it
_TOWERS: dict[str, tuple[str, Rules, str]] = {
    "dinov2_l": ("dinov2", [], "backbone.blocks.0.ls1.gamma"),
    "eva02_l_mim": ("eva02", EVA, "backbone.blocks.0.attn.q_bias"),
    "dinov2_b": ("dinov2-b", [], "backbone.blocks.0.ls1.gamma"),
    "dinov2_s": ("dinov2-s", [], "backbone.blocks.0.ls1.gamma"),
}
_SHARED: Rules = [(r"^reins\.", "backbone.reins."), (r"^querys2feat\.", "decode_head.querys2feat."), *MASK2FORMER]


def source(trunk: Rules, name: str) -> Source:
    """Return where one of our tensors is in a checkpoint of Rein, or of code derived from it."""
    if name.startswith("vfm.trunk."):
        return renamed(name.removeprefix("vfm.trunk."), [*trunk, (r"^", "backbone.")])
    return renamed(name, _SHARED)


RELEASES = tuple(
    Release(
        options={"vfm": tower},
        recipe=f"rein/{recipe}-gta",
        marks=marks,
        source=partial(source, trunk),
        dead=(r"^backbone\.mask_token$", r"^backbone\..*rope\.freqs_(cos|sin)$"),
        absent=absent,
        needs={
            "adapter": ("lora", "whose tokens are whole"),
            "patch": (16, "to which the authors resample the tower"),
        },
    )
    for tower, (recipe, trunk, told_by) in _TOWERS.items()
    for absent, marks in ((("vfm",), MARKS), ((), (*MARKS, told_by)))
)
