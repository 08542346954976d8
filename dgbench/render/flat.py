"""A typed result as rows of plain values, for CSV: a column for each field, numbers in full."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from dgbench.results import finite

FlatRow = dict[str, Any]  # a column's name -> text, number, bool or None


def flat_rows(result: Any) -> list[FlatRow]:
    """Return a row for each of the results."""
    return [flat_row(one) for one in (result if isinstance(result, Sequence) else [result])]


def flat_row(result: Any, *, without: Sequence[str] = (), **more: Any) -> FlatRow:
    """Return the fields of a dataclass under names that are joined by `_`, `more` in front.

    Args:
        without: fields that are left out.
    """
    row: FlatRow = {}
    for name, value in more.items():
        flatten(name, value, row)
    for field in dataclasses.fields(result):
        if field.name not in without:
            flatten(field.name, getattr(result, field.name), row)
    return row


def flatten(name: str, value: Any, into: FlatRow) -> None:
    """Put a value under its name, or its parts under theirs: sizes as `512x1024`, other lists with `; ` between."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            flatten(f"{name}_{field.name}", getattr(value, field.name), into)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            flatten(f"{name}_{key}", item, into)
    elif isinstance(value, list | tuple):
        sign = "x" if value and all(isinstance(item, int) for item in value) else "; "
        into[name] = sign.join(map(str, value))
    else:
        into[name] = finite(value)
