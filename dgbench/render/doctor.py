"""Tables of `dgbench doctor`'s checks, with a hint where there is something to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from dgbench.render.table import Cell, Table

if TYPE_CHECKING:
    from dgbench.doctor import Check


def check_tables(checks: Sequence[Check]) -> list[Table]:
    styles: dict[str, Literal["good", "warn", "bad", "dim"]] = {
        "ok": "good",
        "warn": "warn",
        "fail": "bad",
        "info": "dim",
    }
    rows = tuple((Cell(check.state, styles[check.state]), Cell(check.name), Cell(check.detail)) for check in checks)
    legend = tuple(f"hint ({check.name}): {check.hint}" for check in checks if check.hint)
    return [Table("", ("state", "check", "found"), rows, keys=2, left=True, legend=legend)]
