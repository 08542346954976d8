"""Validation of recipes and domain declarations against pydantic models.

Every problem becomes one line with its key path, so that all of them can be shown at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import UnionType
from typing import Annotated, Any, LiteralString, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from dgbench.errors import DgbenchError, suggest
from dgbench.yaml_text import decimal

_OWN = "own"  # errors raised here and in the models, whose text is complete


class Spec(BaseModel):
    """A model without unknown keys, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def own(text: LiteralString | str) -> PydanticCustomError:
    """Return a problem with a complete text, which is shown after its key path without changes."""
    return PydanticCustomError(_OWN, "{text}", {"text": text})


def one_line(error: DgbenchError) -> str:
    """Return message and hint of an error in one line, for a list of problems."""
    return error.message + (f", {error.hint}" if error.hint else "")


def _numeric(what: str, value: Any) -> Any:
    # pydantic reads true as 1, and texts as numbers
    if isinstance(value, bool):
        raise own(f"expected {what}, got {shown(value)}")
    if isinstance(value, str):
        plain = decimal(value)
        if plain is None or (what == "an integer" and not re.fullmatch(r"[-+]?[0-9]+", plain)):
            raise own(f"expected {what}, got {shown(value)}")
        raise own(f"expected {what}, got the text {shown(value)}: write {plain}")
    return value


def _truth(value: Any) -> Any:
    # pydantic takes 1, "t" and "y", too
    words = {"yes": True, "on": True, "no": False, "off": False}  # YAML 1.1's
    value = words.get(value.lower(), value) if isinstance(value, str) else value
    if not isinstance(value, bool):
        raise own(f"expected true or false, got {shown(value)}")
    return value


Whole = Annotated[int, BeforeValidator(partial(_numeric, "an integer"))]
Count = Annotated[Whole, Field(ge=1)]
Number = Annotated[float, BeforeValidator(partial(_numeric, "a number")), Field(allow_inf_nan=False)]
Flag = Annotated[bool, BeforeValidator(_truth)]


def strictly(annotation: Any) -> Any:
    """Return an annotation that reads numbers and booleans strictly: neither is accepted for the other, nor text for either."""
    plain = {int: Whole, float: Number, bool: Flag}
    if annotation in plain:
        return plain[annotation]
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return Union[tuple(map(strictly, parts))]  # noqa: UP007  of a tuple of types
    if origin in (list, tuple, dict):
        return origin[tuple(part if part is ... else strictly(part) for part in parts)]
    return annotation


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, and the keys that lead to it."""

    keys: tuple[str | int, ...]
    text: str

    def __str__(self) -> str:
        return f"{_key_path(self.keys)}: {self.text}"


def problems_of(error: ValidationError, model: type[BaseModel], prefix: tuple[str | int, ...] = ()) -> list[Problem]:
    """Return pydantic's errors in our words: the keys, what was expected and what was given."""
    # pydantic reports a list with wrong values as too short, too
    told = [d for d in error.errors() if d["type"] != "too_short" or len(d["input"]) < d["ctx"]["min_length"]]
    return [problem_of(details, model, prefix) for details in told]


def problem_of(details: ErrorDetails, model: Any = None, prefix: tuple[str | int, ...] = ()) -> Problem:
    """Convert one of pydantic's errors.

    Args:
        model: whose keys are suggested for an unknown one, if there is one.    prefix: keys that lead to the model.
    """
    loc, kind, given = details["loc"], details["type"], shown(details["input"])
    # a wrong key of a dictionary is reported with the dictionary
    loc = loc[:-2] if loc[-1:] == ("[key]",) else loc
    context = details.get("ctx", {})
    text = f"expected another kind of value, got {given}"
    if kind == "extra_forbidden":
        known = _keys_at(model, loc[:-1]) if model is not None else set()
        close = suggest(str(loc[-1]), known)
        more = f", did you mean `{close}`?" if close else f", choose from {', '.join(sorted(known))}" if known else ""
        text = f"unknown key{more}"
    elif kind == "missing" and loc and isinstance(loc[-1], int):
        loc, text = loc[:-1], f"expected more than {loc[-1]} values"
    elif kind == "missing":
        text = "missing"
    elif kind == "literal_error":
        text = f"expected {context['expected']}, got {given}"
    elif kind in _BOUNDS:
        word, key = _BOUNDS[kind]
        text = f"must be {word} {context[key]}, got {given}"
    elif kind in ("too_short", "too_long"):
        text = f"expected {_how_many(kind, context)}, got {given}"
    elif kind in _EXPECTED:
        text = f"expected {_EXPECTED[kind]}, got {given}"
        if _EXPECTED[kind] == "a list" and isinstance(details["input"], str | int | float):
            text += f": write [{details['input']}]" if len(str(details["input"])) <= 40 else ": write it in [ ]"
    elif kind == _OWN:
        text = details["msg"]
    return Problem((*prefix, *loc), text)


def _how_many(kind: str, context: dict[str, Any]) -> str:
    if kind == "too_long":
        most = context.get("max_length")
        return "one value" if most == 1 else f"at most {most} values"
    least = context.get("min_length")
    return "at least one value" if least == 1 else f"at least {least} values"


_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("above", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("below", "lt"),
}
_EXPECTED = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "an integer"),
    **dict.fromkeys(("float_type", "float_parsing", "finite_number"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("tuple_type", "list_type", "set_type", "iterable_type"), "a list"),
    **dict.fromkeys(
        ("model_type", "model_attributes_type", "dict_type", "mapping_type", "dataclass_type", "dataclass_exact_type"),
        "`key: value` pairs",
    ),
    **dict.fromkeys(("string_type", "string_sub_type", "string_unicode", "invalid_key"), "text"),
    "string_pattern_mismatch": "a text of another form",
    "string_too_short": "a longer text",
    "string_too_long": "a shorter text",
    "none_required": "nothing",
    "recursion_loop": "something that does not hold itself",
}


def _key_path(loc: Sequence[str | int]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return text.removeprefix(".") or "the whole"


def shown(value: Any) -> str:
    """Return a value for a message: short, and as YAML writes it."""
    text = "nothing" if value is None else _written(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _written(value: Any, depth: int = 0) -> str:
    if depth > 8:
        return "..."
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(_written(part, depth + 1) for part in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_written(part, depth + 1)}' for key, part in value.items())}}}"
    return repr(value)


def _keys_at(model: Any, loc: Sequence[str | int]) -> set[str]:
    """Return the keys of `model` at a location."""
    for part in loc:
        if isinstance(part, str) and part in model.model_fields:
            model = next(iter(_models_in(model.model_fields[part].annotation)), model)
    return {field.alias or name for name, field in model.model_fields.items()}


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)
