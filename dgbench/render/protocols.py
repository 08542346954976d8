"""Protocols side by side, and how a title names the one that its scores were taken by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dgbench.render.table import Cell, Table

if TYPE_CHECKING:
    from dgbench.protocol import Preset


def with_hash(name: str, digest: str) -> str:
    """Return a protocol's name with the hash of what it says: two of one name and another hash do not compare."""
    return f"{name} ({digest})" if digest else name


def preset_tables(found: Sequence[Preset]) -> list[Table]:
    rows = [(Cell(what), *(Cell(preset.rules[what]) for preset in found)) for what in found[0].rules]
    rows = [(Cell("hash"), *(Cell(preset.digest) for preset in found)), *rows]
    legend = [f"{preset.name}: {preset.follows}." for preset in found]
    legend.append("Sizes are H x W. Scores under two hashes are never ranked together; docs/protocol.md explains each line.")
    return [Table("", ("", *(preset.name for preset in found)), tuple(rows), left=True, legend=tuple(legend))]
