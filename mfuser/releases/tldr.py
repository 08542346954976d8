"""Names of the tensors in TLDR's checkpoints, which hold the ImageNet trunk and the transfer network, too."""

from __future__ import annotations

import re

from mfuser.keys import Source, renamed
from mfuser.releases import Release
from mfuser.towers.key_rules import Rules

_RULES: Rules = [
    (r"^encoder\.trunk\.conv1\.", "backbone.stem."),
    (r"^encoder\.trunk\.bn1\.", "backbone.stem.7."),
    (r"^encoder\.trunk\.", "backbone."),
    (r"^decoder\.classify\.", "decode_head.conv_seg."),
    (r"^decoder\.image_pool\.", "decode_head.image_pool.1."),
    (r"^decoder\.aspp\.", "decode_head.aspp_modules."),
    (r"^decoder\.fine\.", "decode_head.c1_bottleneck."),
    (r"^decoder\.final\.", "decode_head.sep_bottleneck."),
    (r"^decoder\.", "decode_head."),
]
# of the separable convolutions, and of each convolution and its norm
_SEPARABLE: Rules = [(r"\.0\.(\d)\.(?=\w+$)", r".depthwise_conv.\1."), (r"\.1\.(\d)\.(?=\w+$)", r".pointwise_conv.\1.")]
_PART: Rules = [(r"\.0\.(?=\w+$)", ".conv."), (r"\.1\.(?=\w+$)", ".bn.")]
_PREFIX: Rules = [(r"^", "model.")]  # the trainer's name of the network


def source(name: str) -> Source:
    """Return where a tensor of ours is in such a checkpoint."""
    rules = [*_RULES]
    if re.match(r"decoder\.(aspp\.[1-9]|final)", name):
        rules += _SEPARABLE
    if name.startswith("decoder.") and not name.startswith("decoder.classify"):
        rules += _PART
    return renamed(name, [*rules, *_PREFIX])


_NETWORK = ("model.backbone.stem.0.weight", "model.decode_head.sep_bottleneck.0.depthwise_conv.conv.weight")
RELEASES = tuple(
    Release(
        {"backbone": backbone},
        f"tldr/{backbone}-gta",
        (*_NETWORK, f"model.backbone.layer3.{last}.conv3.weight"),
        source,
        dead=(r"^imnet_model\.", r"^p_wct\."),
        lacks=lacks,
    )
    for backbone, last, lacks in (("resnet101_v1c", 22, ()), ("resnet50_v1c", 5, ("model.backbone.layer3.6.conv1.weight",)))
)
