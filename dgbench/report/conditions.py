"""The score of each weather or time of day in a target that has several, from the matrices of its images."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from dgbench import metrics
from dgbench import protocol as protocols
from dgbench.data.catalog import lookup
from dgbench.data.domains import RENDER_SIZE
from dgbench.errors import DataError, ResultError
from dgbench.report import settings
from dgbench.report.images import by_image, rules_of
from dgbench.results import Record

CONDITIONS = ("fog", "night", "rain", "snow")
_IN_PATH = re.compile(rf"(?:^|/)({'|'.join(CONDITIONS)})/")


def of_record(record: Record) -> Mapping[str, float | None]:
    """Return the mIoU in 0..1 of the images of each condition; nothing of a target without conditions, or without matrices."""
    find = _FINDERS.get(record.target.partition("@")[0])
    if find is None or record.miou is None or (find is _drawn and not _rendered_here(record)):
        return {}
    try:
        ids, counts = by_image(record)
    except ResultError:
        return {}
    rules, found = rules_of(record), [find(record.split, name) for name in ids]
    scores = {}
    for condition in CONDITIONS:
        chosen = [place for place, one in enumerate(found) if one == condition]
        score = metrics.miou(counts[chosen].sum(axis=0), classes=rules.classes, absent=rules.absent) if chosen else None
        scores[condition] = None if score is None or score != score else score
    return scores if any(score is not None for score in scores.values()) else {}


def _named_in_path(_split: str, name: str) -> str:
    found = _IN_PATH.search(name)
    return found[1] if found else ""


def _drawn(split: str, name: str) -> str:
    from dgbench import streets

    try:
        return streets.weather("streets-adverse", split, int(name))
    except ValueError:
        return ""


def _rendered_here(record: Record) -> bool:
    """Whether this version of the renderer made the images of a record: another may draw another weather for an image."""
    known, size = protocols.PROTOCOLS.get(record.protocol), (settings.of_run(record.run) or {}).get("data.size")
    if known is None:
        return False
    try:
        domain = lookup(record.target)
    except DataError:  # such as a severity that there is none of
        return False
    size = tuple(size) if isinstance(size, list | tuple) else RENDER_SIZE
    row = protocols.domain_row(domain, record.split, protocols.label_map(known, domain), size)
    return protocols.protocol_hash(known, row) == record.protocol_hash


# domain -> (split, image id) -> one of CONDITIONS, or "" if it is unknown
_FINDERS: Mapping[str, Callable[[str, str], str]] = {"acdc": _named_in_path, "streets-adverse": _drawn}
