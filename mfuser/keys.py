"""How other people's files name our tensors: the towers as published on the Hub, and the authors' MFuser checkpoints.

Each map goes from our name to where its values come from, so that a missing source is noticed when it is asked for and
an unused one when all are done. Every step can be taken backwards, which is how we write the authors' format.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Rules = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Source:
    """Where a tensor of ours comes from: one or several foreign tensors, stacked by rows, perhaps transposed.

    `bare` says that theirs lacks the leading dimensions of size 1 that ours has.
    """

    keys: tuple[str, ...]
    transposed: bool = False
    bare: bool = False

    def read(self, state: Mapping[str, Tensor]) -> Tensor:
        """Our tensor, up to dimensions of size 1.

        Raises: KeyError for a foreign tensor that is not there.
        """
        parts = [state[key] for key in self.keys]
        value = parts[0] if len(parts) == 1 else torch.cat(parts)
        return value.T if self.transposed else value

    def write(self, value: Tensor) -> dict[str, Tensor]:
        """The foreign tensors that `read` would take `value` from."""
        value = value.T if self.transposed else value
        while self.bare and value.shape[0] == 1:
            value = value[0]
        if len(self.keys) == 1:
            return {self.keys[0]: value}
        return dict(zip(self.keys, value.chunk(len(self.keys)), strict=True))


def _renamed(name: str, rules: Rules) -> Source:
    """Apply the rules in order; a name that ends in `^T` is transposed there, one in `^1` bare."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    name, _, mark = name.partition("^")
    return Source(tuple(_split(name)), transposed=mark == "T", bare=mark == "1")


def _split(name: str) -> list[str]:
    """`a.{q,k,v}_proj.weight` stands for three tensors stacked by rows."""
    found = re.search(r"\{(.*?)\}", name)
    if not found:
        return [name]
    return [name[: found.start()] + part + name[found.end() :] for part in found[1].split(",")]


# our towers are timm's; these are the same towers in the words of the projects they come from
_EVA: Rules = [
    (r"attn\.([qv])_proj\.bias$", r"attn.\1_bias"),
    (r"attn\.norm\.", "attn.inner_attn_ln."),
    (r"mlp\.norm\.", "mlp.ffn_ln."),
    (r"mlp\.fc1_g\.", "mlp.w1."),
    (r"mlp\.fc1_x\.", "mlp.w2."),
    (r"mlp\.fc2\.", "mlp.w3."),
]
_OPENAI: Rules = [
    (r"^cls_token$", "class_embedding^1"),
    (r"^pos_embed$", "positional_embedding^1"),
    (r"^patch_embed\.proj\.", "conv1."),
    (r"^norm_pre\.", "ln_pre."),
    (r"^norm\.", "ln_post."),
    (r"^blocks\.", "transformer.resblocks."),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.attn\.qkv\.(weight|bias)$", r".attn.in_proj_\1"),
    (r"\.attn\.proj\.", ".attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
]
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

# tower -> part (image trunk, image head, text tower) -> rules from our name in that part to the published file's
PUBLISHED: dict[str, dict[str, Rules]] = {
    "dinov2_l": {"trunk": []},
    "dinov2_l_reg4": {"trunk": []},
    "dinov3_l": {"trunk": []},
    "eva02": {
        "trunk": [(r"^", "visual.trunk.")],
        "head": [(r"^head\.", "visual.trunk.head.")],
        "text": [(r"^", "text.")],
    },
    "clip": {
        "trunk": [*_OPENAI, (r"^", "visual.")],
        "head": [(r"^head\.weight$", "visual.proj^T")],
        "text": [],
    },
    "siglip": {
        "trunk": [(r"^", "visual.trunk.")],
        "head": [
            (r"^probe$", "latent"),
            (r"^attention\.in_proj_(weight|bias)$", r"{q,kv}.\1"),
            (r"^attention\.out_proj\.", "proj."),
            (r"^mlp\.0\.", "mlp.fc1."),
            (r"^mlp\.2\.", "mlp.fc2."),
            (r"^", "visual.trunk.attn_pool."),
        ],
        "text": [(r"^", "text.")],
    },
}
PUBLISHED["siglip2"] = PUBLISHED["siglip"]

_DECODER: Rules = [
    (r"^pixel_decoder\.(layers|post_norm)\.", r"decode_head.pixel_decoder.encoder.\1."),
    (r"^pixel_decoder\.(lateral|output)_conv\.", r"decode_head.pixel_decoder.\1_convs.0."),
    (r"^pixel_decoder\.", "decode_head.pixel_decoder."),
    (r"(encoder\.layers\.\d+)\.self_attn\.", r"\1.attentions.0."),
    (r"(encoder\.layers\.\d+)\.cross_attn\.", r"\1.attentions.1.attn."),
    (r"^mask_decoder\.(text_proj|query_embed|level_embed|cls_embed|mask_embed)\.", r"decode_head.\1."),
    (r"^mask_decoder\.", "decode_head.transformer_decoder."),
    (r"(transformer_decoder\.layers\.\d+)\.cross_attn\.", r"\1.attentions.0.attn."),
    (r"(transformer_decoder\.layers\.\d+)\.self_attn\.", r"\1.attentions.1.attn."),
    (r"^(decode_head\..*)\.ffn\.0\.", r"\1.ffns.0.layers.0.0."),
    (r"^(decode_head\..*)\.ffn\.2\.", r"\1.ffns.0.layers.1."),
    (r"^(decode_head\..*)\.norm1\.", r"\1.norms.0."),
    (r"^(decode_head\..*)\.norm2\.", r"\1.norms.1."),
    (r"^(decode_head\..*)\.norm3\.", r"\1.norms.2."),
]
_SHARED: Rules = [
    (r"^adapters\.", "backbone.adapter."),
    (r"^adapter_proj", "backbone.adapter_proj"),
    (r"^embedding\.adapter_proj3\.", "backbone.adapter_proj3."),
    (r"^fpn1\.", "backbone.fpn1."),
    (r"^fpn2\.", "backbone.fpn2.0."),
    *_DECODER,
]
# vision-language tower -> part of our model -> rules to the authors' names below `backbone.` or `text_encoder.`
_AUTHORS: dict[str, dict[str, Rules]] = {
    "eva02": {"trunk": _EVA, "head": [], "text": []},
    "clip": {"trunk": _OPENAI, "head": [(r"^head\.weight$", "proj^T")], "text": []},
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
# tensors of the authors' checkpoints that nothing reads: never used there, or computed anew here
_DEAD = {
    "eva02": (r"^random_text$", r"rope\.freqs_(cos|sin)$", r"dinov2\.mask_token$"),
    "clip": (r"dinov2\.mask_token$",),
    "siglip": (r"adapter_proj[123]\.", r"dinov2\.mask_token$"),
}
# a tensor that only the checkpoints with this tower have
AUTHORS_MARKS = {
    "eva02": "backbone.rope.freqs_cos",
    "clip": "backbone.class_embedding",
    "siglip": "backbone.embeddings.position_embedding.weight",
}
# ours alone: the authors keep them outside the checkpoint
_OURS = ("logit_scale", "logit_bias")


def published(tower: str, part: str) -> Callable[[str], Source]:
    """Return the map from our names in a part of a tower (`trunk`, `head`, `text`) to those of its file on the Hub."""
    # a model by its name in timm has timm's own names
    rules: Rules = [] if tower.startswith("timm:") else PUBLISHED[tower][part]
    return lambda name: _renamed(name, rules)


def authors(vlm: str, names: Iterable[str]) -> dict[str, Source]:
    """Return where each of our model's tensors is in a checkpoint of the authors' MFuser with this tower.

    Raises: ValueError for a tower that the authors did not release.
    """
    if vlm not in _AUTHORS:
        raise ValueError(f"the authors released no MFuser with `{vlm}`; there are: {', '.join(_AUTHORS)}")
    return {name: _author(_AUTHORS[vlm], name) for name in names if name not in _OURS}


def _author(parts: dict[str, Rules], name: str) -> Source:
    for prefix, rules, theirs in (
        ("vfm.trunk.", [], "backbone.dinov2."),
        ("vlm.trunk.", parts["trunk"], "backbone."),
        ("text.tower.", parts["text"], "text_encoder."),
        ("embedding.", parts["head"], "backbone."),
    ):
        if name.startswith(prefix) and "adapter_proj3" not in name:
            return _renamed(name.removeprefix(prefix), [*rules, (r"^", theirs)])
    return _renamed(name, _SHARED)


def is_dead(vlm: str, key: str) -> bool:
    """Whether a tensor of an authors' checkpoint is one that nothing reads."""
    return any(re.search(pattern, key) for pattern in _DEAD[vlm])
