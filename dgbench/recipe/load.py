"""Read, check, hash and write recipes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from dgbench import atomic
from dgbench.errors import RecipeError
from dgbench.recipe import method as method_options
from dgbench.recipe.data import DataSpec, Known
from dgbench.recipe.files import Given, is_shipped, locate, name_of, override, sealed, with_parent
from dgbench.recipe.method import MethodSpec
from dgbench.recipe.model import EvalSpec, Recipe
from dgbench.recipe.training import OptimSpec, TrainSpec
from dgbench.spec import Problem, problems_of
from dgbench.yaml_text import dumped


def load_recipe(
    name_or_path: str | Path,
    overrides: Sequence[str] = (),
    *,
    flags: Sequence[str] = (),
    check_method: bool | Literal["names"] = True,
    root: Path | None = None,
) -> Recipe:
    """Read, resolve and check a recipe.

    Args:
        name_or_path: a shipped recipe's name (`streets/mfuser`) or a YAML file.
        overrides: `key.path=value` texts; values are YAML scalars or lists.
        flags: such texts from a command's own options, as `resolve` returns them; applied first.
        check_method: fill in and check the method's own options, which imports the method and torch. Whatever is wrong
            otherwise is told before that; `names` stops there.
        root: data root in which domains are looked for that the recipe does not declare; default: DGBENCH_DATA or `./data`.

    Raises: RecipeError listing every problem with its key path.
    """
    path = locate(name_or_path)
    content = with_parent(path)
    given, problems = override(content, flags, overrides, Recipe)
    content.setdefault("name", name_of(path))
    method_options.spell(content)
    if check_method:
        problems += method_options.check_names(content)
    recipe, found = _checked(content, root)
    problems += found
    if check_method is True and recipe is not None and not problems:
        method, problems = method_options.filled_in(content["method"])
        if not problems:
            return recipe.model_copy(update={"method": MethodSpec.model_validate(method)})
    if problems or recipe is None:
        raise RecipeError(_listed(f"recipe `{content['name']}` has", problems), _where(path, given, problems))
    return recipe


def _checked(content: Mapping[str, Any], root: Path | None) -> tuple[Recipe | None, list[Problem]]:
    try:
        return Recipe.model_validate(content, context=Known(root)), []
    except ValidationError as error:
        return None, problems_of(error, Recipe)


def _listed(head: str, problems: Sequence[Problem]) -> str:
    lines = dict.fromkeys(_printable(str(problem)) for problem in problems)
    return f"{head} {'one problem' if len(lines) == 1 else f'{len(lines)} problems'}:" + "".join(f"\n  {line}" for line in lines)


def _where(path: Path, given: Sequence[Given], problems: Sequence[Problem]) -> str:
    """Return what to change: the options that set the wrong keys, and the file with the others."""
    options = [one.option for one in given if any(one.covers(problem.keys) for problem in problems)]
    steps = [f"check {', '.join(dict.fromkeys(options))}"] if options else []
    if any(not any(one.covers(problem.keys) for one in given) for problem in problems):
        steps.append(f"copy {path} and change the copy, or set other values by --set" if is_shipped(path) else f"edit {path}")
    return _printable("; ".join(steps))


def _printable(text: str) -> str:
    # arguments of a shell need not be UTF-8
    return text.encode("utf-8", "backslashreplace").decode()


def load_method(name: str, options: Mapping[str, Any], overrides: Sequence[str] = ()) -> MethodSpec:
    """Return a method outside of any recipe, with these options and every other at its default.

    Args:
        overrides: `method.key=value` texts.

    Raises: RecipeError listing every problem with its key path.
    """
    content: dict[str, Any] = {"method": {"name": name, **options}}
    _, problems = override(content, (), overrides, Recipe)
    problems += [Problem((key,), "a method alone has no such section") for key in content if key != "method"]
    method_options.spell(content)
    problems += method_options.check_names(content)
    if not problems and isinstance(content["method"], dict):
        content["method"], problems = method_options.filled_in(content["method"])
    if problems or not isinstance(content["method"], dict):
        raise RecipeError(_listed(f"method `{name}` cannot be built:", problems), "set its options by --set method.key=value")
    return MethodSpec.model_validate(content["method"])


# keys that are newer than recipe hashes: at their default they are left out of hashes and files
_LATER = {
    "data": ("source_split", "source_weights", "resize", "sampling", "class_uniform", "extra"),
    "train": ("init", "frozen", "compile", "graphs", "checkpoint_activations", "accumulate", "ema"),
    "optim": ("optimizer", "betas", "momentum", "nesterov", "schedule", "ends", "weight_decay_schedule", "groups"),
    "eval": ("mode",),
}


def recipe_hash(recipe: Recipe) -> str:
    """Return 12 hex digits of what determines the experiment: everything but the name and the expected results."""
    content = recipe.model_dump(mode="json", exclude={"expect", "name"})
    # only what determines pixels and labels counts in a declaration; unused domains do not change the hash
    if declared := content["data"].pop("domains"):
        content["data"]["declared"] = {name: recipe.data.domains[name].digest() for name in declared}
    _leave_out_unused(recipe, content)
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _leave_out_unused(recipe: Recipe, content: dict[str, Any]) -> None:
    for section, names in _LATER.items():
        usual = type(getattr(recipe, section)).model_fields
        for name in names:
            if getattr(getattr(recipe, section), name) == usual[name].get_default(call_default_factory=True):
                del content[section][name]
    for name, default in method_options.later(recipe.method.name).items():
        if content["method"].get(name) == default:
            content["method"].pop(name, None)


def dump(recipe: Recipe, path: Path) -> Path:
    """Write the resolved recipe as YAML that `load_recipe` reads back to an equal recipe, with its digest in the first line."""
    content = recipe.model_dump(mode="json", by_alias=True)
    if not recipe.data.domains:
        del content["data"]["domains"]
    _leave_out_unused(recipe, content)
    for row in content["expect"]:
        for key in ("seeds", "weights"):
            if not row[key]:
                del row[key]
    return atomic.write(path, sealed(f"# Resolved recipe {recipe.name}, hash {recipe_hash(recipe)}", dumped(content)))


def key_paths() -> list[str]:
    """Return the keys that an override may set, e.g. `train.steps`; a method's own options depend on the recipe."""
    sections: dict[str, type[BaseModel]] = {"data": DataSpec, "train": TrainSpec, "optim": OptimSpec, "eval": EvalSpec}
    return [f"{section}.{name}" for section, spec in sections.items() for name in spec.model_fields]
