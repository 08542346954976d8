"""Rules to the names of mmdetection 3's Mask2Former, as it lies in checkpoints of mmsegmentation 1 under `decode_head`."""

from __future__ import annotations

from mfuser.towers.key_rules import Rules

# from the names of `mfuser.decoder.mask2former.Mask2Former`
MASK2FORMER: Rules = [
    (r"^queries\.", "decode_head."),
    (r"^mask_decoder\.(level_embed|cls_embed|mask_embed)\.", r"decode_head.\1."),
    (r"^mask_decoder\.", "decode_head.transformer_decoder."),
    (r"(transformer_decoder\.layers\.\d+\.(?:cross|self)_attn)\.", r"\1.attn."),
    (r"(transformer_decoder\.layers\.\d+)\.norm1\.", r"\1.norms.0."),
    (r"(transformer_decoder\.layers\.\d+)\.norm2\.", r"\1.norms.1."),
    (r"(transformer_decoder\.layers\.\d+)\.norm3\.", r"\1.norms.2."),
    (r"^pixel_decoder\.layers\.", "decode_head.pixel_decoder.encoder.layers."),
    (r"^pixel_decoder\.(lateral|output)_conv\.", r"decode_head.pixel_decoder.\1_convs.0."),
    (r"^pixel_decoder\.", "decode_head.pixel_decoder."),
    # ours has a second norm where a decoder of texts attends to them
    (r"(encoder\.layers\.\d+)\.norm1\.", r"\1.norms.0."),
    (r"(encoder\.layers\.\d+)\.norm3\.", r"\1.norms.1."),
    (r"(layers\.\d+)\.ffn\.0\.", r"\1.ffn.layers.0.0."),
    (r"(layers\.\d+)\.ffn\.2\.", r"\1.ffn.layers.1."),
]
