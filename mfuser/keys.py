"""Maps from our tensors' names to those in files of other projects.

Each map goes from our name to the source of its values, so that a missing source is noticed when it is read, and
an unused one at the end. Every step can be reversed, which is used to write the authors' format.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mfuser.towers.key_rules import Rules

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Source:
    """Source of one of our tensors: one or several foreign tensors, stacked by rows, perhaps transposed.

    `bare`: the foreign tensor lacks the leading dimensions of size 1 of ours.
    """

    keys: tuple[str, ...]
    transposed: bool = False
    bare: bool = False

    def read(self, state: Mapping[str, Tensor]) -> Tensor:
        """Return our tensor, up to dimensions of size 1.

        Raises: KeyError for a foreign tensor that is not there.
        """
        # here and not above: what a release says of itself need not wait for torch
        import torch

        parts = [state[key] for key in self.keys]
        value = parts[0] if len(parts) == 1 else torch.cat(parts)
        return value.T if self.transposed else value

    def write(self, value: Tensor) -> dict[str, Tensor]:
        """Return the foreign tensors that `read` would take `value` from."""
        value = value.T if self.transposed else value
        while self.bare and value.shape[0] == 1:
            value = value[0]
        if len(self.keys) == 1:
            return {self.keys[0]: value}
        return dict(zip(self.keys, value.chunk(len(self.keys)), strict=True))


def renamed(name: str, rules: Rules) -> Source:
    """Apply the rules in order; a name that ends in `^T` is transposed there, one in `^1` bare."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    name, _, mark = name.partition("^")
    return Source(tuple(_split(name)), transposed=mark == "T", bare=mark == "1")


def _split(name: str) -> list[str]:
    """Expand `a.{q,k,v}_proj.weight`, which means three tensors stacked by rows."""
    found = re.search(r"\{(.*?)\}", name)
    if not found:
        return [name]
    return [name[: found.start()] + part + name[found.end() :] for part in found[1].split(",")]
