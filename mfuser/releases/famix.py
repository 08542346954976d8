"""Names of the tensors in FAMix's checkpoints: OpenAI's for the trunk, VainF's for the decoder."""

from __future__ import annotations

from mfuser.keys import Source, renamed
from mfuser.releases import Release
from mfuser.towers.key_rules import Rules

_RULES: Rules = [
    (r"^encoder\.trunk\.", "backbone."),
    (r"^decoder\.aspp\.image_pool\.0\.", "classifier.aspp.convs.4.1."),
    (r"^decoder\.aspp\.image_pool\.1\.", "classifier.aspp.convs.4.2."),
    (r"^decoder\.final\.", "classifier.classifier."),
    (r"^decoder\.classify\.", "classifier.classifier.3."),
    (r"^decoder\.", "classifier."),
]


def source(name: str) -> Source:
    """Return where a tensor of ours is in such a checkpoint."""
    return renamed(name, _RULES)


_NETWORK = ("backbone.bn3.weight", "classifier.project.0.weight", "classifier.aspp.convs.4.1.weight")
RELEASES = tuple(
    Release({"backbone": name}, f"famix/{name}-gta", (*_NETWORK, f"backbone.layer3.{last}.conv3.weight"), source, lacks=lacks)
    for name, last, lacks in (("clip_rn101", 22, ()), ("clip_rn50", 5, ("backbone.layer3.6.conv1.weight",)))
)
