"""Tables of protocols, and the name of a protocol in titles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dgbench.render.table import Cell, Table

if TYPE_CHECKING:
    from dgbench.protocol import Preset


def with_hash(name: str, digest: str) -> str:
    """Return a protocol's name with its hash: protocols of the same name and different hashes are not comparable."""
    return f"{name} ({digest})" if digest else name


def preset_tables(found: Sequence[Preset]) -> list[Table]:
    rows = [(Cell(what), *(Cell(preset.rules[what]) for preset in found)) for what in found[0].rules]
    rows = [(Cell("hash"), *(Cell(preset.digest) for preset in found)), *rows]
    legend = [f"{preset.name}: {preset.follows}." for preset in found]
    legend.append("Sizes are H x W. Scores under two hashes are never ranked together; docs/protocol.md explains each line.")
    return [Table("", ("", *(preset.name for preset in found)), tuple(rows), left=True, legend=tuple(legend))]
