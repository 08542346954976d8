"""The severity curves that a run's records have together, whichever command scored them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from dgbench.data.corruptions import CORRUPTIONS, LEVELS, Corrupted, Corruption
from dgbench.data.domain import Domain
from dgbench.data.domains import WITH_SEVERITY
from dgbench.engine.severity import Severity, Sweep, curves
from dgbench.errors import DgbenchError
from dgbench.recipe import load_recipe
from dgbench.results import Record

_log = logging.getLogger(__name__)


def of_run(run: Path, records: Iterable[Record], root: Path | None = None) -> tuple[Severity, ...]:
    """Return the curves of one checkpoint, apart by protocol and by how many images were scored.

    A curve whose matrices are gone or are of other images is warned about and left out, as is a domain that is not known here.
    """
    alike: dict[tuple[str, str, int, bool], dict[str, Record]] = {}
    for record in sorted(records, key=lambda record: (record.created, record.id)):
        if record.kind in ("eval", "severity") and record.split == "val":
            measured = (record.protocol, record.protocol_digest, record.n_images, record.rendered)
            alike.setdefault(measured, {})[record.target] = record  # the newest stands
    found = []
    for (name, digest, *_), targets in alike.items():
        drawn = []
        for domain in dict.fromkeys(target.partition("@")[0].partition("+")[0] for target in targets if "@" in target):
            try:
                drawn += curves(_sweeps(domain, targets, run, root), targets)
            except DgbenchError as error:
                _log.warning("%s: no curve of %s: %s", run, domain, error.message)
        if drawn:
            one = next(iter(targets.values()))
            found.append(Severity(run, one.method, one.variant, one.recipe, one.source, name, digest, tuple(drawn)))
    return tuple(found)


def _sweeps(domain: str, records: Mapping[str, Record], run: Path, root: Path | None) -> list[Sweep]:
    """Return what the targets' names say: `streets-fog@0.6`, and `cityscapes+fog@3` beside `cityscapes`."""
    data = load_recipe(str(run / "recipe.yaml"), root=root).data
    along: dict[str, dict[float, Domain | Corrupted]] = {}
    for target in records:
        base, _, place = target.partition("@")
        name, _, corruption = base.partition("+")
        with suppress(ValueError):
            if name != domain or not place:
                continue
            if corruption in CORRUPTIONS and int(place) in LEVELS:
                (row,) = data.rows([domain], root)
                points = along.setdefault(corruption, {0.0: row} if domain in records else {})
                points[int(place) / LEVELS[-1]] = Corrupted(row, Corruption(corruption, int(place)))
            elif not corruption and domain in WITH_SEVERITY and 0 <= float(place) <= 1:
                (row,) = data.rows([target], root)
                along.setdefault("", {})[float(place)] = row
    found = [
        Sweep(domain, corruption, tuple(sorted(points)), tuple(points[place] for place in sorted(points)))
        for corruption, points in along.items()
        if len(points) > 1
    ]
    # a mean over corruptions is of equal levels
    most = max((sweep.severities for sweep in found), key=len, default=())
    return [sweep for sweep in found if sweep.severities == most or not sweep.corruption]
