"""Names of Mask2Former's parts in mmdetection 3, which the checkpoints of several methods have."""

from __future__ import annotations

from mfuser.towers.key_rules import Rules

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
