"""Names of the tensors in checkpoints of DAFormer's code: MiT-B5 with its decode head, inside the wrapper for training."""

from __future__ import annotations

from mfuser.keys import Source, renamed
from mfuser.towers.key_rules import MIT, Rules

_HEAD: Rules = [
    (r"^embed\.(\d)\.", r"embed_layers.\1.proj."),
    (r"^aspp\.0\.", "fuse_layer.aspp_modules.0."),
    (r"^aspp\.(\d)\.([01])\.", r"fuse_layer.aspp_modules.\1.depthwise_conv.\2."),
    (r"^aspp\.(\d)\.3\.", r"fuse_layer.aspp_modules.\1.pointwise_conv.0."),
    (r"^aspp\.(\d)\.4\.", r"fuse_layer.aspp_modules.\1.pointwise_conv.1."),
    (r"^bottleneck\.", "fuse_layer.bottleneck."),
    (r"^(fuse_layer\..*)\.0\.(weight)$", r"\1.conv.\2"),
    (r"^(fuse_layer\..*)\.1\.([a-z_]+)$", r"\1.bn.\2"),
    (r"^classifier\.", "conv_seg."),
]

MARKS = (
    "model.backbone.patch_embed1.proj.weight",
    "model.backbone.block3.39.attn.q.weight",
    "model.decode_head.fuse_layer.bottleneck.conv.weight",
    "model.backbone.shm.proto_mean",  # of SHADE's alone
)


def source(name: str) -> Source:
    """Return where a tensor of ours is in such a checkpoint."""
    if name.startswith("encoder.trunk."):
        return renamed(name.removeprefix("encoder.trunk."), [*MIT, (r"^", "model.backbone.")])
    return renamed(name.removeprefix("decoder."), [*_HEAD, (r"^", "model.decode_head.")])
