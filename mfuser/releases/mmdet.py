"""Names of parts that several methods' checkpoints have from mmdetection and from the authors of EVA."""

from __future__ import annotations

from mfuser.towers.key_rules import Rules

# our trunk is timm's EVA02; these are the names of its tensors in EVA's own code
EVA: Rules = [
    (r"attn\.([qv])_proj\.bias$", r"attn.\1_bias"),
    (r"attn\.norm\.", "attn.inner_attn_ln."),
    (r"mlp\.norm\.", "mlp.ffn_ln."),
    (r"mlp\.fc1_g\.", "mlp.w1."),
    (r"mlp\.fc1_x\.", "mlp.w2."),
    (r"mlp\.fc2\.", "mlp.w3."),
]

# `mfuser.decoder.mask2former.Mask2Former`, named `decoder`, and mmdetection 3's head, named `decode_head`
MASK2FORMER: Rules = [
    (r"^decoder\.pixel_decoder\.(lateral|output)_conv\.", r"decode_head.pixel_decoder.\1_convs.0."),
    (r"^decoder\.pixel_decoder\.layers\.", "decode_head.pixel_decoder.encoder.layers."),
    (r"^decoder\.pixel_decoder\.", "decode_head.pixel_decoder."),
    (r"^decoder\.queries\.", "decode_head."),
    (r"^decoder\.mask_decoder\.(level_embed|cls_embed|mask_embed)\.", r"decode_head.\1."),
    (r"^decoder\.mask_decoder\.", "decode_head.transformer_decoder."),
    (r"(transformer_decoder\.layers\.\d+\.(?:cross|self)_attn)\.", r"\1.attn."),
    (r"^(decode_head\..*layers\.\d+)\.ffn\.0\.", r"\1.ffn.layers.0.0."),
    (r"^(decode_head\..*layers\.\d+)\.ffn\.2\.", r"\1.ffn.layers.1."),
    # the pixel decoder has no norm of a cross-attention between its two
    (r"(encoder\.layers\.\d+)\.norm3\.", r"\1.norms.1."),
    (r"(layers\.\d+)\.norm1\.", r"\1.norms.0."),
    (r"(layers\.\d+)\.norm2\.", r"\1.norms.1."),
    (r"(layers\.\d+)\.norm3\.", r"\1.norms.2."),
]
