"""Columns of tables: the targets of recipes, and other targets in tables of models that were scored on all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Order = Callable[[str], tuple[int, str]]


@dataclass(frozen=True, slots=True)
class Scored:
    """The targets of one model, without the source's validation split."""

    named: tuple[str, ...] | None  # the targets of its recipe; None if unknown
    full: frozenset[str]
    some: frozenset[str]  # scored, completely or partly


def tables(models: Sequence[Scored], order: Order) -> list[tuple[tuple[str, ...], list[int]]]:
    """Return the columns of each table and the models that are its rows, so that every score is in a table.

    First come the sets of targets that recipes name, the most common first: a model is a row if its own recipe names
    the set, or if it was scored on all of it. The other targets (severities, later evaluations) follow, in tables
    of columns that the same models were scored on completely, so that each of these can be ranked.
    """
    named = _named(models)
    # with a target that no model was scored on, no row would have a rank
    scored = frozenset().union(*(model.some for model in models))
    sets = Counter(own & scored or own for own in named)
    found: list[tuple[tuple[str, ...], list[int]]] = []
    shown: list[set[str]] = [set() for _ in models]
    full_of = Counter(model.full for model in models)
    for columns in sorted(sets, key=lambda own: (-sets[own], -len(own), sorted(map(order, own)))):
        rows = [i for i, model in enumerate(models) if _enters(model, named[i] & scored or named[i], columns)]
        if rows:
            found.append((tuple(sorted(columns, key=order)), rows))
        for i in rows:
            shown[i] |= columns
    left = sorted({column for model, seen in zip(models, shown, strict=True) for column in model.some - seen}, key=order)
    together: dict[tuple[frozenset[frozenset[str]], str], list[str]] = {}
    bases = {column.partition("@")[0] for column in left if "@" in column}
    for column in left:
        base = column.partition("@")[0]
        # the severities of one condition form a table, so that no mean mixes them with other targets
        have = frozenset(full for full in full_of if column in full)
        together.setdefault((have, base if base in bases else ""), []).append(column)
    for columns_ in together.values():
        found.append((tuple(columns_), [i for i, model in enumerate(models) if model.some & set(columns_)]))
    return found


def _enters(model: Scored, own: frozenset[str], columns: frozenset[str]) -> bool:
    if columns <= model.full and columns:
        return True
    return own == columns and (bool(model.some & columns) or not model.some)


def _named(models: Sequence[Scored]) -> list[frozenset[str]]:
    """Return the set of targets of each model's recipe; for unknown recipes the nearest known set, else the usual one."""
    known = Counter(frozenset(model.named) for model in models if model.named is not None)
    ranked = [own for own, _ in known.most_common()]
    rest = [model for model in models if model.named is None and not any(own <= model.full for own in ranked)]
    usual = _usual(rest)
    return [
        frozenset(model.named) if model.named is not None else next((own for own in ranked if own <= model.full), usual)
        for model in models
    ]


def _usual(models: Sequence[Scored]) -> frozenset[str]:
    """Return the set that fills most cells with models scored on all of it; severities only if all were scored on them."""
    scored = [model.full for model in models if model.full] or [model.some for model in models]
    if not scored:
        return frozenset()
    shared = frozenset.intersection(*scored)
    sets = Counter(frozenset(c for c in columns if "@" not in c or c in shared) or columns for columns in scored)
    everything = Counter(scored)

    def cells(chosen: frozenset[str]) -> tuple[int, int, list[str]]:
        having = sum(n for columns, n in everything.items() if chosen <= columns)
        return len(chosen) * having, len(chosen), sorted(chosen)

    return max(sets, key=cells)
