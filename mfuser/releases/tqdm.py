"""The checkpoints of tqdm's release: EVA02-CLIP-L and CLIP ViT-B/16 trained on GTA5, EVA02-CLIP-L trained on Cityscapes."""

from __future__ import annotations

from functools import partial

from mfuser.keys import Source, renamed
from mfuser.releases import Release
from mfuser.releases.shared import EVA, TEXT_QUERY_HEAD
from mfuser.towers.key_rules import OPENAI, Rules

# vision-language tower -> rules to the authors' names of its trunk and its head, below `backbone.`
_IMAGE: dict[str, tuple[Rules, Rules]] = {
    "eva02": (EVA, []),
    "clip_b": (OPENAI, [(r"^head\.weight$", "proj^T")]),
}
_REST: Rules = [(r"^fpn1\.", "backbone.fpn1."), (r"^fpn2\.", "backbone.fpn2.0."), *TEXT_QUERY_HEAD]
# a tensor that only the checkpoints with this tower have
_MARKS = {"eva02": "backbone.rope.freqs_cos", "clip_b": "backbone.class_embedding"}


def _source(vlm: str, name: str) -> Source:
    trunk, head = _IMAGE[vlm]
    parts: tuple[tuple[str, Rules, str], ...] = (
        ("vlm.trunk.", trunk, "backbone."),
        ("embedding.", head, "backbone."),
        ("text.tower.", [], "text_encoder."),
    )
    for prefix, rules, theirs in parts:
        if name.startswith(prefix):
            return renamed(name.removeprefix(prefix), [*rules, (r"^", theirs)])
    return renamed(name, _REST)


RELEASES = tuple(
    Release(
        options={"vlm": vlm},
        recipe=f"tqdm/{vlm}-gta",
        marks=("context_decoder.decoder.2.cross_attn.q_proj.weight", "decode_head.text_proj.0.weight", _MARKS[vlm]),
        source=partial(_source, vlm),
        # the copy of the tower at its start, which training alone needs; rotary tables are computed anew
        dead=(r"^reg_E0\.", r"rope\.freqs_(cos|sin)$"),
        needs={"variant": ("release", "whose pixel decoder is narrower, and which adds CLIP's class embedding once")},
    )
    for vlm in _IMAGE
)
