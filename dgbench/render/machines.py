"""What runs ran on and how long they took, as tables of a report, and what is said of its file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dgbench.render.numbers import byte_size, duration
from dgbench.render.table import ABSENT, Cell, Table

if TYPE_CHECKING:
    from dgbench.html_report import Written
    from dgbench.report.page import Run
    from dgbench.results import Record

_FIRST = ("device", "cpu", "threads", "platform")


def cost_table(runs: Sequence[Run]) -> Table:
    """Return a row for each run: times and memory of its training, and images a second in scoring."""
    rows = []
    for run in runs:
        extra = run.trained.extra if run.trained else {}
        seconds = run.trained.seconds.get("train") if run.trained else None
        # through the model alone: reading and decoding belong to the disk
        timed = [(t.record.n_images, s) for t in run.targets if (s := t.record.seconds.get("model"))]
        device = run.newest.environment.get("device", "")
        rows.append(
            (
                Cell(run.name),
                Cell(ABSENT if seconds is None else duration(seconds)),
                Cell(_number(extra.get("images_per_second"))),
                Cell(_number(extra.get("peak_gib"))),
                Cell(_number(sum(n for n, _ in timed) / sum(s for _, s in timed)) if timed else ABSENT),
                Cell(device or ABSENT),
            )
        )
    header = ("run", "training", "images/s", "peak GiB", "scoring images/s", "device")
    return Table("Time and memory", header, tuple(rows), legend=("Scoring: through the model alone, without reading images.",))


def machine_tables(runs: Sequence[Run]) -> list[Table]:
    """Return a table for each different environment, backends and commit, which says what was done there."""
    found: dict[tuple[tuple[str, str], ...], dict[str, None]] = {}
    for run in runs:
        for record in run.records:
            what = "training" if record.kind == "train" else "scoring"
            found.setdefault(_facts(record), {})[f"{what} of {run.name}"] = None
    return [
        Table(
            ", ".join(done),
            ("", ""),
            tuple((Cell(key), Cell(value)) for key, value in facts),
            left=True,
        )
        for facts, done in found.items()
    ]


def written_tables(found: Written) -> list[Table]:
    """Return what a report's file holds, and what is missing in it."""
    row = (Cell(str(found.file)), Cell(byte_size(found.bytes)), Cell(str(found.runs)), Cell(str(found.pictures)))
    return [Table("", ("report", "size", "runs", "pictures"), (row,), legend=tuple(f"{note}." for note in found.notes))]


def _facts(record: Record) -> tuple[tuple[str, str], ...]:
    commit = f"{record.commit[:12]}{', changed' if record.dirty else ''}" if record.commit else "unknown"
    order = {key: place for place, key in enumerate(_FIRST)}
    environment = sorted(record.environment.items(), key=lambda item: (order.get(item[0], len(order)), item[0]))
    backends = sorted((f"{op}'s backend", backend) for op, backend in record.backends.items())
    return (("commit", commit), *environment, *backends)


def _number(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, int | float) else ABSENT
