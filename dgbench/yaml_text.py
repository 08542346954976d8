"""Reading of YAML: plain values by the core schema of YAML 1.2, or as text where text is expected.

YAML 1.1, which most libraries read, makes `010` the number 8, `1:30` 90, `no` false, `2024-05-01` a date and `1e-4` a
text. Here digits are decimal numbers, only `true`, `false` and `null` are keywords, and everything else is text. A number
that begins with a zero is refused, since programs disagree about it. Where a model expects text, a plain value is that text:
a domain may be called `2024` or `2024-05-01`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from dgbench.errors import DgbenchError
from dgbench.untrusted import read_bytes

_TAG = "tag:yaml.org,2002:"
_NULL, _BOOL, _INT, _FLOAT, _STR = (_TAG + kind for kind in ("null", "bool", "int", "float", "str"))
_ZEROS = "!zeros"  # numbers that some programs read as octal and others as decimal

_WHOLE = re.compile(r"(?:[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+)\Z")
_REAL = re.compile(
    r"(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
)
_LEADING_ZERO = re.compile(r"(?:[-+]?0[0-9]+|0o[0-7]+)\Z")
_TRUTH = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
_IMPLICIT = (
    (_NULL, re.compile(r"(?:null|Null|NULL|~|)\Z"), ["n", "N", "~", ""]),
    (_BOOL, _TRUTH, list("tTfF")),
    (_INT, _WHOLE, list("-+0123456789")),
    (_FLOAT, _REAL, list("-+.0123456789")),
    (_ZEROS, _LEADING_ZERO, list("-+0")),
    (f"{_TAG}merge", re.compile(r"<<\Z"), ["<"]),
)
_BYTES = 1 << 20  # of a file: reading takes seconds a megabyte
_DIGITS = 18  # more than any count here has
_NODES = 100_000  # more than any file here has, with what it refers to written out


class _Told(yaml.constructor.ConstructorError):
    """A problem whose text is complete."""

    def __init__(self, text: str, mark: yaml.Mark | None) -> None:
        super().__init__(None, None, text, mark)


class _Repeated(_Told):
    """A key that is given twice."""


class _Refused(_Told):
    """A value that is valid YAML but ambiguous between programs, or has no meaning here."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012  its own, not those of YAML 1.1
    yaml_constructors = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a repeated key instead of taking the last: `1`, `0x1` and `"1"` are one."""
        seen: dict[str, str] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _Refused("a key is one value, not a list or `key: value` pairs", key.start_mark)
            if key.tag == f"{_TAG}merge":
                continue
            same = _one_spelling(self.construct_object(key))
            if same in seen:
                first = seen[same]
                told = f"key `{key.value}` is given twice"
                if first != key.value:
                    told = f"the keys `{first}` and `{key.value}` are the same"
                raise _Repeated(told, key.start_mark)
            seen[same] = key.value
        return super().construct_mapping(node, deep)

    def _null(self, node: yaml.ScalarNode) -> None:
        return None

    def _bool(self, node: yaml.ScalarNode) -> bool:
        self._check(node, _TRUTH, "true or false")
        return str(node.value).lower() == "true"

    def _int(self, node: yaml.ScalarNode) -> int:
        self._check(node, _WHOLE, "an integer")
        if len(node.value) > _DIGITS:
            raise _Refused(f"`{_cut(node.value)}` has {len(node.value)} digits, at most {_DIGITS} are read", node.start_mark)
        return int(node.value, 16 if node.value.startswith("0x") else 10)

    def _float(self, node: yaml.ScalarNode) -> float:
        self._check(node, _REAL, "a number")
        return float(re.sub(r"\.(inf|nan)$", r"\1", node.value.lower()))

    def _str(self, node: yaml.ScalarNode) -> str:
        text = str(self.construct_scalar(node))
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise _Refused(f"{_escaped(repr(_cut(text)))} holds half a character (a lone surrogate)", node.start_mark)
        return text

    def _zeros(self, node: yaml.ScalarNode) -> None:
        sure = decimal(node.value) or node.value
        raise _Refused(
            f"`{_cut(node.value)}` could be octal or decimal: write {_cut(sure)}, or '{_cut(node.value)}' in quotes for a text",
            node.start_mark,
        )

    def _unknown(self, node: yaml.Node) -> None:
        raise _Refused(f"the tag `{node.tag.replace(_TAG, '!!')}` has no meaning here: leave it out", node.start_mark)

    @staticmethod
    def _check(node: yaml.ScalarNode, pattern: re.Pattern[str], what: str) -> None:
        if not isinstance(node, yaml.ScalarNode) or not pattern.fullmatch(node.value):
            raise _Refused(f"`{_cut(str(node.value))}` is not {what}", node.start_mark)


for _tag, _pattern, _first in _IMPLICIT:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
for _name, _construct in {
    _NULL: _Loader._null,
    _BOOL: _Loader._bool,
    _INT: _Loader._int,
    _FLOAT: _Loader._float,
    _STR: _Loader._str,
    _ZEROS: _Loader._zeros,
    f"{_TAG}seq": yaml.SafeLoader.construct_yaml_seq,
    f"{_TAG}map": yaml.SafeLoader.construct_yaml_map,
    None: _Loader._unknown,
}.items():
    _Loader.add_constructor(_name, _construct)


def parse(path: Path, error: type[DgbenchError], example: str, model: Any = None) -> dict[str, Any]:
    """Read the keys and values of a YAML file.

    Args:
        error: class of the error to raise. example: file that shows how such a file is written.
        model: the model that validates the content later: plain values are text where it expects text.

    Raises: `error` naming the file and the line.
    """
    try:
        content = _constructed(read_bytes(path, _BYTES).decode("utf-8"), model)
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark or problem.context_mark
        line = f":{mark.line + 1}" if mark else ""
        if isinstance(problem, _Refused):
            raise error(f"{path}{line}: {problem.problem}", f"change it there; {example} shows how one is written") from None
        raise error(f"{path}{line}: not valid YAML: {problem.problem}", "check indentation, colons and brackets there") from None
    except RecursionError:
        raise error(f"{path}: nested too deeply", f"see {example}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise error(f"{path}: not a YAML text: {_first_line(problem)}", "it should be a UTF-8 text file") from None
    except ValueError as problem:
        raise error(f"{path} {problem}", f"it should be a text file; {example} shows how one is written") from None
    if not isinstance(content, dict):
        raise error(f"{path}: expected `key: value` lines, got {_kind(content)}", f"see {example}")
    return content


def value(text: str, annotation: Any = None) -> Any:
    """Read one value as it follows `--set KEY=`.

    Args:
        annotation: the type of the key that is set, if known.

    Raises: ValueError saying in one line why it cannot be read.
    """
    try:
        return _constructed(text, annotation)
    except _Told as problem:
        raise ValueError(str(problem.problem)) from None
    except RecursionError:
        raise ValueError(f"`{_cut(text)}` is nested too deeply") from None
    except yaml.YAMLError:
        raise ValueError(f"`{_escaped(_cut(text))}` is not a YAML value") from None


def decimal(text: str) -> str | None:
    """Return how to write a number that YAML 1.1 or programming languages write otherwise; None if `text` is none."""
    plain = text.strip()
    for pattern, base in ((r"([-+]?)0o([0-7_]+)", 8), (r"([-+]?)0b([01_]+)", 2), (r"([-+]?)0x([0-9a-fA-F_]+)", 16)):
        if (match := re.fullmatch(pattern, plain)) and (digits := match[2].replace("_", "")) and len(digits) < 64:
            return f"{match[1]}{int(digits, base)}"
    if match := re.fullmatch(r"([-+]?)([0-9]+)((?::[0-5]?[0-9])+)", plain):
        total = int(match[2][:_DIGITS])
        for part in match[3][1:].split(":"):
            total = total * 60 + int(part)
        return f"{match[1]}{total}"
    if match := re.fullmatch(r"([-+]?)([0-9][0-9_]*)((?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)?)", plain):
        return match[1] + (match[2].replace("_", "").lstrip("0") or "0") + match[3].replace("_", "")
    return None


def dumped(content: Any) -> str:
    """Return YAML that `parse` and YAML 1.1 readers read back unchanged."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=120, default_flow_style=None)


class _Dumper(yaml.SafeDumper):
    """YAML's safe dumper with floats that YAML 1.1 reads back as floats: 1.0e-05, not 1e-05."""


def _represent_float(dumper: yaml.SafeDumper, number: float) -> yaml.ScalarNode:
    text = repr(number)
    return dumper.represent_scalar(_FLOAT, text.replace("e", ".0e") if "e" in text and "." not in text else text)


_Dumper.add_representer(float, _represent_float)
for _tag, _pattern, _first in ((_FLOAT, _REAL, list("-+.0123456789")), (_ZEROS, _LEADING_ZERO, list("-+0"))):
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)  # a text that looks like such a value gets quotes


def _constructed(text: str, annotation: Any) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node)
        _as_text(node, annotation)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _check_size(root: yaml.Node) -> None:
    """Refuse content that refers to itself, or grows without bounds when its references are expanded."""
    count, left = 0, [root]
    while left:
        node = left.pop()
        count += 1
        if count > _NODES:
            raise _Refused("it refers to itself, or is too large when its references (`*name`) are written out", root.start_mark)
        if isinstance(node, yaml.MappingNode):
            left += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            left += node.value


def _as_text(node: yaml.Node, annotation: Any) -> None:
    """Make plain values text where the annotation of a model, a field or a container expects nothing but text."""
    kinds = list(_alternatives(annotation))
    if isinstance(node, yaml.ScalarNode):
        if (
            node.style is None
            and node.tag in (_BOOL, _INT, _FLOAT, _ZEROS)
            and any(map(_is_text, kinds))
            and not {int, float, bool} & {kind for kind in kinds if isinstance(kind, type)}
        ):
            node.tag = _STR
    elif isinstance(node, yaml.SequenceNode):
        for kind in kinds:
            items = get_args(kind) if get_origin(kind) in (list, tuple) else ()
            several = get_origin(kind) is list or items[1:] == (...,)
            for place, item in enumerate(node.value):
                if items and (several or place < len(items)):
                    _as_text(item, items[0 if several else place])
    elif isinstance(node, yaml.MappingNode):
        for key, content in node.value:
            for kind in kinds:
                if get_origin(kind) is dict:
                    of_key, of_value = get_args(kind)
                    _as_text(key, of_key)
                    _as_text(content, of_value)
                elif _is_model(kind):
                    _as_text(key, str)
                    _as_text(content, field_type(kind, key.value))


def field_type(model: Any, key: Any) -> Any:
    """Return the annotation of a key of a model or a dictionary; None if there is none."""
    for kind in _alternatives(model):
        if _is_model(kind):
            for name, field in kind.model_fields.items():
                if key in (name, field.alias):
                    return field.annotation
        elif get_origin(kind) is dict:
            return get_args(kind)[1]
    return None


def _alternatives(annotation: Any) -> Iterator[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _alternatives(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for part in get_args(annotation):
            yield from _alternatives(part)
    elif annotation not in (None, NoneType):
        yield annotation


def _is_text(kind: Any) -> bool:
    return kind is str or (get_origin(kind) is Literal and all(isinstance(choice, str) for choice in get_args(kind)))


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _one_spelling(key: Any) -> str:
    if isinstance(key, float) and key.is_integer():
        return str(int(key))
    # a dictionary takes true for 1
    return str(int(key)) if isinstance(key, bool) else "~" if key is None else str(key)


def _kind(content: Any) -> str:
    names = {NoneType: "nothing", list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(content), type(content).__name__)


def _cut(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."


def _escaped(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _first_line(problem: BaseException) -> str:
    return _escaped((str(problem).splitlines() or [type(problem).__name__])[0])
