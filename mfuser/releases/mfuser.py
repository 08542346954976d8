"""The checkpoints of MFuser's release: one for each vision-language tower, with DINOv2-L."""

from __future__ import annotations

from functools import partial

from mfuser.keys import Source, renamed
from mfuser.releases import Release
from mfuser.releases.shared import EVA, TEXT_QUERY_HEAD
from mfuser.towers.key_rules import OPENAI, Rules

# our towers are timm's; these are the names of the same towers' tensors in their original projects
_SIGLIP_IMAGE: Rules = [
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^pos_embed$", "embeddings.position_embedding.weight^1"),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.{q,k,v}_proj."),
    (r"\.attn\.proj\.", ".self_attn.out_proj."),
]
_SIGLIP_TEXT: Rules = [
    (r"^token_embedding\.", "embeddings.token_embedding."),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^ln_final\.", "final_layer_norm."),
    (r"^text_projection\.", "head."),
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.in_proj_(weight|bias)$", r".self_attn.{q,k,v}_proj.\1"),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
]

_SHARED: Rules = [
    (r"^adapters\.", "backbone.adapter."),
    (r"^adapter_proj", "backbone.adapter_proj"),
    (r"^embedding\.adapter_proj3\.", "backbone.adapter_proj3."),
    (r"^fpn1\.", "backbone.fpn1."),
    (r"^fpn2\.", "backbone.fpn2.0."),
    *TEXT_QUERY_HEAD,
]
# vision-language tower -> part of our model -> rules to the authors' names below `backbone.` or `text_encoder.`
_AUTHORS: dict[str, dict[str, Rules]] = {
    "eva02": {"trunk": EVA, "head": [], "text": []},
    "clip": {"trunk": OPENAI, "head": [(r"^head\.weight$", "proj^T")], "text": []},
    "siglip": {
        "trunk": _SIGLIP_IMAGE,
        "head": [
            (r"^norm\.", "layernorm."),
            (r"^mlp\.0\.", "mlp.fc1."),
            (r"^mlp\.2\.", "mlp.fc2."),
            (r"^", "head."),
        ],
        "text": _SIGLIP_TEXT,
    },
}
# unused tensors of the authors' checkpoints: never used there, or computed here
_DEAD = {
    "eva02": (r"^random_text$", r"rope\.freqs_(cos|sin)$", r"dinov2\.mask_token$"),
    "clip": (r"dinov2\.mask_token$",),
    "siglip": (r"adapter_proj[123]\.", r"dinov2\.mask_token$"),
}
# a tensor that only the checkpoints with this tower have
_MARKS = {
    "eva02": "backbone.rope.freqs_cos",
    "clip": "backbone.class_embedding",
    "siglip": "backbone.embeddings.position_embedding.weight",
}
# only in our model: the authors store them outside the checkpoint
_OURS = ("logit_scale", "logit_bias")


def _source(parts: dict[str, Rules], name: str) -> Source | None:
    if name in _OURS:
        return None
    for prefix, rules, theirs in (
        ("vfm.trunk.", [], "backbone.dinov2."),
        ("vlm.trunk.", parts["trunk"], "backbone."),
        ("text.tower.", parts["text"], "text_encoder."),
        ("embedding.", parts["head"], "backbone."),
    ):
        if name.startswith(prefix) and "adapter_proj3" not in name:
            return renamed(name.removeprefix(prefix), [*rules, (r"^", theirs)])
    return renamed(name, _SHARED)


RELEASES = tuple(
    Release(
        options={"vfm": "dinov2_l", "vlm": vlm},
        recipe=f"mfuser/{vlm}-gta",
        marks=("backbone.adapter.0.A_log", _MARKS[vlm]),
        source=partial(_source, parts),
        dead=_DEAD[vlm],
        needs={
            "fuser": ("mvfuser", "which is another layer"),
            "variant": ("release", "which leaves out known bugs of the authors' code that their weights were trained with"),
        },
    )
    for vlm, parts in _AUTHORS.items()
)
