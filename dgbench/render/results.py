"""A typed result is shown: as the tables that belong to its class, or as JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from dgbench.render import data, doctor, downloads, kernels, leaderboard, profile, protocols, runs
from dgbench.render.outside import visible_json
from dgbench.render.streams import writable
from dgbench.render.table import Table, Tables, draw_rich, plain
from dgbench.render.terminal import may_draw, note, open_console, write
from dgbench.render.texts import TEXTS, csv
from dgbench.results import finite

# by name, each file's own: looking up a class must not import the engine
_TABLES: Tables = {
    name: draw
    for part in (leaderboard, protocols, runs, data, downloads, kernels, profile, doctor)
    for name, draw in part.TABLES.items()
}


def show(result: Any, *, as_json: bool = False, form: str = "text") -> None:
    """Print a typed result, or a list of them, to stdout.

    Args:
        form: "text", "markdown", "latex", "json", or, of a profile, "csv".
    """
    if as_json or form == "json":
        readable = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
        write(visible_json(json.dumps(_plain_data(result), indent=1, ensure_ascii=not readable, allow_nan=False)))
        return
    first = result[0] if isinstance(result, Sequence) and result else result
    tables = _TABLES[type(first).__name__](result) if first else [Table("nothing to show", (), ())]
    if form == "csv":
        write(csv(profile.flat(result)))
        return
    if form in TEXTS:
        write("\n\n".join(TEXTS[form](table) for table in tables))
        return
    # before they are laid out: a stand-in may be wider
    tables = [table.rewritten(lambda text: writable(text, sys.stdout)) for table in tables]
    console = open_console() if may_draw() else None
    for number, table in enumerate(tables):
        if number:
            write("")
        if console is not None and console.is_terminal:
            draw_rich(table, console)
        else:
            write(plain(table))


def tell(result: object) -> None:
    """Print a typed result as text on stderr: what a command says before it does its work."""
    for table in _TABLES[type(result).__name__](result):
        note(plain(table))


def _plain_data(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain_data(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_data(item) for item in value]
    return finite(value)
