"""Lookup of recipes: shipped ones by name, method or flags, files with their parents, and values set on top of them."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgbench.errors import RecipeError, no_recipe_file, spelled, unknown, unknown_recipe
from dgbench.recipe.method import TOWER_OPTIONS
from dgbench.resources import recipes_dir
from dgbench.spec import Problem
from dgbench.yaml_text import field_type, parse, value

RESOLVED = "recipe.yaml"  # of a run

# keys with command-line options of their own
FLAGS = {
    **{f"method.{kind}": f"--{kind}" for kind in ("vlm", "vfm", "backbone")},
    "data.source": "--source",
    "data.targets": "--targets",
    "train.seed": "--seed",
}
_PLAIN = re.compile(r"[\w.@/+-]+(?::[\w.@/+-]+)?")  # needs no quotes where a text is expected


def recipe_names() -> list[str]:
    """Return the shipped recipes, e.g. `streets/mfuser`; parents (`_*`) are not runnable and left out."""
    root = recipes_dir()
    paths = (path for path in root.rglob("*.yaml") if not path.name.startswith("_"))
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in paths)


def by_method() -> dict[str, list[str]]:
    """Return the shipped recipes of each method."""
    found: dict[str, list[str]] = {}
    for name in recipe_names():
        found.setdefault(_peek(name)["method"], []).append(name)
    return found


def find(
    method: str,
    vlm: str | None = None,
    source: str | Sequence[str] | None = None,
    *,
    vfm: str | None = None,
    backbone: str | None = None,
    root: Path | None = None,
) -> str:
    """Return the shipped recipe that trains `method`, with these towers and this source where they are given.

    Without any it is the method's recipe on procedural streets, which needs no download. A recipe named after the
    method comes first, then one on gta5.

    Raises: RecipeError if there is none, or several equally near.
    """
    source = _domain(source, root)
    method, mine = _of_method(method)
    mine = _by_flags(mine, source)
    towers = {"vlm": vlm, "vfm": vfm, "backbone": backbone}
    fitting = [
        (name, row)
        for name, row in mine
        if source in (None, row["source"]) and all(_same_tower(asked, row[kind]) for kind, asked in towers.items())
    ]
    if not fitting:
        flags = "".join(f" --{key} {given}" for key, given in (*towers.items(), ("source", source)) if given)
        have = ", ".join(f"{name} ({row['vlm'] or row['backbone'] or '-'}, {row['source']})" for name, row in mine)
        raise RecipeError(f"no recipe for `{method}`{flags}", f"recipes of this method (tower, source): {have}")
    return _first(method, fitting)


def resolve(
    name: str = "mfuser",
    *,
    vlm: str | None = None,
    vfm: str | None = None,
    backbone: str | None = None,
    source: str | Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    seed: int | None = None,
    root: Path | None = None,
) -> tuple[str, list[str]]:
    """Return the recipe meant by a method or recipe name with flags, and the overrides that the flags add to it.

    For a method's name, one of its recipes is chosen by the flags; flags that differ from the chosen recipe override it. A
    tower without a recipe of its own takes that of the nearest tower, and a warning says so.

    Raises: RecipeError for an unknown name or tower, or a method that has no such tower.
    """
    source = source if source is None or isinstance(source, str) else "+".join(source)
    added = [setting("data.targets", list(targets))] if targets else []
    added += [setting("train.seed", seed)] if seed is not None else []
    asked = {"vfm": vfm, "vlm": vlm, "backbone": backbone}
    if _is_recipe(name):
        flags = {f"method.{kind}": text for kind, text in asked.items()} | {"data.source": source}
        return name, [*(setting(key, text) for key, text in flags.items() if text), *added]
    method, rows = _of_method(name)
    towers = {kind: _tower(kind, text, method, rows) for kind, text in asked.items() if text}
    domain = _domain(source, root)
    near = _nearest(method, towers, _by_flags(rows, domain))
    on_it = [(found, row) for found, row in near if row["source"] == domain]
    # if no recipe of this method trains on that source: its default one with the source changed
    found = _first(method, on_it or near)
    has = _peek(found)
    changed = {f"method.{kind}": text for kind, text in towers.items() if not _same_tower(text, has[kind])}
    if changed:
        told = " and ".join(f"{key}={text}" for key, text in changed.items())
        logging.getLogger(__name__).warning(f"no recipe has these towers: this is {found} with {told}")
    given = changed | ({"data.source": source} if source and not on_it else {})
    return found, [*(setting(key, text) for key, text in given.items()), *added]


def settings_of(name: str, options: Mapping[str, Any]) -> str | None:
    """Return the shipped recipe of this name if its settings were made for other towers than the given ones, else None."""
    if name not in recipe_names():
        return None
    has = _peek(name)
    return name if any(has[kind] and options.get(kind) not in (None, has[kind]) for kind in ("vfm", "vlm", "backbone")) else None


def setting(key: str, content: Any) -> str:
    """Return `key=value` that reads back as this value."""
    if isinstance(content, list):
        return f"{key}=[{', '.join(setting('', item)[1:] for item in content)}]"
    return f"{key}={content if isinstance(content, int) or _PLAIN.fullmatch(content) else json.dumps(content)}"


def _is_recipe(name: str) -> bool:
    return spelled(name, recipe_names()) is not None or "/" in name or Path(name).suffix in (".yaml", ".yml")


def _domain(source: str | Sequence[str] | None, root: Path | None) -> str | None:
    """Return the name under which a training on these domains is recorded."""
    from dgbench.data.catalog import joined, rows
    from dgbench.recipe.data import separate

    if source is None:
        return None
    return joined(row.name for row in rows(separate(source) if isinstance(source, str) else source, root))


def _of_method(method: str) -> tuple[str, list[tuple[str, dict[str, str]]]]:
    """Return the method's name in its own spelling, and its shipped recipes."""
    rows = [(name, _peek(name)) for name in recipe_names()]
    methods = {row["method"] for _, row in rows if row["method"]}
    known = spelled(method, methods)
    if known is None:
        message, hint = unknown("method", method, methods)
        if hint.startswith("choose"):
            message, hint = unknown_recipe(method, methods, recipe_names())
        raise RecipeError(message, hint)
    return known, [(name, row) for name, row in rows if row["method"] == known]


def _by_flags(rows: Sequence[tuple[str, dict[str, str]]], source: str | None) -> list[tuple[str, dict[str, str]]]:
    """Leave out the recipes that only their own name or source means: those for published towers on rendered streets.

    A published tower asks for the settings that it was published with; on streets, towers are trained from scratch.
    """
    from mfuser.towers.table import TOWERS

    def published(row: Mapping[str, str]) -> bool:
        return any((tower := TOWERS.get(row[kind])) is not None and tower.timm is not None for kind in ("vlm", "vfm", "backbone"))

    return [(name, row) for name, row in rows if not (name.startswith("streets/") and published(row)) or row["source"] == source]


def _tower(kind: str, name: str, method: str, rows: Sequence[tuple[str, Mapping[str, str]]]) -> str:
    """Return a tower's name in its own spelling.

    Raises: RecipeError for one that is unknown, or that this method does not take.
    """
    from mfuser.methods import backbone_names, of_kind, option_names
    from mfuser.towers.table import TIMM, TOWERS, plain, with_text

    if kind not in option_names(method):
        keys = ", ".join(f"method.{key}" for key in option_names(method) if key in TOWER_OPTIONS)
        raise RecipeError(f"`{method}` has no {kind}, which --{kind} {name} would set", f"by --set it takes: {keys or 'none'}")
    known = {"vlm": with_text, "vfm": plain}.get(kind, lambda: sorted({*TOWERS, *backbone_names(method)}))()
    as_known = spelled(of_kind(method, name) if kind == "backbone" else name, known)
    if as_known is not None:
        return as_known
    if (kind != "vlm" and name.startswith(TIMM)) or (kind == "vlm" and any(_same_tower(name, row[kind]) for _, row in rows)):
        return name
    if name in TOWERS:
        choice = ", ".join(sorted(known))
        if TOWERS[name].channels:
            raise RecipeError(f"--{kind} {name} is {TOWERS[name].described}", f"choose from {choice}")
        raise RecipeError(f"--vlm {name} has no text tower", f"choose from {choice}; other towers are for --vfm")
    message, hint = unknown("tower", name, known)
    also = f", or {TIMM}<model>" if kind != "vlm" and hint.startswith("choose") else ""
    raise RecipeError(f"--{kind}: {message}", hint + also)


def _nearest(
    method: str, towers: Mapping[str, str], rows: Sequence[tuple[str, dict[str, str]]]
) -> Sequence[tuple[str, dict[str, str]]]:
    """Return the recipes for these towers: their own, else of the same family and size, the same size, or trained the same.

    Of recipes for several towers that are equally near, those for the method's default one.
    """
    from mfuser.methods import described_options

    near = list(rows)
    if not towers:
        return near
    for kind in ("vlm", "vfm", "backbone"):
        if asked := towers.get(kind):
            least = min(_remoteness(asked, row[kind]) for _, row in near)
            near = [(name, row) for name, row in near if _remoteness(asked, row[kind]) == least]
    for option in described_options(method):
        if option.name in ("vlm", "vfm", "backbone"):
            has = [row[option.name] for _, row in near]
            usual = option.default if option.default in has else has[0]
            near = [(name, row) for name, row in near if row[option.name] == usual]
    return near


def _remoteness(asked: str, has: str) -> int:
    """Return how much the settings for one tower differ from those for another: 0 for the same tower."""
    from mfuser.towers.table import TOWERS

    if _same_tower(asked, has):
        return 0
    one, other = TOWERS.get(asked), TOWERS.get(has)
    if one and other and (one.width, one.depth) == (other.width, other.depth):
        families = [name.partition("_")[0] for name in (asked, has)]
        return 1 if families[0].startswith(families[1]) or families[1].startswith(families[0]) else 2  # siglip2, siglip
    # trained from scratch, or from published weights, as those of timm are
    scratch = [row is not None and row.scratch for row in (one, other)]
    small = one is not None and other is not None and "full" not in (one.size, other.size)
    return 3 if scratch[0] == scratch[1] or small else 4


def _first(method: str, rows: Sequence[tuple[str, dict[str, str]]]) -> str:
    """Return the recipe that is meant by a method's name alone.

    Raises: RecipeError for several that are equally near.
    """
    least = min(_distance(name, row, method) for name, row in rows)
    best = sorted(name for name, row in rows if _distance(name, row, method) == least)
    # `rein/dinov2-city-1024` is a special kind of `rein/dinov2-city`
    best = [name for name in best if all(other.startswith(name) for other in best)] or best
    if len(best) > 1:
        towers = " or ".join(f"--{kind}" for kind in ("vlm", "vfm", "backbone") if any(row[kind] for _, row in rows))
        raise RecipeError(f"several recipes fit `{method}`: {', '.join(best)}", f"name one of them, or add {towers}")
    return best[0]


def _distance(name: str, row: Mapping[str, str], method: str) -> tuple[bool, bool, bool, bool]:
    last = name.rpartition("/")[2]
    # `streets/mfuser-scratch` is more of mfuser's than `streets/smoke` is
    return not name.startswith("streets/"), last != method, not last.startswith(method), row["source"] != "gta5"


def _same_tower(asked: str | None, has: str) -> bool:
    from mfuser.towers.table import TOWERS

    if asked is None or asked == has or asked in TOWERS:
        return asked in (None, has)
    # `eva02` and its full name `eva02_l_336` are one tower
    return (bool(has) and asked.startswith(f"{has}_")) or has.startswith(f"{asked}_")


def _peek(name: str) -> dict[str, str]:
    """Return method, towers and source of a shipped recipe without checking it."""
    content = with_parent(locate(name))
    method, data = content.get("method"), content.get("data")
    method, data = (part if isinstance(part, dict) else {} for part in (method, data))
    towers = {kind: str(method.get(kind, "")) for kind in ("vlm", "vfm", "backbone")}
    return {"method": str(method.get("name", "")), "source": _listed(data.get("source", "")), **towers}


def _listed(source: Any) -> str:
    return "+".join(sorted(map(str, source))) if isinstance(source, list) else str(source)


def locate(name_or_path: str | Path) -> Path:
    """Return the file of a recipe's name, in lower or upper case, or of a path.

    Raises: RecipeError if there is none.
    """
    text = str(name_or_path)
    shipped = spelled(text, recipe_names())
    if shipped is not None:
        return recipes_dir() / f"{shipped}.yaml"
    path = Path(text)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise RecipeError(*no_recipe_file(path))
        return path
    raise RecipeError(
        *unknown_recipe(text, {row["method"] for row in map(_peek, recipe_names()) if row["method"]}, recipe_names())
    )


def name_of(path: Path) -> str:
    """Return the default name of a recipe without a `name`."""
    return path.relative_to(recipes_dir()).with_suffix("").as_posix() if is_shipped(path) else path.stem


def is_shipped(path: Path) -> bool:
    """Return whether a file came with the package."""
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
    # a parent is in the folder of its child, or among the shipped ones
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
    """Return a run's `recipe.yaml`: `head` and the digest of the rest in the first line, then the recipe."""
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
            f"{path} is damaged or was changed: its text does not match the digest in its first line",
            "restore it; if you changed it on purpose, remove the first line",
        )


def _read(path: Path) -> dict[str, Any]:
    from dgbench.recipe.model import Recipe

    if path.name == RESOLVED:  # copies under other names may be changed
        _check_seal(path)
    content = parse(path, RecipeError, "recipes/streets/mfuser.yaml", Recipe)
    data = content.get("data")
    if isinstance(data, dict) and isinstance(data.get("domains"), list):
        # paths are relative to the recipe that names them
        data["domains"] = [str(path.parent / file) if isinstance(file, str) else file for file in data["domains"]]
    return content


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `base` updated by `over`: mappings are merged, everything else is replaced."""
    result = dict(base)
    for key, content in over.items():
        below = base.get(key)
        # another method's options have no meaning for this one
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
        """Return whether a problem at `keys` concerns what was set: at the key, within its value, or in its section."""
        shared = min(len(self.keys), len(keys))
        return bool(keys) and self.keys[:shared] == tuple(keys[:shared])


def override(
    content: dict[str, Any], flags: Sequence[str], settings: Sequence[str], model: Any
) -> tuple[list[Given], list[Problem]]:
    """Apply `key.path=value` texts to `content` in place; return what they set, and what is wrong with them.

    Args:
        flags: those of a command's own options, applied first.    settings: those of `--set`.
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
