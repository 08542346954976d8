"""Descriptions of authors' checkpoints, which a method declares as `RELEASES`: their marks and names of tensors.

Maps that are too long for a method's own file are here, in a file for each method.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from mfuser.keys import Source


@dataclass(frozen=True)
class Release:
    """One kind of the authors' checkpoints of a method.

    Attributes:
        options: the method's options that these weights belong to, as its towers.
        recipe: the shipped recipe that they were trained with.
        marks: tensors that every such checkpoint holds, and that together distinguish it from other methods' checkpoints.
        lacks: tensors that no such checkpoint holds, where those of a larger model have all the marks, too.
        source: our tensor's name -> where it is in the checkpoint; None for tensors that the authors keep elsewhere.
        dead: patterns of the checkpoint's tensors that are unused.
        absent: options whose towers are not in the checkpoint because they are frozen and keep their published weights.
        beside: patterns of our names of tensors in absent towers that the checkpoint has nevertheless: adapters, biases.
        needs: options that must have one value for these weights, and a description of that value for errors.
    """

    options: Mapping[str, str]
    recipe: str
    marks: tuple[str, ...]
    source: Callable[[str], Source | None]
    dead: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    needs: Mapping[str, tuple[Any, str]] = field(default_factory=dict)

    @property
    def named(self) -> str:
        """Towers that distinguish this release from the method's others, as `dinov2_l + eva02`."""
        return " + ".join(self.options.values())

    def is_beside(self, name: str) -> bool:
        """Return whether such a checkpoint has this tensor of ours although its tower is absent."""
        return any(re.search(pattern, name) for pattern in self.beside)

    def marked(self, keys: Collection[str]) -> bool:
        """Return whether a checkpoint with tensors of these names may be of this release."""
        return all(mark in keys for mark in self.marks) and not any(key in keys for key in self.lacks)

    def is_dead(self, key: str) -> bool:
        """Return whether a tensor of such a checkpoint is unused."""
        return any(re.search(pattern, key) for pattern in self.dead)
