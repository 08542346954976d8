"""Methods: a line for each, or all that is known of one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dgbench.render.flat import FlatRow, flat_row
from dgbench.render.table import ABSENT, Cell, Table

if TYPE_CHECKING:
    from dgbench.methods import Method, MethodDetails
    from mfuser.methods import Option

_FIDELITY = "exact: follows the authors' code; reconstructed: by the paper alone, as there is no code of theirs."


def method_tables(found: Sequence[Method]) -> list[Table]:
    rows = []
    for method in found:
        texts = (method.name, method.title, " + ".join(method.towers), ", ".join(method.licences), method.fidelity)
        rows.append((*(Cell(text or ABSENT) for text in texts), Cell(str(len(method.recipes)))))
    legend = [f"{method.name}: {method.paper}." for method in found if method.paper]
    legend += [_FIDELITY, "Towers: the usual ones; licences are those of their weights. One method: dgbench methods NAME."]
    header = ("method", "title", "towers", "licence", "code", "recipes")
    return [Table("", header, tuple(rows), left=True, legend=tuple(legend))]


def detail_tables(found: MethodDetails) -> list[Table]:
    method = found.method
    facts = {
        "title": method.title,
        "paper": method.paper,
        "code": method.fidelity,
        "towers": " + ".join(method.towers),
        "licence": ", ".join(method.licences),
    }
    about = [(Cell(what), Cell(text or ABSENT)) for what, text in facts.items()]
    about += [(Cell("recipe" if number == 0 else ""), Cell(name)) for number, name in enumerate(method.recipes)]
    options = [tuple(map(Cell, (row.name, row.type, _default(row), row.comment or ABSENT))) for row in found.options]
    backbones = [(Cell(" + ".join(row.values())), Cell(_settings(row))) for row in found.backbones]
    releases = [tuple(map(Cell, (_settings(row.options), row.recipe, ", ".join(row.absent) or "none"))) for row in found.releases]
    tables = [
        Table("", (method.name, ""), tuple(about), left=True, legend=(_FIDELITY,)),
        Table("", ("option", "type", "default", "what it is"), tuple(options), left=True, legend=(_SET,)),
        Table("", ("backbones", "options"), tuple(backbones), left=True, legend=("The first row has the usual towers.",)),
        Table("", ("authors' checkpoint", "recipe", "towers left out"), tuple(releases), left=True, legend=(_CONVERT,)),
    ]
    return [table for table in tables if table.rows]


_SET = "Options stand under `method` in a recipe, or: dgbench train METHOD --set method.OPTION=VALUE."
_CONVERT = "dgbench convert FILE OUT makes a run of such a file; weights of towers that it leaves out have to be on this disk."


def detail_rows(found: MethodDetails) -> list[FlatRow]:
    """Return a row for each option, backbone and release, which says which table it is of."""
    method = found.method.name
    return [
        flat_row(found.method, table="method"),
        *({"table": "option", "name": method} | flat_row(row, without=("name",), option=row.name) for row in found.options),
        *({"table": "backbone", "name": method, "options": _settings(row)} for row in found.backbones),
        *(
            {"table": "release", "name": method, "options": _settings(row.options), "recipes": row.recipe}
            | {"absent": "; ".join(row.absent)}
            for row in found.releases
        ),
    ]


def _default(option: Option) -> str:
    if option.required:
        return "required"
    return option.default if isinstance(option.default, str) else json.dumps(option.default, default=str)


def _settings(options: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items())
