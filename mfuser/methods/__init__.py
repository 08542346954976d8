"""The methods: a file each, named like the method; this door lists them without importing them, and builds them.

A method's file has, all but `MODEL` and `RELEASES` as literals, which are read without importing it:
- `TITLE` and `PAPER`; `FIDELITY`: "exact" where it follows the authors' code, "reconstructed" where there is none, "" where
  there is no paper;
- `BACKBONES`: the towers that it is tabulated with, as options, the last row tiny;
- `TOWERS`: option that names a tower -> part of the tower (`trunk`, `head`, `text`) -> the module that its weights go to;
- `ABSENT`, where options leave modules out: option -> its value -> the modules, as in `TOWERS`, that such a model has not;
- `LATER`, where there are any: options newer than the method's first recipes, whose hashes leave them out at their default;
- `Options`, a frozen dataclass that checks itself, and `MODEL`, a Segmentor that is built from them;
- `RELEASES`, where the authors published checkpoints, see `mfuser.releases`; imported from a file of that package, they are read
  without importing the method.

A file in a folder that is appended to `__path__` is a method like the others.
"""

from __future__ import annotations

import ast
import functools
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from mfuser.releases import Release
    from mfuser.segmentor import Segmentor

Weights = Literal["published", "random", "meta"]


def names() -> list[str]:
    """Every method's public name; nothing is imported."""
    return sorted({m.name.replace("_", "-") for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")})


def _known(name: str) -> str:
    if name not in names():
        raise ValueError(f"unknown method `{name}`; choose from {', '.join(names())}")
    return name.replace("-", "_")


def file(name: str) -> Path:
    """Return the source file of a method, in any folder of this package's path.

    Raises: ValueError listing the methods there are.
    """
    found = (Path(folder, f"{_known(name)}.py") for folder in __path__)
    return next(path for path in found if path.is_file())


def module(name: str) -> ModuleType:
    """Return the module of a method.

    Raises: ValueError listing the methods there are.
    """
    return importlib.import_module(f"{__name__}.{_known(name)}")


def options(name: str) -> type[Any]:
    """Return the method's Options dataclass."""
    found: type[Any] = module(name).Options
    return found


def releases(name: str) -> tuple[Release, ...]:
    """Return the releases of a method; it is imported only if it makes them in its own file.

    Raises: ValueError listing the methods there are.
    """
    for node in _read(name):
        if isinstance(node, ast.ImportFrom) and node.module and any(alias.name == "RELEASES" for alias in node.names):
            return tuple(importlib.import_module(node.module).RELEASES)
        if _assigned(node)[0] == "RELEASES":
            return tuple(module(name).RELEASES)
    return ()


def _read(name: str) -> list[ast.stmt]:
    """Return the statements of a method's file.

    Raises: ValueError listing the methods there are.
    """
    return _statements(file(name).read_text(encoding="utf-8"))


@functools.lru_cache(maxsize=64)
def _statements(text: str) -> list[ast.stmt]:
    return ast.parse(text).body


def constants(name: str) -> dict[str, Any]:
    """Return the literals of a method's file, read without importing it: `TITLE`, `PAPER`, `FIDELITY`, `BACKBONES`, `TOWERS`,
    `ABSENT`, `LATER`.

    Raises: ValueError listing the methods there are, or naming a constant that is no literal.
    """
    found = {"TITLE": name, "PAPER": "", "FIDELITY": "", "BACKBONES": (), "TOWERS": {}, "ABSENT": {}, "LATER": ()}
    for node in _read(name):
        target, value = _assigned(node)
        if target in found and value is not None:
            try:
                found[target] = ast.literal_eval(value)
            except ValueError:
                raise ValueError(f"{target} of the method `{name}` is no literal; write its value out") from None
    return found


def _assigned(node: ast.stmt) -> tuple[str, ast.expr | None]:
    """Return the name that a statement gives a value, and the value; "" and None for other statements."""
    if not isinstance(node, ast.Assign | ast.AnnAssign):
        return "", None
    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
    return (target.id, node.value) if isinstance(target, ast.Name) else ("", None)


def towers(name: str, options: Mapping[str, Any] | None = None) -> Mapping[str, Mapping[str, str]]:
    """Which options of a method name towers, and where their parts are in the model; nothing is imported.

    Args:
        options: those of a model, whose absent parts are left out, and with them towers without any; by default all are named.
    """
    literals = constants(name)
    found: Mapping[str, Mapping[str, str]] = literals["TOWERS"]
    absent = {module for option, values in literals["ABSENT"].items() for module in values.get((options or {}).get(option), ())}
    if not absent:
        return found
    left = {option: {part: at for part, at in parts.items() if at not in absent} for option, parts in found.items()}
    return {option: parts for option, parts in left.items() if parts}


def later(name: str) -> dict[str, Any]:
    """Return the options that are newer than a method's first recipes, with their defaults; nothing is imported."""
    new = constants(name)["LATER"]
    return {option.name: option.default for option in described_options(name) if option.name in new} if new else {}


def option_names(name: str) -> list[str]:
    """Return the fields of a method's Options, read from its file: a wrong key is told without importing torch.

    Raises: ValueError listing the methods there are.
    """
    return [option.name for option in described_options(name)]


@dataclass(frozen=True, slots=True)
class Option:
    """One field of a method's Options, as its file has it."""

    name: str
    type: str
    default: Any  # the value of a literal, else its source text
    required: bool  # there is no default
    comment: str


def described_options(name: str) -> list[Option]:
    """Return the fields of a method's Options with the comments behind or above them, read from its file without importing it.

    Raises: ValueError listing the methods there are.
    """
    lines = file(name).read_text(encoding="utf-8").splitlines()
    body = next(node.body for node in _read(name) if isinstance(node, ast.ClassDef) and node.name == "Options")
    found = []
    for node in body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        behind = lines[(node.end_lineno or node.lineno) - 1].encode()[node.end_col_offset :].decode()
        comment = next((text for text in (behind, lines[node.lineno - 2]) if text.strip().startswith("#")), "")
        default = None if node.value is None else _value(node.value)
        comment = comment.strip().removeprefix("#").strip()
        found.append(Option(node.target.id, ast.unparse(node.annotation), default, node.value is None, comment))
    return found


def _value(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def backbone_names(name: str) -> set[str]:
    """Return the towers and trunks of a method's BACKBONES, read from its file: some have trunks of their own.

    Raises: ValueError listing the methods there are.
    """
    return {value for row in constants(name)["BACKBONES"] for value in row.values()}


def of_kind(name: str, tower: str) -> str:
    """Return the one of a method's backbones that is of a kind (`Tower.kind`: `resnet101`, `tiny`); any other name unchanged."""
    from mfuser.towers.table import TOWERS

    own = backbone_names(name)
    same = [one for one in own & TOWERS.keys() if TOWERS[one].kind == tower]
    return same[0] if tower not in own and len(same) == 1 else tower


def build(name: str, *, weights: Weights = "published", **given: Any) -> Segmentor:
    """Build a method, in evaluation mode: a trainer calls `.train()`.

    Args:
        name: one of `names()`.
        weights: "published" loads the towers' published weights, where they have any, and draws the rest; "random" draws all;
            "meta" leaves all parameters without values on the meta device, for a checkpoint to fill.
        given: fields of the method's Options.

    Raises: ValueError for an unknown method or option; WeightsNotFound naming the files that are not on this machine.
    """
    import dataclasses

    if old := [word for word in ("pretrained", "filled") if word in given]:
        raise TypeError(f'build() takes no `{old[0]}`; say weights="published", "random" (was pretrained=False) or "meta"')
    if weights not in get_args(Weights):
        raise ValueError(f"weights `{weights}` are unknown; choose from {', '.join(get_args(Weights))}")
    made = module(name)
    known = {f.name for f in dataclasses.fields(made.Options)}
    if unknown := sorted(given.keys() - known):  # not `set`, which a method's module hides here
        raise ValueError(f"`{name}` has no option {', '.join(f'`{u}`' for u in unknown)}; it has {', '.join(sorted(known))}")

    from mfuser.segmentor import CITYSCAPES
    from mfuser.towers.loading import fill, load_tower
    from mfuser.towers.table import TOWERS as TABLE
    from mfuser.towers.text import CONTEXT_LENGTH, tokenize
    from mfuser.towers.weights import WeightsNotFound, require

    chosen = made.Options(**given)
    its_towers = towers(name, dataclasses.asdict(chosen))
    wordless = "token_ids" in known and chosen.token_ids is None
    # before anything is built: a missing file should cost seconds, not minutes
    try:
        # a method's own trunks have no files
        its_own = backbone_names(name) - TABLE.keys()
        wanted = [tower for option in its_towers if (tower := getattr(chosen, option)) not in its_own]
        files = require(wanted) if weights == "published" else {}
    except WeightsNotFound:
        # of towers that do not fit each other, none need be downloaded
        blank = {"token_ids": [[0] * CONTEXT_LENGTH for _ in CITYSCAPES]} if wordless else {}
        _on_meta(made.MODEL, dataclasses.replace(chosen, **blank))
        raise
    if wordless:
        # the ids travel with the model, so that loading it never asks for a tokenizer
        spoken = next(getattr(chosen, option) for option, parts in its_towers.items() if "text" in parts)
        chosen = dataclasses.replace(chosen, token_ids=tokenize(spoken, CITYSCAPES))
    model: Segmentor = _on_meta(made.MODEL, chosen) if weights == "meta" else made.MODEL(chosen)
    model.method, model.options = name, dataclasses.asdict(chosen)
    model.random_towers = weights == "random"
    for option, parts in its_towers.items():
        if (tower := getattr(chosen, option)) in files:
            modules = {part: model.get_submodule(path) for part, path in parts.items()}
            model.take_scalars(option, load_tower(tower, files[tower], modules))
    if weights != "meta":
        fill(model, model.drawn)
    if weights == "published":
        model.weights_loaded()
    return model.eval()


def _on_meta(model: type[Segmentor], chosen: Any) -> Segmentor:
    """Return a model whose parameters have no values; the caller's random numbers are left as they were."""
    import torch

    from mfuser.towers.meta import unfilled

    with torch.random.fork_rng(devices=[]), unfilled():
        return model(chosen)
