"""Names of methods, towers, operators and backends in the models' package.

They are read from its files and from tables that do not import torch, so that a wrong name is reported quickly.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from dgbench.errors import DgbenchError, RecipeError, no_recipe_file, unknown, unknown_recipe

_MODELS = Path(__file__).parents[1] / "mfuser"
_TIMM = "timm:"  # prefix of a timm model's name, which only timm can check


def methods() -> list[str]:
    """Return every method's public name."""
    from mfuser.methods import names

    return names()


def towers(*roles: str) -> list[str]:
    """Return the towers of these roles, `vfm`, `vlm`, `cnn` or `mit`; transformers trained from scratch have the first two."""
    from mfuser.towers.table import TOWERS

    roles = (*roles, "both") if {"vfm", "vlm"} & {*roles} else roles
    return [name for name, row in TOWERS.items() if row.role in roles]


def what(tower: str) -> str:
    """Return what a tower of the table is, for messages; case does not matter."""
    from mfuser.towers.table import TOWERS

    return TOWERS[tower.casefold()].described


def backends() -> dict[str, list[str]]:
    """Return each operator's backends: the table of `mfuser.ops.dispatch`, or its text if that is not imported yet."""
    if (dispatch := sys.modules.get("mfuser.ops.dispatch")) is not None:
        return {operator: [row.name for row in rows] for operator, rows in dispatch.TABLE.items()}
    return backends_as_written()


def backends_as_written() -> dict[str, list[str]]:
    """Return each operator's backends, read from the text of the table."""
    found = {}
    for node in ast.parse((_MODELS / "ops" / "dispatch.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "TABLE":
            assert isinstance(node.value, ast.Dict)
            for operator, rows in zip(node.value.keys, node.value.values, strict=True):
                calls = [row for row in ast.walk(rows) if isinstance(row, ast.Call)]
                found[_text(operator)] = [_text(call.args[0]) for call in calls]
    return found


def check_backends(operators: Iterable[str], names: Iterable[str]) -> None:
    """Raise a DgbenchError for an unknown operator or backend."""
    known = backends()
    for name in operators:
        if name not in known:
            raise DgbenchError(*unknown("operator", name, known))
    every = {backend for rows in known.values() for backend in rows}
    for name in names:
        if name not in every:
            raise DgbenchError(*unknown("backend", name, every))


def check_models(names: Sequence[str], vlm: str | None = None, vfm: str | None = None, backbone: str | None = None) -> None:
    """Raise a RecipeError for a name that is no method or recipe, and for unknown towers; case does not matter."""
    from dgbench.recipe import recipe_names
    from mfuser.methods import backbone_names

    recipes = recipe_names()
    for name in names:
        if name.casefold() in (*methods(), *recipes) or Path(name).is_file():
            continue
        if name.endswith((".yaml", ".yml")):
            raise RecipeError(*no_recipe_file(name))
        raise RecipeError(*unknown_recipe(name, methods(), recipes))
    plain, its_own = towers("vfm", "vlm"), sorted({name for method in methods() for name in backbone_names(method)})
    for kind, tower, known in (
        ("vlm", vlm, towers("vlm")),
        ("vfm", vfm, plain),
        ("backbone", backbone, list(dict.fromkeys([*towers("vfm", "vlm", "cnn", "mit"), *its_own]))),
    ):
        if tower is None or tower.casefold() in known or (tower.startswith(_TIMM) and kind != "vlm"):
            continue
        hint = unknown("tower", tower, known)[1] + (f", or {_TIMM}<model>" if kind != "vlm" else "")
        if tower.casefold() in towers("cnn", "mit"):
            raise RecipeError(f"`{tower}` is {what(tower)}, which cannot be a {kind}", hint)
        without = kind == "vlm" and tower.casefold() in towers("vfm")
        raise RecipeError(f"`{tower}` has no text tower" if without else f"{kind} `{tower}` is unknown", hint)


def _text(node: ast.expr | None) -> str:
    return str(ast.literal_eval(node)) if node is not None else ""
