"""Rules to the authors' names that the releases of several methods share: of EVA's image tower, and of tqdm's decode head."""

from __future__ import annotations

from mfuser.towers.key_rules import Rules

# our tower is timm's; this is the same tower in the words of EVA's project
EVA: Rules = [
    (r"attn\.([qv])_proj\.bias$", r"attn.\1_bias"),
    (r"attn\.norm\.", "attn.inner_attn_ln."),
    (r"mlp\.norm\.", "mlp.ffn_ln."),
    (r"mlp\.fc1_g\.", "mlp.w1."),
    (r"mlp\.fc1_x\.", "mlp.w2."),
    (r"mlp\.fc2\.", "mlp.w3."),
]
# the pixel decoder and the mask decoder with a query for each class, as mmcv 1 names their parts
TEXT_QUERY_HEAD: Rules = [
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
