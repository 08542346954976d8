"""YAML texts checked against pydantic models: what recipes and declarations of domains have in common.

Every problem becomes one line with its key path, so that all of them can be shown at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, LiteralString, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import ErrorDetails, PydanticCustomError

from dgbench.errors import DgbenchError, suggest

_OWN = "own"  # errors raised here and in the models: complete sentences


class Spec(BaseModel):
    """A model without unknown keys, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def own(text: LiteralString | str) -> PydanticCustomError:
    """A problem whose text is complete: it is shown behind its key path as it is."""
    return PydanticCustomError(_OWN, "{text}", {"text": text})


def one_line(error: DgbenchError) -> str:
    """Message and hint of an error, to stand in a list of problems."""
    return error.message + (f", {error.hint}" if error.hint else "")


def _no_bool(value: Any) -> Any:
    # pydantic reads true as 1
    if isinstance(value, bool):
        raise PydanticCustomError("number_type", "expected a number")
    return value


Whole = Annotated[int, BeforeValidator(_no_bool)]
Count = Annotated[Whole, Field(ge=1)]
Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]


class Loader(yaml.SafeLoader):
    """YAML's safe loader, except that a repeated key is an error and not a silent choice of the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key `{key.value}` is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse(path: Path, error: type[DgbenchError], example: str) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Args:
        error: what to raise. example: where to look how such a file is written.

    Raises: `error` naming the file and the line.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark or problem.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise error(f"{path}{line}: not valid YAML: {problem.problem}", "check indentation, colons and brackets there") from None
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise error(f"{path}: not a YAML text: {problem}", "it should be a UTF-8 text file") from None
    if not isinstance(content, dict):
        raise error(f"{path}: expected `key: value` lines, got {type(content).__name__}", f"see {example}")
    return content


def problem_line(details: ErrorDetails, model: type[BaseModel], prefix: tuple[str | int, ...] = ()) -> str:
    """Return one line for one pydantic error: the key path, what was expected and what was given."""
    loc, kind, given = details["loc"], details["type"], _shown(details["input"])
    context = details.get("ctx", {})
    path = _key_path((*prefix, *loc))
    if kind == "extra_forbidden":
        close = suggest(str(loc[-1]), _keys_at(model, loc[:-1]))
        listed = ", ".join(sorted(_keys_at(model, loc[:-1])))
        return f"{path}: unknown key, " + (f"did you mean `{close}`?" if close else f"choose from {listed}")
    if kind == "missing" and isinstance(loc[-1], int):
        return f"{_key_path((*prefix, *loc[:-1]))}: expected more than {loc[-1]} values"
    if kind == "missing":
        return f"{path}: missing"
    if kind == "literal_error":
        return f"{path}: expected {context['expected']}, got {given}"
    if kind in _BOUNDS:
        word, key = _BOUNDS[kind]
        return f"{path}: must be {word} {context[key]}, got {given}"
    if kind in _EXPECTED:
        return f"{path}: expected {_EXPECTED[kind]}, got {given}"
    if kind == _OWN:
        return f"{path}: {details['msg']}"
    return f"{path}: {details['msg'][:1].lower()}{details['msg'][1:]}, got {given}"


_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("above", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("below", "lt"),
}
_EXPECTED = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "an integer"),
    **dict.fromkeys(("float_type", "float_parsing", "number_type", "finite_number"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("tuple_type", "list_type"), "a list"),
    **dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "`key: value` pairs"),
    "string_type": "text",
    "too_short": "at least one value",
    "too_long": "fewer values",
}


def _key_path(loc: Sequence[str | int]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return text.removeprefix(".") or "recipe"


def _shown(value: Any) -> str:
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 60 else text[:57] + "..."


def _keys_at(model: type[BaseModel], loc: Sequence[str | int]) -> set[str]:
    """Return the keys that `model` knows at a place."""
    for part in loc:
        if isinstance(part, str) and part in model.model_fields:
            model = next(iter(_models_in(model.model_fields[part].annotation)), model)
    return {field.alias or name for name, field in model.model_fields.items()}


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)
