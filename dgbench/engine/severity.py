"""mIoU as a shift grows: weather of rendered streets over its severity, any other domain over levels of corruption.

The area under such a curve is the mean height of the straight lines through its points, a mIoU: trapezoids over the severity,
divided by the severity's range. Level l of a corruption is a severity of l / 5, and the images as they are are that of 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dgbench import matrices, metrics, protocol, results
from dgbench.data import catalog
from dgbench.data.corruptions import CORRUPTIONS, LEVELS, Corrupted, Corruption
from dgbench.data.domain import Domain
from dgbench.data.domains import WITH_SEVERITY
from dgbench.errors import DataError, ResultError
from dgbench.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CONDITIONS = ("streets-night", "streets-rain", "streets-fog", "streets-snow")  # what is measured by default
STEPS = (0.0, 0.25, 0.5, 0.75, 1.0)
MEAN = "mean"  # of a domain's corruptions, in the place of a corruption's name


@dataclass(frozen=True, slots=True)
class Sweep:
    """What is scored for one curve."""

    domain: str
    corruption: str  # "" for weather of rendered streets
    severities: tuple[float, ...]  # growing, in 0..1
    targets: tuple[Domain | Corrupted, ...]


@dataclass(frozen=True, slots=True)
class Point:
    """One score of a curve; mIoU in 0..1, None if undefined."""

    severity: float
    miou: float | None
    interval: tuple[float | None, float | None]  # 95 %, over images
    records: tuple[str, ...]  # ids; of a mean as many as it is of


@dataclass(frozen=True, slots=True)
class Curve:
    """The scores of one sweep, or their mean over the corruptions of a domain."""

    domain: str
    corruption: str
    points: tuple[Point, ...]
    n_images: int
    n_available: int
    partial: bool  # not the images of the published split, no more and no fewer
    rendered: bool  # an export of rendered scenes stands in the published set's place
    area: float | None  # mean height
    interval: tuple[float | None, float | None]  # of the area: images are left out at all severities at once
    retention: float | None  # the area divided by the score at severity 0; None without one


@dataclass(frozen=True, slots=True)
class Severity:
    """The curves of one checkpoint."""

    run: Path
    method: str
    variant: str
    recipe: str
    source: str
    protocol: str
    protocol_digest: str
    curves: tuple[Curve, ...]


def sweeps(
    rows: Sequence[Domain],
    *,
    steps: Sequence[float] | None = None,
    corruptions: Sequence[str] | None = None,
    levels: Sequence[int] | None = None,
) -> list[Sweep]:
    """Return what is to be scored of each domain: weather where it has a severity, corruptions elsewhere.

    Args:
        steps: severities of weather in 0..1; default STEPS.
        corruptions: names; default all.    levels: of corruptions, besides the clean images; default all five.

    Raises: DataError for a domain that has a severity already, an unknown corruption, a level or step that there is not, a
        single step, or an option that fits none of the domains.
    """
    rows = list({row.name: row for row in rows}.values())
    if fixed := next((row for row in rows if row.severity is not None), None):
        raise DataError(f"`{fixed.name}` is of one severity", f"name `{fixed.base}`, and severities with --steps")
    weather = [row for row in rows if row.name in WITH_SEVERITY]
    others = [row for row in rows if row not in weather]
    named = ", ".join(f"`{row.name}`" for row in rows)
    if steps is not None and not weather:
        raise DataError(f"--steps is of weather, which {named} has not", "choose corruptions' levels with --levels")
    if (corruptions is not None or levels is not None) and not others:
        raise DataError(
            f"--corruptions and --levels are of domains without a severity of their own, which {named} has",
            "choose severities with --steps",
        )
    found = [_weather(row, steps) for row in weather]
    for row in others:
        for name in dict.fromkeys(corruptions if corruptions is not None else CORRUPTIONS):
            chosen = [Corruption(name, level) for level in sorted(set(levels if levels is not None else LEVELS))]
            places = (0.0, *(one.level / LEVELS[-1] for one in chosen))
            found.append(Sweep(row.name, name, places, (row, *(Corrupted(row, one) for one in chosen))))
    return found


def _weather(row: Domain, steps: Sequence[float] | None) -> Sweep:
    places = tuple(sorted(set(steps if steps is not None else STEPS)))
    if len(places) < 2:
        raise DataError(f"one severity is no curve of `{row.name}`", "give two or more: --steps 0 0.5 1")
    return Sweep(row.name, "", places, tuple(catalog.lookup(f"{row.name}@{place:g}") for place in places))


def measure(
    run: Path,
    wanted: Sequence[Sweep],
    *,
    progress: Progress,
    device: str | None = None,
    root: Path | None = None,
    protocol_name: str | None = None,
    limit: int | None = None,
) -> Severity:
    """Score a run's checkpoint on all that the sweeps name; what its records have already is not scored again.

    Args:
        wanted: as `sweeps` gives them.
        limit: score the first so many images of each domain only.
        others: as those of `dgbench.engine.evaluate.evaluate`.

    Raises: as `evaluate`; ResultError if the matrices of a record are gone.
    """
    from dgbench.engine.evaluate import evaluate

    targets = {target.name: target for sweep in wanted for target in sweep.targets}
    scored = evaluate(
        run,
        list(targets.values()),
        progress=progress,
        device=device,
        root=root,
        protocol_name=protocol_name,
        limit=limit,
        reuse=True,
    )
    records = dict(zip(targets, scored, strict=True))
    first = next(iter(records.values()))
    return Severity(
        run,
        first.method,
        first.variant,
        first.recipe,
        first.source,
        first.protocol,
        first.protocol_digest,
        tuple(curves(wanted, records)),
    )


def curves(wanted: Sequence[Sweep], records: dict[str, results.Record]) -> list[Curve]:
    """Return a curve for each sweep, and behind those of several corruptions of one domain their mean.

    Args:
        records: with their matrices, by the targets' names.

    Raises: ResultError if matrices are gone, or are of other images at one severity than at another.
    """
    found: list[Curve] = []
    for domain in dict.fromkeys(sweep.domain for sweep in wanted):
        own = [sweep for sweep in wanted if sweep.domain == domain]
        columns = [[records[target.name] for target in sweep.targets] for sweep in own]
        counts = _matrices([record for column in columns for record in column])
        found += [
            _curve(domain, sweep.corruption, sweep.severities, [[record] for record in column], counts)
            for sweep, column in zip(own, columns, strict=True)
        ]
        if len(own) > 1:
            found.append(_curve(domain, MEAN, own[0].severities, [list(row) for row in zip(*columns, strict=True)], counts))
    return found


def _matrices(records: Sequence[results.Record]) -> dict[str, NDArray[np.int64]]:
    """Counts (n, K, K) by the records' ids, image i of each being that of the others."""
    first = results.read_matrices(records[0])
    found = {records[0].id: first.counts}
    for record in records[1:]:
        if record.id not in found:
            try:
                found[record.id] = matrices.paired(first, results.read_matrices(record))[1]
            except ValueError as error:
                raise ResultError(
                    f"records {records[0].id} and {record.id} are not of the same images: {error}",
                    "remove the older of them, and call the command again",
                ) from None
    return found


def _curve(
    domain: str,
    corruption: str,
    severities: Sequence[float],
    scored: Sequence[Sequence[results.Record]],
    counts: dict[str, NDArray[np.int64]],
) -> Curve:
    """Return a curve; `scored` has for each severity the records whose mean is its score."""
    first = scored[0][0]
    rules = protocol.lookup(first.protocol)

    def weighted(ids: Sequence[str], weights: Sequence[float]) -> tuple[float, tuple[float, float]]:
        classes, absent = protocol.CLASS_SETS[rules.classes], rules.absent_classes
        value, *ends = metrics.weighted([counts[id_] for id_ in ids], weights, classes=classes, absent=absent)
        return value, (ends[0], ends[1])

    points: list[Point] = []
    for place, together in zip(severities, scored, strict=True):
        ids = tuple(dict.fromkeys(record.id for record in together))
        miou: float | None = together[0].miou
        interval: tuple[float | None, float | None] = together[0].interval
        if len(ids) > 1:
            miou, interval = None, (None, None)
            if all(record.miou is not None for record in together):
                miou, interval = weighted(ids, [1 / len(ids)] * len(ids))
        points.append(Point(place, miou, interval, ids))
    area: float | None = None
    ends: tuple[float | None, float | None] = (None, None)
    if all(point.miou is not None for point in points):
        # of a mean, each severity's weight is shared
        shares = [
            (record.id, weight / len(together))
            for weight, together in zip(metrics.trapezoid_weights(severities), scored, strict=True)
            for record in together
        ]
        area, ends = weighted([id_ for id_, _ in shares], [share for _, share in shares])
    clean = points[0].miou if severities[0] == 0 else None
    return Curve(
        domain,
        corruption,
        tuple(points),
        first.n_images,
        first.n_available,
        not first.complete,
        first.rendered,
        area,
        ends,
        area / clean if area is not None and clean else None,
    )
