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

_HEAD = ("module.aspp.features.3.0.weight", "module.bot_fine.0.weight", "module.dsn.4.weight")
_LARGEST = {"resnet101": "module.layer3.22.conv3.weight", "resnet50": "module.layer3.5.conv3.weight"}
# by the trunk, tensors that tell its checkpoints, and those that the next larger trunk has besides
MARKS = {name: ("module.layer0.1.weight", *_HEAD, largest) for name, largest in _LARGEST.items()}
LACKS: dict[str, tuple[str, ...]] = {"resnet101": (), "resnet50": ("module.layer3.6.conv1.weight",)}
# WildNet's stem has no norm; it has a projection, and a dictionary that is random in each checkpoint
WILD_MARKS = {name: ("module.layer0.0.weight", "module.proj.2.weight", *_HEAD, largest) for name, largest in _LARGEST.items()}
WILD_DEAD = (r"^module\.wild_cont_dict",)
STYLES = "module.SHM.proto_mean"  # of SHADE's alone


def source(name: str) -> Source:
    """Return where a tensor of ours is in such a checkpoint."""
    return renamed(name, _RULES)
