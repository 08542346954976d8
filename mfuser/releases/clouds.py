"""The checkpoints of CLOUDS' release: one for each source, written by detectron2, with the whole frozen CLIP."""

from __future__ import annotations

from mfuser.keys import Source, renamed
from mfuser.releases import Release
from mfuser.towers.key_rules import CLIP_CNN_FILE, Rules

_PIXEL: Rules = [
    (r"^input_convs\.(\d+)\.conv\.", r"input_proj.\1.0."),
    (r"^input_convs\.(\d+)\.gn\.", r"input_proj.\1.1."),
    (r"^level_encoding\.weight$", "transformer.level_embed"),
    (r"^layers\.", "transformer.encoder.layers."),
    (r"(layers\.\d+)\.ffn\.0\.", r"\1.linear1."),
    (r"(layers\.\d+)\.ffn\.2\.", r"\1.linear2."),
    (r"(layers\.\d+)\.norm3\.", r"\1.norm2."),
    (r"^lateral_conv\.conv\.", "adapter_1."),
    (r"^lateral_conv\.gn\.", "adapter_1.norm."),
    (r"^output_conv\.conv\.", "layer_1."),
    (r"^output_conv\.gn\.", "layer_1.norm."),
    (r"^mask_feature\.", "mask_features."),
    (r"^", "sem_seg_head.pixel_decoder."),
]
_MASK: Rules = [
    (r"^layers\.(\d+)\.cross_attn\.", r"transformer_cross_attention_layers.\1.multihead_attn."),
    (r"^layers\.(\d+)\.norm1\.", r"transformer_cross_attention_layers.\1.norm."),
    (r"^layers\.(\d+)\.self_attn\.", r"transformer_self_attention_layers.\1.self_attn."),
    (r"^layers\.(\d+)\.norm2\.", r"transformer_self_attention_layers.\1.norm."),
    (r"^layers\.(\d+)\.ffn\.0\.", r"transformer_ffn_layers.\1.linear1."),
    (r"^layers\.(\d+)\.ffn\.2\.", r"transformer_ffn_layers.\1.linear2."),
    (r"^layers\.(\d+)\.norm3\.", r"transformer_ffn_layers.\1.norm."),
    (r"^post_norm\.", "decoder_norm."),
    (r"^pool_proj\.", "_mask_pooling_proj."),
    (r"^(mask|cls)_embed\.0\.", r"\1_embed.layers.0."),
    (r"^(mask|cls)_embed\.2\.", r"\1_embed.layers.1."),
    (r"^(mask|cls)_embed\.4\.", r"\1_embed.layers.2."),
    (r"^cls_embed\.", "class_embed."),
    (r"^", "sem_seg_head.predictor."),
]
_CLIP: Rules = [(r"^", "backbone.clip_model.")]


def _source(name: str) -> Source | None:
    for prefix, rules in (
        ("encoder.trunk.", [*CLIP_CNN_FILE["trunk"], *_CLIP]),
        ("prompts.tower.", [*CLIP_CNN_FILE["text"], *_CLIP]),
        ("head.pixel_decoder.", _PIXEL),
        ("head.mask_decoder.", _MASK),
        ("head.queries.", _MASK),
    ):
        if name.startswith(prefix):
            return renamed(name.removeprefix(prefix), rules)
    return Source((name,))


RELEASES = (
    Release(
        options={"backbone": "convnext_l_clip"},
        recipe="clouds/convnext-gta",
        marks=(
            "backbone.clip_model.visual.trunk.stem.0.weight",
            "sem_seg_head.predictor._mask_pooling_proj.1.weight",
            "void_embedding.weight",
        ),
        source=_source,
        # CLIP's layers behind the maps and its scale serve an ensemble that the release leaves off
        dead=(
            r"^backbone\.clip_model\.visual\.(trunk\.)?head\.",
            r"^backbone\.clip_model\.logit_scale$",
            r"^criterion\.empty_weight$",
        ),
    ),
)
