"""Names of the tensors in what SAN-SAW's code saves, bare or behind `module.` from DataParallel."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mfuser.keys import Source, renamed
from mfuser.releases import Release
from mfuser.towers.key_rules import Rules

if TYPE_CHECKING:
    from torch import Tensor

_BARE: Rules = [(r"^encoder\.trunk\.", ""), (r"^encoder\.", "")]
_LARGEST = {"resnet101": "layer3.22.conv3.weight", "resnet50": "layer3.5.conv3.weight"}
_LACKS = {"resnet101": (), "resnet50": ("layer3.6.conv1.weight",)}
_MARKS = ("in1.weight", "layer6.conv2d_list.3.bias", "SAN_stage_2.CFR_branches.4.weight")


@dataclass(frozen=True)
class _Shared(Source):
    """A tensor that the authors' state has under two names, of which their loading takes the second."""

    first: str = ""

    def write(self, value: Tensor) -> dict[str, Tensor]:
        return {self.first: value, **super().write(value)}


def _source(prefix: str, name: str) -> Source:
    found = renamed(name, [*_BARE, ("^", prefix)])
    if shared := re.fullmatch(r"classifier_([12])\.(weight|bias)", name):
        return _Shared((f"{prefix}SAW_stage_{shared[1]}.classify.{shared[2]}",), first=found.keys[0])
    return found


def _release(backbone: str, prefix: str) -> Release:
    return Release(
        {"backbone": backbone},
        f"san-saw/{backbone}-gta",
        tuple(prefix + mark for mark in (*_MARKS, _LARGEST[backbone])),
        functools.partial(_source, prefix),
        dead=(rf"^{re.escape(prefix)}classifier_[12]\.",),  # again those of SAW
        lacks=tuple(prefix + lack for lack in _LACKS[backbone]),
    )


RELEASES = tuple(_release(backbone, prefix) for backbone in _LARGEST for prefix in ("", "module."))
