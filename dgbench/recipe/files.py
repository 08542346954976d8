"""Where recipes come from: shipped ones by name, method or flags, files with their parents, and values set on top of them."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgbench.errors import RecipeError, spelled, unknown
from dgbench.resources import recipes_dir
from dgbench.spec import Problem
from dgbench.yaml_text import field_type, parse, value

RESOLVED = "recipe.yaml"  # of a run

# keys that options of their own set
FLAGS = {
    "method.vlm": "--vlm", "method.vfm": "--vfm", "data.source": "--source", "data.targets": "--targets", "train.seed": "--seed",
}  # fmt: skip
_PLAIN = re.compile(r"[\w.@/+-]+(?::[\w.@/+-]+)?")  # needs no quotes where a text is expected


def recipe_names() -> list[str]:
    """Return the shipped recipes, e.g. `streets/mfuser`; parents (`_*`) are not runnable and left out."""
    root = recipes_dir()
    paths = (path for path in root.rglob("*.yaml") if not path.name.startswith("_"))
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in paths)


def find(method: str, vlm: str | None = None, source: str | None = None) -> str:
    """Return the shipped recipe that trains `method`, with this vision-language tower and source if they are given.

    Without either it is the method's recipe on procedural streets, which needs no download. A recipe named after the
    method comes first, then one on gta5.

    Raises: RecipeError if there is none, or several equally near.
    """
    source = _domain(source)
    method, mine = _of_method(method)
    fitting = [(n, r) for n, r in mine if _same_tower(vlm, r["vlm"]) and source in (None, r["source"])]
    if not fitting:
        flags = "".join(f" --{key} {given}" for key, given in (("vlm", vlm), ("source", source)) if given)
        have = ", ".join(f"{name} ({row['vlm'] or '-'}, {row['source']})" for name, row in mine)
        raise RecipeError(f"no recipe for `{method}`{flags}", f"recipes of this method (vlm, source): {have}")
    ranked = sorted(fitting, key=lambda item: _distance(item[0], item[1], method))
    best = [name for name, row in ranked if _distance(name, row, method) == _distance(*ranked[0], method)]
    if len(best) > 1:
        raise RecipeError(f"several recipes fit `{method}`: {', '.join(best)}", "name one of them, or add --vlm")
    return best[0]


def resolve(
    name: str = "mfuser", *, vlm: str | None = None, vfm: str | None = None, source: str | None = None,
    targets: Sequence[str] | None = None, seed: int | None = None,
) -> tuple[str, list[str]]:  # fmt: skip
    """Return the recipe meant by a method or recipe name with flags, and the overrides that the flags add to it.

    A method's name picks among its recipes by the flags; whatever the picked recipe does not already say is overridden. A
    tower without a recipe of its own takes that of the nearest tower, and a warning says so.

    Raises: RecipeError for an unknown name or tower, or a method that has no such tower.
    """
    added = [setting("data.targets", list(targets))] if targets else []
    added += [setting("train.seed", seed)] if seed is not None else []
    if _is_recipe(name):
        given = {"method.vfm": vfm, "method.vlm": vlm, "data.source": source}
        return name, [*(setting(key, text) for key, text in given.items() if text), *added]
    method, rows = _of_method(name)
    vlm, vfm = _tower("vlm", vlm, rows), _tower("vfm", vfm, rows)
    nearest = _nearest(vlm, vfm, rows)
    domain = _domain(source)
    if nearest and any(_same_tower(nearest, row["vlm"]) and domain in (None, row["source"]) for _, row in rows):
        found, domain = find(method, nearest, source), None
    elif not nearest and domain and any(row["source"] == domain for _, row in rows):
        found, domain = find(method, None, source), None
    else:
        # no recipe of this method trains on that source: take its usual one and change the source
        found = find(method, nearest)
    has = _peek(found)
    towers = {f"method.{kind}": text for kind, text in (("vfm", vfm), ("vlm", vlm)) if not _same_tower(text, has[kind])}
    if towers:
        told = " and ".join(f"{key}={text}" for key, text in towers.items())
        logging.getLogger(__name__).warning(f"no recipe has these towers: this is {found} with {told}")
    given = towers | ({"data.source": domain} if domain else {})
    return found, [*(setting(key, text) for key, text in given.items() if text), *added]


def setting(key: str, content: Any) -> str:
    """`key=value` that reads back as this value."""
    if isinstance(content, list):
        return f"{key}=[{', '.join(setting('', item)[1:] for item in content)}]"
    return f"{key}={content if isinstance(content, int) or _PLAIN.fullmatch(content) else json.dumps(content)}"


def _is_recipe(name: str) -> bool:
    return spelled(name, recipe_names()) is not None or "/" in name or Path(name).suffix in (".yaml", ".yml")


def _domain(name: str | None) -> str | None:
    from dgbench.data.domains import lookup

    return None if name is None else lookup(name).name


def _of_method(method: str) -> tuple[str, list[tuple[str, dict[str, str]]]]:
    """The method as it is spelled, and its shipped recipes."""
    rows = [(name, _peek(name)) for name in recipe_names()]
    methods = {row["method"] for _, row in rows if row["method"]}
    known = spelled(method, methods)
    if known is None:
        message, hint = unknown("method", method, methods)
        if hint.startswith("choose"):
            message, hint = unknown("method or recipe", method, [*methods, *recipe_names()])
        raise RecipeError(message, hint)
    return known, [(name, row) for name, row in rows if row["method"] == known]


def _tower(kind: str, name: str | None, rows: Sequence[tuple[str, Mapping[str, str]]]) -> str | None:
    """A tower as it is spelled.

    Raises: RecipeError for one that is unknown, or that this method does not take.
    """
    from mfuser.towers.table import ENCODERS, LANGUAGE, TIMM

    if name is None:
        return None
    method = rows[0][1]["method"]
    if not any(row[kind] for _, row in rows):
        from mfuser.methods import option_names

        keys = ", ".join(f"method.{key}" for key in option_names(method) if key in ("vfm", "vlm", "backbone", "tower"))
        raise RecipeError(f"`{method}` has no {kind}, which --{kind} {name} would set", f"by --set it takes: {keys}")
    known = LANGUAGE if kind == "vlm" else tuple(ENCODERS)
    as_known = spelled(name, known)
    if as_known is not None:
        return as_known
    if (kind == "vfm" and name.startswith(TIMM)) or (kind == "vlm" and any(_same_tower(name, row[kind]) for _, row in rows)):
        return name
    if name in ENCODERS:
        choice = ", ".join(sorted(known))
        raise RecipeError(f"--vlm {name} has no text tower", f"choose from {choice}; other towers are for --vfm")
    message, hint = unknown("tower", name, known)
    also = f", or {TIMM}<model>" if kind == "vfm" and hint.startswith("choose") else ""
    raise RecipeError(f"--{kind}: {message}", hint + also)


def _nearest(vlm: str | None, vfm: str | None, rows: Sequence[tuple[str, Mapping[str, str]]]) -> str | None:
    """The vision-language tower whose recipes serve these towers: its own, one of its family, or the usual of its size."""
    from mfuser.towers.table import ENCODERS

    def large(name: str) -> bool:
        return name not in ENCODERS or ENCODERS[name].timm is not None

    have = list(dict.fromkeys(row["vlm"] for _, row in rows))
    if vlm is None:
        if vfm is None:
            return None
        beside = [row["vlm"] for _, row in rows if row["vfm"] == vfm] or [name for name in have if large(name) == large(vfm)]
        return _usual(beside)
    if any(_same_tower(vlm, name) for name in have):
        return vlm
    alike = [name for name in have if name and vlm.startswith(name)]  # siglip2, siglip
    return _usual(alike or [name for name in have if large(name) == large(vlm)])


def _usual(towers: Sequence[str]) -> str | None:
    return "eva02" if "eva02" in towers else towers[0] if towers else None  # as `mfuser.build` has it


def _distance(name: str, row: Mapping[str, str], method: str) -> tuple[bool, bool, bool]:
    return not name.startswith("streets/"), name.rpartition("/")[2] != method, row["source"] != "gta5"


def _same_tower(asked: str | None, has: str) -> bool:
    # `eva02` and its full name `eva02_l_336` are one tower
    return asked is None or asked == has or (bool(has) and asked.startswith(f"{has}_")) or has.startswith(f"{asked}_")


def _peek(name: str) -> dict[str, str]:
    """Return method, towers and source of a shipped recipe without checking it."""
    content = with_parent(locate(name))
    method, data = content.get("method"), content.get("data")
    method, data = (part if isinstance(part, dict) else {} for part in (method, data))
    return {
        "method": str(method.get("name", "")), "vlm": str(method.get("vlm", "")), "vfm": str(method.get("vfm", "")),
        "source": str(data.get("source", "")),
    }  # fmt: skip


def locate(name_or_path: str | Path) -> Path:
    """The file of a recipe's name, in capitals or not, or of a path.

    Raises: RecipeError if there is none.
    """
    text = str(name_or_path)
    shipped = spelled(text, recipe_names())
    if shipped is not None:
        return recipes_dir() / f"{shipped}.yaml"
    path = Path(text)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise RecipeError(f"no recipe file {path}", f"shipped recipes need no path or suffix: {', '.join(recipe_names())}")
        return path
    raise RecipeError(*unknown("recipe", text, recipe_names()))


def name_of(path: Path) -> str:
    """What a recipe without a `name` is called."""
    return path.relative_to(recipes_dir()).with_suffix("").as_posix() if is_shipped(path) else path.stem


def is_shipped(path: Path) -> bool:
    """Whether a file came with the package."""
    return path.is_relative_to(recipes_dir())


def with_parent(path: Path) -> dict[str, Any]:
    """Return a recipe's content merged over its parent's.

    Raises: RecipeError for a file that cannot be read, and a parent that is not there or has one itself.
    """
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


_SEALED = re.compile(rb"(# Resolved recipe [^\n]*, hash [0-9a-f]{12}), sha256 ([0-9a-f]{64})\.\n(.*)", re.DOTALL)
_UNSEALED = re.compile(rb"# Resolved recipe [^\n]*, hash [0-9a-f]{12}\.\n.*", re.DOTALL)  # of older versions


def sealed(head: str, text: str) -> str:
    """A run's `recipe.yaml`: `head` and the digest of all the rest in the first line, then the recipe."""
    digest = hashlib.sha256(f"{head}\n{text}".encode()).hexdigest()
    return f"{head}, sha256 {digest}.\n{text}"


def _check_seal(path: Path) -> None:
    content = path.read_bytes()
    first = content.partition(b"\n")[0]
    if not (first.startswith(b"# Resolved recipe ") or b", sha256 " in first) or _UNSEALED.fullmatch(content):
        return
    parts = _SEALED.fullmatch(content)
    if parts is None or hashlib.sha256(parts[1] + b"\n" + parts[3]).hexdigest().encode() != parts[2]:
        raise RecipeError(
            f"{path} is damaged or was changed: its text is not what its first line says",
            "restore it; if the change is meant, remove the first line",
        )


def _read(path: Path) -> dict[str, Any]:
    from dgbench.recipe import Recipe

    if path.name == RESOLVED:  # copies under other names are there to be changed
        _check_seal(path)
    content = parse(path, RecipeError, "recipes/streets/mfuser.yaml", Recipe)
    data = content.get("data")
    if isinstance(data, dict) and isinstance(data.get("domains"), list):
        # files lie beside the recipe that names them
        data["domains"] = [str(path.parent / file) if isinstance(file, str) else file for file in data["domains"]]
    return content


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `over` on top: mappings merge, everything else replaces."""
    result = dict(base)
    for key, content in over.items():
        below = base.get(key)
        # another method's options would be nonsense for this one
        replaces = key == "method" and isinstance(content, dict) and isinstance(below, dict) and _other_method(below, content)
        both = isinstance(below, dict) and isinstance(content, dict)
        result[key] = _merged(below or {}, content) if both and not replaces else content
    return result


def _other_method(below: dict[str, Any], above: dict[str, Any]) -> bool:
    return "name" in below and "name" in above and below["name"] != above["name"]


@dataclass(frozen=True, slots=True)
class Given:
    """A key that the command line set, and by which option."""

    keys: tuple[str, ...]
    option: str  # `--set train.steps`, or `--vlm`

    def covers(self, keys: Sequence[str | int]) -> bool:
        """Whether a problem at `keys` is about what was set: at the key, within its value, or of a section that holds it."""
        shared = min(len(self.keys), len(keys))
        return bool(keys) and self.keys[:shared] == tuple(keys[:shared])


def override(
    content: dict[str, Any], flags: Sequence[str], settings: Sequence[str], model: Any
) -> tuple[list[Given], list[Problem]]:
    """Apply `key.path=value` texts to `content` in place; return what they set, and what is wrong with them.

    Args:
        flags: those that options of their own stand for, applied first.    settings: those of `--set`.
        model: of the content: plain values are text where it expects text.
    """
    given, problems = [], []
    for position, text in enumerate((*flags, *settings)):
        name, equals, value_text = text.partition("=")
        path = tuple(name.strip().split("."))
        if not equals or not all(path):
            given.append(Given((text,), "--set"))
            problems.append(Problem((text,), "expected key.path=value, as in train.steps=200"))
            continue
        flag = FLAGS.get(".".join(path)) if position < len(flags) else None
        given.append(Given(path, flag or f"--set {'.'.join(path)}"))
        kind = model
        for key in path:
            kind = field_type(kind, key)
        try:
            read = value(value_text, kind)
        except ValueError as error:
            problems.append(Problem(path, str(error)))
            continue
        place: Any = content
        for depth, key in enumerate(path[:-1]):
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                problems.append(Problem(path, f"`{'.'.join(path[: depth + 1])}` is a value and has no keys"))
                break
        else:
            place[path[-1]] = read
    return given, problems
