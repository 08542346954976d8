"""Names of the tensors in checkpoints of RobustNet's family: its DeepLabV3+ on a ResNet."""

from __future__ import annotations

from mfuser.keys import Source, renamed
from mfuser.towers.key_rules import Rules

_RULES: Rules = [
    (r"^encoder\.trunk\.conv1\.", "layer0.0."),
    (r"^encoder\.trunk\.bn1\.", "layer0.1."),
    (r"^encoder\.trunk\.", ""),
    (r"^decoder\.", ""),
    (r"^aux\.", "dsn."),
    (r"^", "module."),  # saved from DistributedDataParallel
]

_NETWORK = ("module.layer0.1.weight", "module.aspp.features.3.0.weight", "module.bot_fine.0.weight", "module.dsn.4.weight")
# by the trunk, tensors that tell its checkpoints, and those that the next larger trunk has besides
MARKS = {
    "resnet101": (*_NETWORK, "module.layer3.22.conv3.weight"),
    "resnet50": (*_NETWORK, "module.layer3.5.conv3.weight"),
}
LACKS: dict[str, tuple[str, ...]] = {"resnet101": (), "resnet50": ("module.layer3.6.conv1.weight",)}
STYLES = "module.SHM.proto_mean"  # of SHADE's alone


def source(name: str) -> Source:
    """Return where a tensor of ours is in such a checkpoint."""
    return renamed(name, _RULES)
