"""The methods: a file each, named like the method; this door lists them without importing them."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mfuser.segmentor import Segmentor


def names() -> list[str]:
    """Every method's public name; nothing is imported."""
    return sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(__path__))


def module(name: str) -> ModuleType:
    """The module of a method.

    Raises: ValueError listing the methods there are.
    """
    if name not in names():
        raise ValueError(f"unknown method `{name}`; choose from {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")


def options(name: str) -> type[Any]:
    """The method's Options dataclass."""
    found: type[Any] = module(name).Options
    return found


def option_names(name: str) -> list[str]:
    """The fields of a method's Options, read from its file: a wrong key is told without importing torch.

    Raises: ValueError listing the methods there are.
    """
    body = next(node.body for node in _parsed(name).body if isinstance(node, ast.ClassDef) and node.name == "Options")
    return [node.target.id for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]


def backbone_names(name: str) -> set[str]:
    """The towers and trunks that a method's BACKBONES write out, read from its file: some have trunks of their own.

    Raises: ValueError listing the methods there are.
    """
    rows = [node for node in _parsed(name).body if isinstance(node, ast.Assign | ast.AnnAssign)]
    values = [row.value for row in rows if row.value is not None and "BACKBONES" in ast.unparse(row).partition("=")[0]]
    written = [value for one in values for node in ast.walk(one) if isinstance(node, ast.Dict) for value in node.values]
    return {value.value for value in written if isinstance(value, ast.Constant) and isinstance(value.value, str)}


def _parsed(name: str) -> ast.Module:
    if name not in names():
        raise ValueError(f"unknown method `{name}`; choose from {', '.join(names())}")
    file = f"{name.replace('-', '_')}.py"
    return ast.parse(next(path for folder in __path__ if (path := Path(folder, file)).is_file()).read_text(encoding="utf-8"))


def build(name: str, *, pretrained: bool = True, filled: bool = True, **given: Any) -> Segmentor:
    """Build a method, in evaluation mode: a trainer calls `.train()`.

    Args:
        name: one of `names()`.    pretrained: load the towers' published weights, where they have any.
        filled: draw what is left of large towers; False leaves it on the meta device for a checkpoint to fill.
        given: fields of the method's Options.

    Raises: ValueError for an unknown method or option; WeightsNotFound naming the files that are not on this machine.
    """
    made = module(name)
    known = {f.name for f in dataclasses.fields(made.Options)}
    if unknown := sorted(set(given) - known):
        raise ValueError(f"`{name}` has no option {', '.join(f'`{u}`' for u in unknown)}; it has {', '.join(sorted(known))}")
    model: Segmentor = made.build(made.Options(**given), pretrained=pretrained)
    model.method = name
    if filled:
        from mfuser.towers.loading import fill

        fill(model)
    return model.eval()
