"""Recipes: YAML files that name every choice of an experiment, checked as a whole before anything runs.

A recipe may extend one parent, which may not extend another. All problems are reported in one message, each with its
key path. The resolved recipe, with every default written out, is what a run keeps and what is hashed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict
from dataclasses import Field as DataclassField
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    model_validator,
)

from dgbench import atomic
from dgbench.data.custom import Declared, UserDomain, declare, read
from dgbench.data.custom import find as find_declared
from dgbench.data.domains import built_in
from dgbench.errors import DgbenchError, RecipeError, unknown
from dgbench.resources import recipes_dir
from dgbench.spec import Count, Loader, Number, Spec, Whole, one_line, own, parse, problem_line

# set from `data.crop` and by the benchmark, never in a recipe's `method`
_SET_ELSEWHERE = {"image_size": "set `data.crop` instead", "classes": "the 19 evaluated classes are fixed"}


def _no_is_text(value: Any) -> Any:
    # YAML 1.1 reads a bare `no` as false
    return "no" if value is False else value


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
            read_ones = [read(Path(str(path))) for path in given]
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


class MethodSpec(BaseModel):
    """The method and its own options, checked against `mfuser.options(name)`."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def options(self) -> dict[str, Any]:
        """The method's options, for `mfuser.build(name, **options, image_size=recipe.data.crop)`."""
        return dict(self.model_extra or {})

    @property
    def variant(self) -> str:
        """What tells two builds of a method apart on a leaderboard: its towers, and what else is not as usual."""
        options = self.options
        towers = " + ".join(str(options[key]) for key in ("vfm", "vlm", "backbone", "tower") if options.get(key))
        unusual = [options.get(key) for key, usual in (("fuser", "mvfuser"), ("variant", "release"))
                   if options.get(key) not in (None, usual)]  # fmt: skip
        return ", ".join([towers, *map(str, unusual)]) if towers else ""


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
    photometric: bool = True

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
    precision: Annotated[Literal["no", "bf16"], BeforeValidator(_no_is_text)] = "no"
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


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = (), *, check_method: bool = True) -> Recipe:
    """Read, resolve and check a recipe.

    Args:
        name_or_path: a shipped recipe's name (`streets/mfuser`) or a YAML file.
        overrides: `key.path=value` texts; values are YAML scalars or lists.
        check_method: fill in and check the method's own options, which imports the method and torch.

    Raises: RecipeError listing every problem with its key path.
    """
    path = _locate(name_or_path)
    content = _with_parent(path)
    problems = _override(content, overrides)
    content.setdefault("name", _name_of(path))
    recipe: Recipe | None = None
    if check_method:
        problems += _check_options(content)
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        problems += [problem_line(details, Recipe) for details in error.errors()]
    if problems or recipe is None:
        count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
        listed = "".join(f"\n  {problem}" for problem in dict.fromkeys(problems))
        raise RecipeError(f"recipe `{content['name']}` has {count}:{listed}", _where(path, overrides))
    return recipe


def load_method(name: str, options: Mapping[str, Any], overrides: Sequence[str] = ()) -> MethodSpec:
    """Return a method outside of any recipe, with these options and every other at its default.

    Args:
        overrides: `method.key=value` texts.

    Raises: RecipeError listing every problem with its key path.
    """
    content: dict[str, Any] = {"method": {"name": name, **options}}
    problems = _override(content, overrides)
    problems += [f"{key}: a method alone has no such section" for key in content if key != "method"]
    problems += _check_options(content)
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise RecipeError(f"method `{name}` cannot be built:{listed}", "set its options by --set method.key=value")
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
    """Write the resolved recipe as YAML that `load_recipe` reads back to an equal recipe."""
    content = recipe.model_dump(mode="json", by_alias=True)
    if not recipe.data.domains:
        del content["data"]["domains"]
    for row in content["expect"]:
        for key in ("seeds", "weights"):
            if not row[key]:
                del row[key]
    head = f"# Resolved recipe {recipe.name}, hash {recipe_hash(recipe)}.\n"
    return atomic.write(path, head + yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=120, default_flow_style=None))


def recipe_names() -> list[str]:
    """Return the shipped recipes, e.g. `streets/mfuser`; parents (`_*`) are not runnable and left out."""
    root = recipes_dir()
    paths = (path for path in root.rglob("*.yaml") if not path.name.startswith("_"))
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in paths)


def key_paths() -> list[str]:
    """Return the keys that an override may set, e.g. `train.steps`; a method's own options depend on the recipe."""
    sections: dict[str, type[BaseModel]] = {"data": DataSpec, "train": TrainSpec, "optim": OptimSpec, "eval": EvalSpec}
    return [f"{section}.{name}" for section, spec in sections.items() for name in spec.model_fields]


def find(method: str, vlm: str | None = None, source: str | None = None) -> str:
    """Return the shipped recipe that trains `method`, with this vision-language tower and source if they are given.

    Without either it is the method's recipe on procedural streets, which needs no download. A recipe named after the
    method comes first, then one on gta5.

    Raises: RecipeError if there is none, or several equally near.
    """
    from dgbench.data.domains import lookup as domain

    rows = [(name, _peek(name)) for name in recipe_names()]
    if source is not None:
        source = domain(source).name
    mine = [(name, row) for name, row in rows if row["method"] == method]
    if not mine:
        raise RecipeError(*unknown("method", method, {row["method"] for _, row in rows if row["method"]}))
    fitting = [(n, r) for n, r in mine if _same_tower(vlm, r["vlm"]) and source in (None, r["source"])]
    if not fitting:
        flags = "".join(f" --{key} {value}" for key, value in (("vlm", vlm), ("source", source)) if value)
        have = ", ".join(f"{name} ({row['vlm'] or '-'}, {row['source']})" for name, row in mine)
        raise RecipeError(f"no recipe for `{method}`{flags}", f"recipes of this method (vlm, source): {have}")
    ranked = sorted(fitting, key=lambda item: _distance(item[0], item[1], method))
    best = [name for name, row in ranked if _distance(name, row, method) == _distance(*ranked[0], method)]
    if len(best) > 1:
        raise RecipeError(f"several recipes fit `{method}`: {', '.join(best)}", "name one of them, or add --vlm")
    return best[0]


def resolve(
    name: str = "mfuser", *, vlm: str | None = None, vfm: str | None = None, source: str | None = None
) -> tuple[str, list[str]]:
    """Return the recipe meant by a method or recipe name with flags, and the overrides that the flags add to it.

    A method's name picks among its recipes by the flags; whatever the picked recipe does not already say is overridden.

    Raises: RecipeError for an unknown name, or a method without a recipe for this tower.
    """
    overrides = [f"method.vfm={vfm}"] if vfm else []
    if name in recipe_names() or "/" in name or Path(name).suffix in (".yaml", ".yml"):
        return name, [
            *overrides,
            *([f"method.vlm={vlm}"] if vlm else []),
            *([f"data.source={source}"] if source else []),
        ]
    try:
        return find(name, vlm, source), overrides
    except RecipeError:
        # no recipe of this method trains on that source: take its usual one and change the source
        return find(name, vlm), [*overrides, *([f"data.source={source}"] if source else [])]


def _distance(name: str, row: Mapping[str, str], method: str) -> tuple[bool, bool, bool]:
    return not name.startswith("streets/"), name.rpartition("/")[2] != method, row["source"] != "gta5"


def _same_tower(asked: str | None, has: str) -> bool:
    # `eva02` and its full name `eva02_l_336` are one tower
    return asked is None or asked == has or (bool(has) and asked.startswith(f"{has}_")) or has.startswith(f"{asked}_")


def _peek(name: str) -> dict[str, str]:
    """Return method, vlm and source of a shipped recipe without checking it."""
    content = _with_parent(_locate(name))
    method, data = content.get("method"), content.get("data")
    method, data = (part if isinstance(part, dict) else {} for part in (method, data))
    return {
        "method": str(method.get("name", "")),
        "vlm": str(method.get("vlm", "")),
        "source": str(data.get("source", "")),
    }


def _locate(name_or_path: str | Path) -> Path:
    text = str(name_or_path)
    shipped = recipes_dir() / f"{text}.yaml"
    if shipped.is_file() and not shipped.name.startswith("_"):
        return shipped
    path = Path(text)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise RecipeError(f"no recipe file {path}", f"shipped recipes need no path or suffix: {', '.join(recipe_names())}")
        return path
    raise RecipeError(*unknown("recipe", text, recipe_names()))


def _name_of(path: Path) -> str:
    root = recipes_dir()
    return path.relative_to(root).with_suffix("").as_posix() if path.is_relative_to(root) else path.stem


def _where(path: Path, overrides: Sequence[str]) -> str:
    return f"edit {path}" if not overrides else f"edit {path}, or change --set"


def _with_parent(path: Path) -> dict[str, Any]:
    """Return a recipe's content merged over its parent's."""
    child = _read(path)
    parent_name = child.pop("extends", None)
    if parent_name is None:
        return child
    if not isinstance(parent_name, str):
        raise RecipeError(f"{path}: extends: expected one file name, got {parent_name!r}", "a recipe has one parent")
    # a parent lies beside its child, or among the shipped ones
    places = [path.parent / parent_name, recipes_dir() / parent_name]
    parent_path = next((place for place in places if place.is_file()), None)
    if parent_path is None:
        near = sorted({p.name for place in places for p in place.parent.glob("*.yaml")})
        raise RecipeError(
            f"{path}: extends: no file {parent_name} in {path.parent} or {recipes_dir()}",
            unknown("", parent_name, near)[1],
        )
    parent = _read(parent_path)
    if "extends" in parent:
        raise RecipeError(
            f"{path}: its parent {parent_path} extends {parent['extends']}; only one level is allowed",
            "a reader should need two files at most: state the values in the child",
        )
    return _merged(parent, child)


def _read(path: Path) -> dict[str, Any]:
    content = parse(path, RecipeError, "recipes/streets/mfuser.yaml")
    data = content.get("data")
    if isinstance(data, dict) and isinstance(data.get("domains"), list):
        # files lie beside the recipe that names them
        data["domains"] = [str(path.parent / str(file)) for file in data["domains"]]
    return content


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `over` on top: mappings merge, everything else replaces."""
    result = dict(base)
    for key, value in over.items():
        below = base.get(key)
        # another method's options would be nonsense for this one
        replaces = key == "method" and isinstance(value, dict) and isinstance(below, dict) and _other_method(below, value)
        result[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) and not replaces else value
    return result


def _other_method(below: dict[str, Any], above: dict[str, Any]) -> bool:
    return "name" in below and "name" in above and below["name"] != above["name"]


class _Dumper(yaml.SafeDumper):
    """YAML's safe dumper with floats that YAML 1.1 reads back as floats: 1.0e-05, not 1e-05."""


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    text = repr(value)
    return dumper.represent_scalar(
        "tag:yaml.org,2002:float", text.replace("e", ".0e") if "e" in text and "." not in text else text
    )


_Dumper.add_representer(float, _represent_float)


def _override(content: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Apply `key.path=value` texts to `content` in place; return what is wrong with them."""
    problems = []
    for text in overrides:
        keys, equals, value_text = text.partition("=")
        path = keys.strip().split(".")
        if not equals or not all(path):
            problems.append(f"{text}: expected key.path=value, as in train.steps=200")
            continue
        try:
            value = yaml.load(value_text, Loader=Loader)
        except yaml.YAMLError:
            problems.append(f"{'.'.join(path)}: `{value_text}` is not a YAML value")
            continue
        place: Any = content
        for depth, key in enumerate(path[:-1]):
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                problems.append(f"{'.'.join(path)}: `{'.'.join(path[: depth + 1])}` is a value and has no keys")
                break
        else:
            place[path[-1]] = value
    return problems


def _check_options(content: dict[str, Any]) -> list[str]:
    """Fill in the method's options with their defaults, in place; return what is wrong with them."""
    method = content.get("method")
    if not isinstance(method, dict) or not isinstance(method.get("name"), str):
        return []  # the recipe's own check says so
    import mfuser

    name = method["name"]
    if name not in mfuser.method_names():
        message, hint = unknown("method", name, mfuser.method_names())
        return [f"method.name: {message}, {hint}"]
    options = mfuser.options(name)
    hints = get_type_hints(options)
    fields = (f for f in dataclass_fields(options) if f.name not in _SET_ELSEWHERE)
    defaults: dict[str, Any] = {f.name: (hints[f.name], _default(f)) for f in fields}
    checked = create_model("Options", __config__=ConfigDict(extra="forbid"), **defaults)
    given = {key: value for key, value in method.items() if key != "name"}
    misplaced = [f"method.{key}: {_SET_ELSEWHERE[key]}" for key in given if key in _SET_ELSEWHERE]
    try:
        values = checked.model_validate({key: value for key, value in given.items() if key not in _SET_ELSEWHERE})
    except ValidationError as error:
        return misplaced + [problem_line(details, checked, prefix=("method",)) for details in error.errors()]
    try:
        # the dataclass fills in what depends on other options; the run keeps the filled-in values
        resolved = json.loads(json.dumps(asdict(options(**values.model_dump()))))
    except ValueError as error:
        return [*misplaced, f"method: {error}"]
    content["method"] = {"name": name, **{key: value for key, value in resolved.items() if key not in _SET_ELSEWHERE}}
    return misplaced


def _default(field: DataclassField[Any]) -> Any:
    if field.default_factory is not MISSING:
        return Field(default_factory=field.default_factory)
    return ... if field.default is MISSING else field.default
