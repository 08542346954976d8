"""A recipe's method and its options: checks of names, then those that need the method itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict
from dataclasses import Field as DataclassField
from dataclasses import fields as dataclass_fields
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from dgbench.errors import spelled, suggest, unknown
from dgbench.spec import Problem, problems_of, shown, strictly

TOWER_OPTIONS = ("vfm", "vlm", "backbone", "tower")  # of methods
# options that make another model of the same towers, and what is written before a value that would not say of what it is
_TELLING = {"fuser": "", "adapter": "adapter ", "variant": "", "enhancer": "enhancer ", "image_tower": "image tower "}

# set from `data.crop` and by the benchmark, never in a recipe's `method`
SET_ELSEWHERE = {"image_size": "set `data.crop` instead", "classes": "the 19 evaluated classes are fixed"}


class MethodSpec(BaseModel):
    """The method and its own options, checked against `mfuser.options(name)`."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def options(self) -> dict[str, Any]:
        """The method's options, for `mfuser.build(name, **options, image_size=recipe.data.crop)`."""
        return dict(self.model_extra or {})

    @property
    def towers(self) -> list[str]:
        """Options that name the towers of this model."""
        from mfuser.methods import names, towers

        built = towers(self.name, self.options) if self.name in names() else TOWER_OPTIONS
        own = towers(self.name) if self.name in names() else TOWER_OPTIONS
        return [key for key in TOWER_OPTIONS if key in built or key not in own]

    @property
    def variant(self) -> str:
        """Towers and unusual options, which distinguish builds of a method on the leaderboard."""
        options = self.options
        towers = " + ".join(str(options[key]) for key in self.towers if options.get(key))
        usual = _usual(self.name)
        unusual = {key: options[key] for key in _TELLING if options.get(key) not in (None, usual.get(key))}
        named = [f"{_TELLING[key] or ('fuser ' if value == 'none' else '')}{value}" for key, value in unusual.items()]
        return ", ".join([towers, *named]) if towers else ""


def _usual(method: str) -> Mapping[str, Any]:
    """Return the defaults of a method's options, read without importing it; none for an unknown method."""
    from mfuser.methods import described_options, names

    return {option.name: option.default for option in described_options(method)} if method in names() else {}


def later(method: str) -> Mapping[str, Any]:
    """Return the options of a method that are newer than its recipes' hashes, with their defaults; none for an unknown method."""
    from mfuser.methods import later, names

    return later(method) if method in names() else {}


def spell(content: dict[str, Any]) -> None:
    """Replace names of a recipe's method and towers by their own spelling, in place: `EVA02` is `eva02`."""
    from mfuser.methods import names
    from mfuser.towers.table import TOWERS

    method = content.get("method")
    if not isinstance(method, dict):
        return
    content["method"] = method = dict(method)
    for key, known in (("name", names()), *((tower, list(TOWERS)) for tower in TOWER_OPTIONS)):
        if isinstance(method.get(key), str):
            method[key] = spelled(method[key], known) or method[key]


def check_names(content: Mapping[str, Any]) -> list[Problem]:
    """Return problems of a method's name, its keys and its towers, as far as possible without importing torch."""
    from mfuser.methods import backbone_names, names, option_names
    from mfuser.towers.table import TIMM, TOWERS, plain, with_text

    method = content.get("method")
    if not isinstance(method, dict) or not isinstance(method.get("name"), str):
        return []  # the recipe's own check reports it
    name = method["name"]
    if name not in names():
        message, hint = unknown("method", name, names())
        return [Problem(("method", "name"), f"{message}, {hint}")]
    problems = []
    known = [key for key in option_names(name) if key not in SET_ELSEWHERE]
    for key, value in method.items():
        if key in SET_ELSEWHERE:
            problems.append(Problem(("method", key), SET_ELSEWHERE[key]))
        elif key != "name" and key not in known:
            close = suggest(str(key), known)
            more = f"did you mean `{close}`?" if close else f"choose from {', '.join(sorted(known))}"
            problems.append(Problem(("method", key), f"unknown key, {more}"))
        elif key in TOWER_OPTIONS:
            towers = sorted({"vlm": with_text, "vfm": plain}.get(key, lambda: list(TOWERS))())
            if not isinstance(value, str):
                problems.append(Problem(("method", key), f"expected the name of a tower, got {shown(value)}"))
            elif value not in (*towers, *backbone_names(name)) and (key == "vlm" or not value.startswith(TIMM)):
                textless = value in TOWERS or value.startswith(TIMM)
                more = f"`{value}` has no text tower" if textless else f"{key} `{value}` is unknown"
                if value in TOWERS and TOWERS[value].channels:
                    more = f"`{value}` is a convolutional network, which cannot be a {key}"
                close = suggest(value, towers)
                also = f", or {TIMM}<model>" if key != "vlm" else ""
                more += f", did you mean `{close}`?" if close else f"; choose from {', '.join(towers)}{also}"
                problems.append(Problem(("method", key), more))
    return problems


def filled_in(method: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Return a method with every option written out, or the problems of the given ones. This imports the method and torch."""
    import mfuser

    name = method["name"]
    options = mfuser.options(name)
    hints = get_type_hints(options)
    fields = (f for f in dataclass_fields(options) if f.name not in SET_ELSEWHERE)
    defaults: dict[str, Any] = {f.name: (strictly(hints[f.name]), _default(f)) for f in fields}
    checked = create_model("Options", __config__=ConfigDict(extra="forbid"), **defaults)
    try:
        values = checked.model_validate({key: value for key, value in method.items() if key != "name"})
    except ValidationError as error:
        return {}, problems_of(error, checked, prefix=("method",))
    try:
        # the dataclass fills in what depends on other options; the run keeps the filled-in values
        resolved = json.loads(json.dumps(asdict(options(**values.model_dump()))))
    except ValueError as error:
        return {}, [Problem(("method",), str(error))]
    return {"name": name, **{key: value for key, value in resolved.items() if key not in SET_ELSEWHERE}}, []


def _default(field: DataclassField[Any]) -> Any:
    if field.default_factory is not MISSING:
        return Field(default_factory=field.default_factory)
    return ... if field.default is MISSING else field.default
