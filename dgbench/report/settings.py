"""The settings of runs, read from the resolved recipe in each run's folder, and the settings in which they differ.

Recipes are read as YAML without validation, so that settings of other versions and unknown methods can be shown, too.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

Settings = Mapping[str, Any]  # `train.steps` -> 560, in the recipe's order

# limits of what is read: a resolved recipe has about 1 kB, a dozen brackets, and no aliases
_LARGEST = 100_000
_MOST_BRACKETS = 1_000
_ALIAS = re.compile(r"(?:^|[\s\[{,])\*\w")
_SECTIONS = ("method", "data", "train", "optim", "eval")
# settings that hardly change the result: named only if runs do not differ in anything else
INCIDENTAL = ("train.workers", "train.log_every", "train.checkpoint_every", "eval.batch_size", "method.backend")
_MOST = 3  # settings in a name; rows that need more get them all
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def of_run(run: Path | None) -> Settings | None:
    """Return the settings of a run's resolved recipe; None if it has none that can be read."""
    path = run / "recipe.yaml" if run is not None else None
    try:
        # reading a pipe or device of this name would never end
        if path is None or not path.is_file() or path.stat().st_size > _LARGEST:
            return None
        return _parsed(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None


def flat(content: Mapping[str, Any]) -> Settings:
    """Return a recipe's sections as `section.key` -> value, without name, expected results and declarations of domains."""
    return {
        f"{section}.{key}": value
        for section in _SECTIONS
        if isinstance(content.get(section), dict)
        for key, value in content[section].items()
        if (section, key) != ("data", "domains")
    }


def targets(settings: Settings | None) -> tuple[str, ...] | None:
    """Return the targets that a recipe names; None if they are unknown."""
    named = settings.get("data.targets") if settings is not None else None
    return tuple(named) if isinstance(named, list | tuple) and all(isinstance(name, str) for name in named) else None


def telling(recipes: Sequence[Settings]) -> list[dict[str, Any]]:
    """Return for each of several recipes the fewest settings that no other has; for equal ones, their common difference."""
    if len(recipes) < 2:
        return [{} for _ in recipes]
    first = recipes[0]
    common = [key for key in first if all(key in other for other in recipes)]
    # targets are shown by a table's columns
    differing = [key for key in common if key != "data.targets" and any(other[key] != first[key] for other in recipes)]
    differing.sort(key=lambda key: key in INCIDENTAL)
    texts = [{key: value_text(recipe[key]) for key in differing} for recipe in recipes]
    alike = Counter(tuple(text[key] for key in differing) for text in texts)
    chosen: list[tuple[str, ...] | None] = [None] * len(texts)
    for size in range(1, min(_MOST, len(differing)) + 1):
        for keys in combinations(differing, size) if len(differing) <= 12 or size == 1 else ():
            counts = Counter(tuple(text[key] for key in keys) for text in texts)
            for i, text in enumerate(texts):
                if chosen[i] is None:
                    same = counts[tuple(text[key] for key in keys)]
                    chosen[i] = keys if same == alike[tuple(text[key] for key in differing)] else None
        if None not in chosen:
            break
    return [{key: recipe[key] for key in keys or differing} for keys, recipe in zip(chosen, recipes, strict=True)]


def differences(mine: Settings, base: Settings, *, but: Iterable[str] = INCIDENTAL) -> dict[str, Any]:
    """Return the settings of `mine` that differ from `base`."""
    return {key: value for key, value in mine.items() if key not in but and value_text(value) != value_text(base.get(key))}


def value_text(value: Any) -> str:
    """Return a value as `--set` takes it: `40`, `[64, 64]`, `null`, `tiny`."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _parsed(text: str) -> Settings:
    if ("*" in text and _ALIAS.search(text)) or text.count("[") + text.count("{") > _MOST_BRACKETS:
        raise ValueError("not a resolved recipe")
    try:
        # runs differ in a section or two: the others are parsed once
        content = {key: value for part in re.split(r"\n(?=\w)", text) for key, value in _section(part).items()}
    except (yaml.YAMLError, AttributeError):
        content = yaml.load(text, Loader=_LOADER)
    if not isinstance(content, dict):
        raise ValueError("not a recipe")
    return flat(content)


@lru_cache(maxsize=4096)
def _section(text: str) -> dict[str, Any]:
    return yaml.load(text, Loader=_LOADER) or {}
