"""What a report of runs is made of: a leaderboard, and of each run its scores, confusion matrices, curves and examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from dgbench import metrics, protocol
from dgbench.errors import ResultError
from dgbench.report import images
from dgbench.report.curves import Curves, curves
from dgbench.report.entries import Detail
from dgbench.report.leaderboard import leaderboard
from dgbench.report.rows import Leaderboard
from dgbench.results import Record

if TYPE_CHECKING:
    from dgbench.cost.tradeoff import Tradeoff
    from dgbench.engine.severity import Severity
    from dgbench.report.compare import Comparison

Place = Literal["worst", "median", "best"]


@dataclass(frozen=True, slots=True)
class Example:
    """One image of a split, chosen by its own mIoU in 0..1."""

    id: str
    place: Place
    miou: float
    pictures: tuple[bytes, ...] = ()  # image, truth, prediction, error: JPEG or PNG files; () where they are left out


@dataclass(frozen=True, slots=True)
class Target:
    """One score of a run, and what lies behind it."""

    record: Record
    confusion: NDArray[np.int64] | None  # (K, K), summed over the images; rows are labels
    examples: tuple[Example, ...] = ()
    note: str = ""  # why something of it is missing


@dataclass(frozen=True, slots=True)
class Run:
    """One training run: what its newest scored checkpoint gave."""

    folder: Path
    name: str  # no other run of the page has it
    newest: Record
    trained: Record | None
    targets: tuple[Target, ...]
    curves: Curves | None = None
    severities: tuple[Severity, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def records(self) -> list[Record]:
        """Its scores and its training."""
        return [*(target.record for target in self.targets), *([self.trained] if self.trained else [])]


@dataclass(frozen=True, slots=True)
class Page:
    """A report. Nothing of it is markup yet."""

    board: Leaderboard
    runs: tuple[Run, ...]
    presets: tuple[protocol.Preset, ...]
    tradeoff: Tradeoff | None = None
    comparison: Comparison | None = None
    notes: tuple[str, ...] = field(default_factory=tuple)


def gather(records: Iterable[Record], *, comparison: Comparison | None = None) -> Page:
    """Arrange records, with the matrices and logs beside them, into a report. It has no pictures, operations and severities yet.

    Raises: ResultError if there is no score among the records.
    """
    records = list(records)
    if not any(record.kind == "eval" for record in records):
        raise ResultError("there are no scores to report", "score a run first: dgbench eval RUN")
    board = leaderboard(records, published=False, detail=Detail(per_class=True))
    runs = tuple(_named([_run(folder, own) for folder, own in _by_folder(records).items()]))
    named = dict.fromkeys(target.record.protocol for run in runs for target in run.targets)
    presets = tuple(preset for name in named if name in protocol.PROTOCOLS for preset in protocol.presets(name))
    return Page(board, runs, presets, comparison=comparison, notes=tuple(_notes(records)))


def _by_folder(records: Sequence[Record]) -> dict[Path, list[Record]]:
    """Return the records of each run's newest scored checkpoint, and of its training; the newest run first."""
    found: dict[Path, list[Record]] = {}
    for record in sorted(records, key=lambda record: (record.created, record.id)):
        found.setdefault(record.run or Path(), []).append(record)
    kept = {}
    for folder, own in sorted(found.items(), key=lambda item: item[1][-1].created, reverse=True):
        if newest := next((record for record in reversed(own) if record.kind == "eval"), None):
            kept[folder] = [record for record in own if record.checkpoint == newest.checkpoint]
    return kept


def _run(folder: Path, own: Sequence[Record]) -> Run:
    scores = {(r.target, r.split, r.protocol, r.protocol_digest): r for r in own if r.kind == "eval"}
    trained = next((record for record in reversed(own) if record.kind == "train"), None)
    shown = [record for record in scores.values() if not _is_swept(record, scores.values())] or list(scores.values())
    # the source first, then in the order in which they were scored
    shown.sort(key=lambda record: record.target not in record.source.split("+"))
    notes = []
    course = None
    try:
        course = curves(folder)
    except (ValueError, OSError) as error:
        notes.append(f"the log of its training cannot be read: {error}")
    return Run(folder, folder.name, shown[0], trained, tuple(map(_target, shown)), course, (), tuple(notes))


def _is_swept(record: Record, others: Iterable[Record]) -> bool:
    """Whether a score is one point of a curve over severities, which is drawn as such."""
    base, at, _ = record.target.partition("@")
    along = {other.target for other in others if other.target.startswith(f"{base}@")}
    return bool(at) and len(along) > 1


def _target(record: Record) -> Target:
    if record.confusion is None:
        return Target(record, None, note="no matrices were kept beside this score")
    try:
        ids, counts = images.by_image(record)
    except ResultError as error:
        return Target(record, None, note=error.message)
    return Target(record, counts.sum(axis=0), _chosen(record, ids, counts))


def _chosen(record: Record, ids: Sequence[str], counts: NDArray[Any]) -> tuple[Example, ...]:
    """Return the images with the lowest, the middle and the highest mIoU of their own, as many of them as differ."""
    rules = images.rules_of(record)
    scores = [metrics.miou(one, classes=rules.classes) for one in counts]
    order = sorted((i for i, score in enumerate(scores) if not np.isnan(score)), key=lambda i: (scores[i], ids[i]))
    if not order:
        return ()
    places: dict[int, Place] = {order[0]: "worst"}
    places.setdefault(order[len(order) // 2], "median")
    places.setdefault(order[-1], "best")
    return tuple(Example(ids[i], place, scores[i]) for i, place in places.items())


def _named(runs: Sequence[Run]) -> list[Run]:
    seen = Counter(run.name for run in runs)
    return [run if seen[run.name] == 1 else replace(run, name=f"{run.folder.parent.name}/{run.name}") for run in runs]


def _notes(records: Sequence[Record]) -> list[str]:
    """Return what the tables do not say: protocols that are not those of this dgbench."""
    found = []
    for name, digest in dict.fromkeys((r.protocol, r.protocol_digest) for r in records if r.kind == "eval"):
        known = protocol.PROTOCOLS.get(name)
        if known is None:
            found.append(f"protocol {name}: this dgbench does not have it")
        elif digest and digest != known.digest:
            found.append(f"protocol {name} ({digest}): this dgbench has {known.digest}, which says something else")
    return found
