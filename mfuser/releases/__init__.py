"""The authors' checkpoints, as a method declares them under `RELEASES`: how one is recognised and how it names our tensors.

Maps that are too long for a method's own file stand here, a file for each method.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mfuser.keys import Source


@dataclass(frozen=True)
class Release:
    """One kind of the authors' checkpoints of a method.

    Attributes:
        options: the method's options that these weights belong to, as its towers.
        recipe: the shipped recipe that they were trained by.
        marks: tensors that every such checkpoint holds, and that together tell it from other methods' checkpoints.
        source: our tensor's name -> where it is in the checkpoint; None for tensors that the authors keep elsewhere.
        dead: patterns of the checkpoint's tensors that nothing reads.
        absent: options whose towers are not in the checkpoint, because they are frozen: their published weights are below it.
        beside: patterns of our names of tensors in such towers that are in the checkpoint all the same: adapters, biases.
        needs: options that the weights hold for in one value alone, and what is said of other values.
    """

    options: Mapping[str, str]
    recipe: str
    marks: tuple[str, ...]
    source: Callable[[str], Source | None]
    dead: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    needs: Mapping[str, tuple[Any, str]] = field(default_factory=dict)

    @property
    def named(self) -> str:
        """What tells this release from the method's others, as `dinov2_l + eva02`."""
        return " + ".join(self.options.values())

    def is_beside(self, name: str) -> bool:
        """Whether a tensor of ours in an absent tower is in such a checkpoint all the same."""
        return any(re.search(pattern, name) for pattern in self.beside)

    def is_dead(self, key: str) -> bool:
        """Whether a tensor of such a checkpoint is one that nothing reads."""
        return any(re.search(pattern, key) for pattern in self.dead)
