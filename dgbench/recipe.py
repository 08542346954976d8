"""Recipes: YAML files that name every choice of an experiment, checked as a whole before anything runs.

A recipe may extend one parent, which may not extend another. All problems are reported in one message, each with its
key path. The resolved recipe, with every default written out, is what a run keeps and what is hashed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from dgbench import atomic, method_options
from dgbench.data.custom import Declared, UserDomain, declare, read
from dgbench.data.custom import find as find_declared
from dgbench.data.domains import built_in
from dgbench.errors import DgbenchError, RecipeError
from dgbench.method_options import MethodSpec
from dgbench.recipe_files import Given, find, is_shipped, locate, name_of, override, recipe_names, resolve, sealed, with_parent
from dgbench.spec import Count, Flag, Number, Problem, Spec, Whole, one_line, own, problems_of, shown
from dgbench.yaml_text import dumped

__all__ = [
    "DataSpec",
    "EvalSpec",
    "Expectation",
    "MethodSpec",
    "OptimSpec",
    "Recipe",
    "TrainSpec",
    "dump",
    "find",
    "key_paths",
    "load_method",
    "load_recipe",
    "recipe_hash",
    "recipe_names",
    "resolve",
]


def _known_domain(name: str) -> str:
    from dgbench.data.domains import lookup

    try:
        return lookup(name).name
    except DgbenchError as error:
        raise own(one_line(error)) from None


def _declare(given: dict[str, UserDomain]) -> dict[str, UserDomain]:
    for name, spec in given.items():
        try:
            declare(Declared(name, spec, "the recipe"))
        except DgbenchError as error:
            raise own(one_line(error)) from None
    return given


def _with_declarations(data: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's `data` with the declarations that it names in files, or that its domains have elsewhere, written out."""
    given, targets = data.get("domains", {}), data.get("targets")
    used = [data.get("source"), *(targets if isinstance(targets, list | tuple) else [])]
    try:
        if isinstance(given, list | tuple):
            if strange := [path for path in given if not isinstance(path, str)]:
                raise own(f"domains: expected paths of files that declare some, got {shown(strange[0])}")
            read_ones = [read(Path(path)) for path in given]
            given = {declared.name: declared.spec for declared in read_ones}
        if not isinstance(given, dict):
            return data  # the field's own check says so
        for name in (name for name in used if isinstance(name, str)):
            if name.endswith((".yaml", ".yml")):
                declared: Declared | None = read(Path(name))
            else:
                declared = None if name in given or built_in(name.partition("@")[0]) else find_declared(name)
            if declared is not None:
                given = given | {declared.name: declared.spec}
    except DgbenchError as error:
        raise own(one_line(error)) from None
    return data | {"domains": given} if given else data


def _known_protocol(name: str) -> str:
    from dgbench.protocol import lookup

    try:
        return lookup(name).name
    except DgbenchError as error:
        raise own(one_line(error)) from None


Size = tuple[Count, Count]  # (H, W)
DomainName = Annotated[str, AfterValidator(_known_domain)]


class DataSpec(Spec):
    """What is trained on, what is scored, and how images reach the model. Sizes are (H, W)."""

    # domains that the user declares, by name, or files that do; a resolved recipe holds those that it needs
    domains: Annotated[dict[str, UserDomain], AfterValidator(_declare)] = Field(default_factory=dict)
    source: DomainName
    source_split: str = "train"  # GTA5 has `official-train`, too
    targets: tuple[DomainName, ...] = Field(min_length=1)
    size: Size | None = None  # rendered or resized to this; null: as the files are
    crop: Size = (512, 512)  # training crop and test window
    train_images: Count | None = None  # the first so many; null: all
    val_images: Count | None = None  # anything but null marks the records as partial
    scale: tuple[Annotated[Number, Field(gt=0)], Annotated[Number, Field(gt=0)]] = (0.5, 2.0)  # random resize
    cat_max_ratio: Annotated[Number, Field(gt=0, le=1)] = 0.75  # a crop with a larger share of one class is drawn again
    rare_class_sampling: Annotated[Number, Field(gt=0)] | None = None  # temperature; null: uniform
    flip: Annotated[Number, Field(ge=0, le=1)] = 0.5
    photometric: Flag = True

    @model_validator(mode="before")
    @classmethod
    def _declares_what_it_names(cls, given: Any) -> Any:
        return _with_declarations(given) if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _fits_together(self) -> DataSpec:
        if problem := self._misfit():
            raise own(problem)
        return self

    def _misfit(self) -> str | None:
        from dgbench.data.domains import lookup

        if self.source in self.targets:
            return f"`{self.source}` is both source and target; targets must be unseen"
        if repeated := [name for i, name in enumerate(self.targets) if name in self.targets[:i]]:
            return f"`{repeated[0]}` is given twice in targets"
        for name, split in ((self.source, self.source_split), *((target, "val") for target in self.targets)):
            if split not in (splits := lookup(name).splits):
                return f"`{name}` has no split `{split}`, only {', '.join(splits)}"
        if self.scale[0] > self.scale[1]:
            return f"scale must rise, got {list(self.scale)}"
        if self.size is not None and (self.crop[0] > self.size[0] or self.crop[1] > self.size[1]):
            return f"crop {list(self.crop)} does not fit into size {list(self.size)}"
        return None


class TrainSpec(Spec):
    """How long and how the training loop runs."""

    steps: Count
    batch_size: Count  # over all processes
    seed: Annotated[Whole, Field(ge=0, lt=2**31)] = 0
    workers: Annotated[Whole, Field(ge=0)] = 0  # loader processes
    precision: Literal["no", "bf16"] = "no"
    log_every: Count = 10
    checkpoint_every: Count = 1000
    clip_norm: Annotated[Number, Field(gt=0)] | None = None


class OptimSpec(Spec):
    """AdamW with linear warm-up and poly decay."""

    lr: Annotated[Number, Field(gt=0)]
    weight_decay: Annotated[Number, Field(ge=0)] = 0.05
    warmup_steps: Annotated[Whole, Field(ge=0)] = 0
    warmup_ratio: Annotated[Number, Field(ge=0, le=1)] = 1.0e-6  # of lr at step 0
    power: Annotated[Number, Field(gt=0)] = 0.9
    min_lr: Annotated[Number, Field(ge=0)] = 0.0


class EvalSpec(Spec):
    """How checkpoints are scored."""

    protocol: Annotated[str, AfterValidator(_known_protocol)] = "unified"
    batch_size: Count = 1  # windows at a time


class Expectation(Spec):
    """A reference result of this recipe; shown as such, never ranked as one's own."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, serialize_by_alias=True)
    target: DomainName  # the source stands for its validation split
    miou: Annotated[Number, Field(ge=0, le=1)]
    tolerance: Annotated[Number, Field(ge=0, le=1)]  # on either side, over training seeds
    seeds: Annotated[Count, Field(ge=2)] | None = None  # runs that the tolerance was measured from; null: it is a margin
    # beginning of the sha256 of each tower's published weights, by option (vfm, vlm, backbone): it holds for no others
    weights: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{8,64}$")]] = Field(default_factory=dict)
    origin: str = Field(alias="from")  # the record or the paper it comes from


class Recipe(Spec):
    """One experiment: a method, trained on one source, scored on targets never seen."""

    name: str
    method: MethodSpec
    data: DataSpec
    train: TrainSpec
    optim: OptimSpec
    eval: EvalSpec = EvalSpec()
    expect: tuple[Expectation, ...] = ()


def load_recipe(
    name_or_path: str | Path, overrides: Sequence[str] = (), *, flags: Sequence[str] = (),
    check_method: bool | Literal["names"] = True,
) -> Recipe:  # fmt: skip
    """Read, resolve and check a recipe.

    Args:
        name_or_path: a shipped recipe's name (`streets/mfuser`) or a YAML file.
        overrides: `key.path=value` texts; values are YAML scalars or lists.
        flags: such texts for which a command has options of their own, as `resolve` returns them; applied first.
        check_method: fill in and check the method's own options, which imports the method and torch. Whatever is wrong
            otherwise is told before that; `names` stops there.

    Raises: RecipeError listing every problem with its key path.
    """
    path = locate(name_or_path)
    content = with_parent(path)
    given, problems = override(content, flags, overrides, Recipe)
    content.setdefault("name", name_of(path))
    method_options.spell(content)
    if check_method:
        problems += method_options.check_names(content)
    recipe, found = _checked(content)
    problems += found
    if check_method is True and recipe is not None and not problems:
        method, problems = method_options.filled_in(content["method"])
        if not problems:
            return recipe.model_copy(update={"method": MethodSpec.model_validate(method)})
    if problems or recipe is None:
        raise RecipeError(_listed(f"recipe `{content['name']}` has", problems), _where(path, given, problems))
    return recipe


def _checked(content: Mapping[str, Any]) -> tuple[Recipe | None, list[Problem]]:
    try:
        return Recipe.model_validate(content), []
    except ValidationError as error:
        return None, problems_of(error, Recipe)


def _listed(head: str, problems: Sequence[Problem]) -> str:
    lines = dict.fromkeys(_printable(str(problem)) for problem in problems)
    return f"{head} {'one problem' if len(lines) == 1 else f'{len(lines)} problems'}:" + "".join(f"\n  {line}" for line in lines)


def _where(path: Path, given: Sequence[Given], problems: Sequence[Problem]) -> str:
    """What to change: the options that set the keys at fault, and the file that holds the others."""
    options = [one.option for one in given if any(one.covers(problem.keys) for problem in problems)]
    steps = [f"check {', '.join(dict.fromkeys(options))}"] if options else []
    if any(not any(one.covers(problem.keys) for one in given) for problem in problems):
        steps.append(f"copy {path} and change the copy, or set other values by --set" if is_shipped(path) else f"edit {path}")
    return _printable("; ".join(steps))


def _printable(text: str) -> str:
    # what a shell hands over need not be UTF-8
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


def recipe_hash(recipe: Recipe) -> str:
    """Return 12 hex digits of what determines the experiment: everything but the name and the expected results."""
    content = recipe.model_dump(mode="json", exclude={"expect", "name"})
    # of a declaration counts what fixes pixels and labels; what a recipe does not use leaves its hash as it was
    if declared := content["data"].pop("domains"):
        content["data"]["declared"] = {name: recipe.data.domains[name].digest() for name in declared}
    if recipe.data.source_split == "train":
        del content["data"]["source_split"]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def dump(recipe: Recipe, path: Path) -> Path:
    """Write the resolved recipe as YAML that `load_recipe` reads back to an equal recipe, with its digest in the first line."""
    content = recipe.model_dump(mode="json", by_alias=True)
    if not recipe.data.domains:
        del content["data"]["domains"]
    for row in content["expect"]:
        for key in ("seeds", "weights"):
            if not row[key]:
                del row[key]
    return atomic.write(path, sealed(f"# Resolved recipe {recipe.name}, hash {recipe_hash(recipe)}", dumped(content)))


def key_paths() -> list[str]:
    """Return the keys that an override may set, e.g. `train.steps`; a method's own options depend on the recipe."""
    sections: dict[str, type[BaseModel]] = {"data": DataSpec, "train": TrainSpec, "optim": OptimSpec, "eval": EvalSpec}
    return [f"{section}.{name}" for section, spec in sections.items() for name in spec.model_fields]
