"""Lookup of a domain's row by name: in the table, in users' declarations, or among data sets fetched from a Hub.

A name is looked up once, where it enters (the command line, a recipe), and the row is passed on. Nothing is cached between
look-ups: a recipe's own declarations are passed as an argument.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dgbench.data import hub_sets
from dgbench.data.domain import Domain
from dgbench.data.domains import DOMAINS, WITH_SEVERITY, built_in
from dgbench.data.places import data_root
from dgbench.errors import DataError, spelled, unknown

if TYPE_CHECKING:
    from dgbench.data.custom import UserDomain


def names(root: Path | None = None) -> tuple[str, ...]:
    """Return every domain's name, without aliases; those that a user declared in a file, or fetched from a Hub, come last.

    Wrong declarations, and names with two different declarations, are skipped with a warning.
    """
    fetched = tuple(name for name in hub_sets.names(data_root(root)) if built_in(name) is None)
    if "DGBENCH_DOMAINS" not in os.environ and not (data_root(root) / "domains").is_dir():
        return (*DOMAINS, *fetched)  # reading declarations takes pydantic, which completion need not wait for
    from dgbench.data.custom import discover

    return (*DOMAINS, *dict.fromkeys((*discover(root), *fetched)))


def lookup(name: str, root: Path | None = None, declared: Mapping[str, UserDomain] | None = None) -> Domain:
    """Return the row of a name or alias, in any case, or of a YAML file; `streets-fog@0.6` sets a severity in 0..1.

    Args:
        root: data root in whose `domains/` and fetched sets unknown names are looked for; default: DGBENCH_DATA or `./data`.
        declared: what a recipe declares itself, by name.

    Raises: DataError naming the nearest known domain, or what a severity may be, or what is wrong with a declaration, or
        that the name is declared twice, differently.
    """
    base, at, suffix = name.partition("@")
    row = None if name.endswith((".yaml", ".yml")) else built_in(base)
    if row is not None:
        return _with_severity(row, suffix) if at else row
    from dgbench.data import custom

    declared = declared or {}
    if name.endswith((".yaml", ".yml")):
        one = custom.read(Path(name))
        custom.check(one, root, declared)
        return custom.build(one.name, one.spec)
    # declared names are in lower case; folders of fetched data sets may have any name
    if own := next((key for key in (base, base.lower()) if key in declared), None):
        row = custom.build(own, declared[own])
    elif found := custom.find(base, root) or custom.find(base.lower(), root):
        row = custom.build(found.name, found.spec)
    else:
        row = hub_sets.domain(spelled(base, hub_sets.names(data_root(root))) or base, data_root(root))
    if row is None:
        known = [*names(root), *declared, *(alias for domain in DOMAINS.values() for alias in domain.aliases)]
        raise DataError(*unknown("domain", base, known))
    return _with_severity(row, suffix) if at else row


def rows(
    given: Iterable[str | Domain], root: Path | None = None, declared: Mapping[str, UserDomain] | None = None
) -> tuple[Domain, ...]:
    """Return the row of each source or target; rows are returned unchanged.

    Raises: DataError as `lookup`, if two different rows have the same name, and for a domain that is for pretraining only.
    """
    found = tuple(benchmarked(one if isinstance(one, Domain) else lookup(one, root, declared)) for one in given)
    known = {name: spec.digest() for name, spec in (declared or {}).items()}
    for row in found:
        if row.digest and known.setdefault(row.name, row.digest) != row.digest:
            raise DataError(
                f"`{row.name}` is declared twice, differently",
                "give one of them another name, since scores are identified by it",
            )
    return found


def benchmarked(row: Domain) -> Domain:
    """Return the row of a domain that may be a source or a target.

    Raises: DataError for a domain that is for pretraining only.
    """
    if row.role == "pretrain":
        raise DataError(
            f"`{row.name}` is for pretraining only: it is neither a source nor a target",
            "`dgbench data list` shows the role of every domain",
        )
    return row


def joined(sources: Iterable[str]) -> str:
    """Return the one name under which a training on these domains is recorded: sorted, so that their order does not matter."""
    return "+".join(sorted(sources))


def _with_severity(row: Domain, text: str) -> Domain:
    if row.name not in WITH_SEVERITY:
        raise DataError(f"`{row.name}` has no severity", f"these do: {', '.join(WITH_SEVERITY)}; for example `streets-fog@0.6`")
    try:
        severity = float(text)
    except ValueError:
        severity = -1.0
    if not 0 <= severity <= 1:
        raise DataError(f"severity `{text}` of `{row.name}` is not a number in 0..1", "for example `streets-fog@0.6`")
    return replace(row, name=f"{row.name}@{severity:g}", severity=severity)
