"""Rows of `benchmarks/model.py`, their bars, and its report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dgbench.cost.stages import Trace
from dgbench.cost.timing import Times

EAGER, FAST, EXACT, PRODUCTS = "eager", "fast", "exact", "products"
CROP, SLIDE, STEP = "crop", "slide", "step"


@dataclass(frozen=True)
class Row:
    """A line of the table.

    bar, aim: multiples of the products' time, of every pair of towers.
    ms, gib: bars of DINOv2-L with EVA02-CLIP-L at 512x512 on one H200.
    """

    name: str
    kind: str
    images: int
    exact: bool = False
    bar: float | None = None
    aim: float | None = None
    ms: float | None = None
    gib: float | None = None


ROWS = (
    Row("one crop", CROP, 1, bar=2.8, aim=2.2),
    Row("8 crops", CROP, 8, bar=1.8, aim=1.5),
    Row("sliding window", SLIDE, 1, bar=1.9, aim=1.55),
    Row("step of 2", STEP, 2, bar=6.5, aim=4.5, ms=75, gib=10),
    Row("step of 8", STEP, 8, bar=3.8, aim=2.9, ms=170, gib=28),
    Row("8 crops, exact", CROP, 8, exact=True, ms=450),
    Row("sliding window, exact", SLIDE, 1, exact=True, ms=900),
)
NAMES = tuple(row.name for row in ROWS)


@dataclass
class Measured:
    """What a row found, by column."""

    crops: int  # that go through the towers in a call
    absolute: bool  # whether the bars in ms and GiB are for this pair and device
    times: dict[str, Times] = field(default_factory=dict)
    gib: dict[str, float] = field(default_factory=dict)
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    traces: dict[str, Trace] = field(default_factory=dict)
    flop: int = 0  # of the products
    as_they_are: float | None = None  # the products' milliseconds with widths that are no multiples of 8
    errors: dict[str, str] = field(default_factory=dict)  # of columns that could not be measured

    @property
    def ours(self) -> str:
        """The column that bars are for."""
        return next((name for name in (FAST, EXACT, EAGER) if name in self.times), "")

    @property
    def multiple(self) -> float | None:
        """How many times the products' time the column of the bars takes."""
        there = PRODUCTS in self.times and self.ours
        return self.times[self.ours].median / self.times[PRODUCTS].median if there else None

    def missed(self, row: Row) -> list[str]:
        """Return which of the row's bars are missed: "multiple", "ms", "GiB"."""
        if not self.ours:
            return []
        bars = {
            "multiple": (self.multiple, row.bar),
            "ms": (self.times[self.ours].median, row.ms if self.absolute else None),
            "GiB": (self.gib.get(self.ours), row.gib if self.absolute else None),
        }
        return [name for name, (value, bar) in bars.items() if value is not None and bar is not None and value > bar]


def plus(times: Times | None) -> str:
    """Return a median and half the width of the central 90 %."""
    return "–" if times is None else f"{times.median:.4g} ± {(times.high - times.low) / 2:.2g}"


HEAD = ("work", "eager, ms", "fast, ms", "products, ms", "multiple", "bar", "aim", "within the bar", "GiB, eager", "GiB, fast")


def line(row: Row, found: Measured) -> str:
    """Return a row's line of the table."""
    bars = [f"{row.bar}×"] if row.bar else []
    if found.absolute:
        bars += [f"{row.ms:g} ms"] if row.ms else []
        bars += [f"{row.gib:g} GiB"] if row.gib else []
    eager = EXACT if row.exact else EAGER
    missed = found.missed(row)
    within = ("no: " + ", ".join(missed) if missed else "yes") if found.ours else "failed"
    cells = [
        f"{row.name}, {found.crops} windows" if row.kind == SLIDE else row.name,
        *("failed" if name in found.errors else plus(found.times.get(name)) for name in (eager, FAST, PRODUCTS)),
        f"{found.multiple:.2f}× ({found.ours})" if found.multiple else "–",
        ", ".join(bars) or "–",
        f"{row.aim}×" if row.aim else "–",
        within if bars else "–",
        *(f"{found.gib[name]:.1f}" if name in found.gib else "–" for name in (eager, FAST)),
    ]
    return f"| {' | '.join(cells)} |"


def table(rows: Sequence[Row], measured: Mapping[str, Measured]) -> Iterator[str]:
    """Yield the lines of the table of all rows."""
    yield f"| {' | '.join(HEAD)} |"
    yield "| --- " * len(HEAD) + "|"
    for row in rows:
        yield line(row, measured[row.name])


def floors(rows: Sequence[Row], measured: Mapping[str, Measured], rate: float, whole: float) -> Iterator[str]:
    """Yield the lines of the table of lower bounds.

    Args:
        rate: FLOP a second of one large product.    whole: FLOP of the model for one crop.
    """
    yield f"Lower bounds, at the {rate / 1e12:.4g} TFLOP/s of one large bf16 product here:"
    yield ""
    of_products = ("products, TFLOP", "ms at that rate", "ms measured", "ms with widths as the towers have them")
    yield f"| work | {' | '.join(of_products)} | whole model, TFLOP | ms at that rate |"
    yield "| --- " * 7 + "|"
    for row in rows:
        found = measured[row.name]
        if PRODUCTS not in found.times:
            continue
        cells = [
            *(row.name, f"{found.flop / 1e12:.3g}", f"{1e3 * found.flop / rate:.3g}", f"{found.times[PRODUCTS].median:.4g}"),
            f"{found.as_they_are:.4g}" if found.as_they_are else "the same",
        ]
        model = whole * found.crops
        cells += ["–", "–"] if row.kind == STEP else [f"{model / 1e12:.3g}", f"{1e3 * model / rate:.3g}"]
        yield f"| {' | '.join(cells)} |"


def staged(rows: Sequence[Row], measured: Mapping[str, Measured]) -> Iterator[str]:
    """Yield a line of stages for each row and column."""
    for row in rows:
        for name, stages in measured[row.name].stages.items():
            total = sum(stages.values())
            shares = ", ".join(f"{label} {ms:.3g} ({ms / total:.0%})" for label, ms in stages.items())
            yield f"- {row.name}, {name}, {total:.4g} ms: {shares}"


def traced(row: Row, name: str, trace: Trace, most: int = 15) -> Iterator[str]:
    """Yield the lines of one trace."""
    idle = max(0.0, trace.wall_ms - trace.busy_ms)
    yield f"Trace of {row.name}, {name}: {trace.wall_ms:.4g} ms a call, {idle:.3g} of them without a kernel"
    yield ""
    yield "By kind, ms: " + ", ".join(f"{kind} {ms:.3g} ({ms / trace.wall_ms:.0%})" for kind, ms in trace.by_kind().items())
    yield ""
    yield "| kernel | kind | ms | share | launches |"
    yield "| --- " * 5 + "|"
    for kernel in trace.kernels[:most]:
        short = kernel.name.replace("|", "/")[:90]
        yield f"| `{short}` | {kernel.kind} | {kernel.ms:.3g} | {kernel.ms / trace.wall_ms:.1%} | {kernel.launches:g} |"


def agreement(measured: Mapping[str, Measured], earlier: Mapping[str, Any]) -> list[str]:
    """Return how many medians two runs agree on, and a line for each that is outside of the other run's central 90 %.

    Args:
        earlier: what `as_json` returned of the other run.
    """
    lines, count = [], 0
    for name, found in measured.items():
        before = earlier["rows"].get(name, {}).get("times", {})
        for column in found.times.keys() & before.keys():
            now, then = found.times[column], Times(**before[column])
            count += 1
            if not (then.low <= now.median <= then.high or now.low <= then.median <= now.high):
                lines.append(f"- {name}, {column}: {plus(now)} ms, before {plus(then)}, {now.median / then.median - 1:+.1%}")
    return [f"{count - len(lines)} of {count} medians are within the other run's central 90 %.", *sorted(lines)]


def as_json(measured: Mapping[str, Measured]) -> dict[str, Any]:
    """Return all numbers of the rows."""
    return {
        name: {
            "crops": found.crops,
            "times": {column: asdict(times) for column, times in found.times.items()},
            "multiple": found.multiple,
            "gib": found.gib,
            "stages": found.stages,
            "flop": found.flop,
            "as_they_are_ms": found.as_they_are,
            "errors": found.errors,
            "traces": {column: {"wall_ms": t.wall_ms, "by_kind": t.by_kind()} for column, t in found.traces.items()},
        }
        for name, found in measured.items()
    }
