"""Tables of the cost of models and fusers: counts, times, parts, and the same rows for other programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from dgbench.render.flat import FlatRow, flat_row, flatten
from dgbench.render.table import ABSENT, Cell, Table

if TYPE_CHECKING:
    from dgbench.cost.fusion import FusionProfile, FusionRow
    from dgbench.cost.model_times import Timing
    from dgbench.cost.profile import Profile, Row
    from dgbench.cost.timing import Hardware, Times

# meaning of each convention's numbers; the engine is not imported for it
_SAYS = {
    "mac": "GMAC: a multiply-accumulate of products and sampling is one; the scan is beside it.",
    "flop": "GFLOP: a multiply-accumulate is two, and the scan is in it.",
    "paper": "paper: a batch of two images, a multiply-accumulate is two, of the scan only its skip, sampling not counted.",
}
_GFLOP = "GFLOP: of one image, two a multiply-accumulate, the scan included."
_SCAN = "scan: 9 B L D N + B L D floating-point operations. Not counted: activations, norms, softmax, copies."


def profile_tables(found: Profile) -> list[Table]:
    tables = [_counts(found)]
    if any(row.timings or row.problem for row in found.rows):
        tables.append(_times(found))
    return tables + [_parts(row, found) for row in found.rows if found.by_module]


def _counts(found: Profile) -> Table:
    image = f"an image of {_size(found.slide)} by windows" if found.slide else "an image"
    rows, other = [], found.convention != "flop"
    for row in found.rows:
        cells = [*_name(row), Cell(_size(row.size)), *((Cell(str(row.windows)),) if found.slide else ())]
        cells += [Cell(_millions(row.parameters)), Cell(_millions(row.trainable)), Cell(_giga(row.total))]
        cells += [*((Cell(_giga(row.gflop)),) if other else ()), Cell(_giga(row.cost.scan / 1e9))]
        rows.append(tuple(cells))
    header = ["method", "backbone", "size", *(["windows"] if found.slide else []), "params M", "trained M", found.unit]
    header += [*(["GFLOP"] if other else []), "scan GFLOP"]
    legend = [_SAYS[found.convention], *([_GFLOP] if other else []), _SCAN]
    if found.counted_with:
        legend.append(f"Counted with {found.counted_with}, which are other versions than those here.")
    if found.unmeasured:
        legend.append(f"No times: {found.unmeasured}.")
    title = f"Cost of {image}, counted without weights (convention {found.convention})"
    return Table(title, tuple(header), tuple(rows), keys=2, legend=tuple(legend))


def _times(found: Profile) -> Table:
    rows, fast = [], found.mode == "fast"
    for row in found.rows:
        first, *more = row.timings or (None,)
        best = row.best
        cells = [*_name(row), Cell(_batch(first)), Cell(_spread(first)), Cell(_rate(first)), Cell(_gib(first))]
        if any(other.best or other.step for other in found.rows):
            cells += [Cell(_batch(best)), Cell(_spread(best)), Cell(_rate(best)), Cell(_gib(best)), Cell(_joules(best))]
            cells += [] if fast else [Cell(_spread(row.step)), Cell(_gib(row.step))]
        rows.append(tuple(cells))
        rows += [
            (*_name(row), Cell(_batch(timing)), Cell(_spread(timing)), Cell(_rate(timing)), Cell(_gib(timing))) for timing in more
        ]
    header: tuple[str, ...] = ("method", "backbone", "batch", "ms", "images/s", "GiB")
    legend = [
        "ms: median of the calls, as their caller waits for them; ± half of what 90 % of them lie between.",
        "GiB: peak, weights included.",
    ]
    if any(row.best or row.step for row in found.rows):
        header += ("best batch", "ms", "images/s", "GiB", "J/image", *(() if fast else ("step ms", "step GiB")))
        which = "mode fast is timed at 8 alone, as each is compiled" if fast else "at which most images pass a second"
        legend.append(f"best batch: {which}. J: by the GPU's own counter.{'' if fast else ' step: of training on two images.'}")
    if fast:
        legend.append("No training step: mode fast is for inference; a recipe's train.frozen and train.compile make a step fast.")
    legend += [f"{row.method} ({row.variant}): {row.problem}" for row in found.rows if row.problem]
    if found.hardware:
        legend.append(machine(found.hardware, found.environment, _backends(found)))
    compiled = (", mode fast" if fast else "") + (", compiled" if found.compiled else "")
    where = found.hardware.name if found.hardware else ""
    what = f"{_size(found.slide)} images by windows" if found.slide else "crops"
    return Table(f"Times of {what}, {found.dtype}{compiled}, on {where}", header, tuple(rows), keys=2, legend=tuple(legend))


def _parts(row: Row, found: Profile) -> Table:
    rows = []
    for part in row.components:
        share = 100 * part.total / row.total if row.total else 0.0
        rows.append(
            (
                Cell(part.name),
                Cell(_millions(part.parameters)),
                Cell(_millions(part.trainable)),
                Cell(_giga(part.total)),
                Cell(f"{share:.1f} %"),
                Cell(_giga(part.cost.scan / 1e9)),
            )
        )
    rows.append(
        (
            Cell("total"),
            Cell(_millions(row.parameters)),
            Cell(_millions(row.trainable)),
            Cell(_giga(row.total)),
            Cell("100.0 %"),
            Cell(_giga(row.cost.scan / 1e9)),
        )
    )
    header = ("part", "params M", "trained M", found.unit, "share", "scan GFLOP")
    title = f"{row.method} ({row.variant}) at {_size(row.size)}, part by part"
    return Table(title, header, tuple(rows))


def _name(row: Row) -> tuple[Cell, Cell]:
    return Cell(row.recipe or row.method), Cell(row.variant or ABSENT)


def _size(size: tuple[int, int] | None) -> str:
    return f"{size[0]}x{size[1]}" if size else ABSENT


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f}"


def _giga(value: float) -> str:
    return f"{value:,.2f}" if value else "0"


def _batch(timing: Timing | None) -> str:
    return str(timing.batch) if timing else ABSENT


def _rate(timing: Timing | None) -> str:
    return f"{timing.images_per_second:.1f}" if timing else ABSENT


def _gib(timing: Timing | None) -> str:
    return f"{timing.gib:.2f}" if timing and timing.gib is not None else ABSENT


def _joules(timing: Timing | None) -> str:
    return f"{timing.joules:.2f}" if timing and timing.joules is not None else ABSENT


def _spread(timing: Timing | None) -> str:
    return milliseconds(timing.ms) if timing else ABSENT


def milliseconds(times: Times | None) -> str:
    """Return `12.3 ±0.4`: the median ± half the width of the central 90 % of the calls."""
    if times is None:
        return ABSENT
    half = (times.high - times.low) / 2
    digits = 3 if times.median < 1 else 2 if times.median < 10 else 1
    return f"{times.median:.{digits}f} ±{half:.{digits}f}"


def _backends(found: Profile) -> dict[str, str]:
    return {op: name for row in found.rows for op, name in row.backends.items()}


def machine(gpu: Hardware, environment: Mapping[str, str], backends: Mapping[str, str]) -> str:
    """Return what a time depends on: GPU, versions, clock, power, backends."""
    parts = [f"torch {environment.get('torch', '?')}"]
    if gpu.driver:
        parts.append(f"driver {gpu.driver}")
    if gpu.clock and gpu.clock_max:
        parts.append(f"{gpu.clock:.0f} of {gpu.clock_max:.0f} MHz")
    if gpu.power_limit:
        parts.append(f"{gpu.power_limit:.0f} W")
    parts += [f"{op} by {name}" for op, name in sorted(backends.items())]
    return f"{gpu.name}: {', '.join(parts)}."


# ---- fusion


def fusion_tables(found: FusionProfile) -> list[Table]:
    return [_fusers(found), *(_sweep(found) if len(found.sweep) > 1 else ())]


def _fusers(found: FusionProfile) -> Table:
    timed = any(row.forward for row in found.rows)
    scored = any(row.accuracy for row in found.rows)
    columns = list(next((row.published for row in found.rows if row.published), {}))
    rows = []
    for row in found.rows:
        cells = [
            Cell(row.fuser),
            Cell(_millions(row.parameters)),
            Cell(_giga(row.total)),
            Cell(_giga(row.cost.scan / 1e9)),
            Cell(_giga(row.gflop)),
        ]
        if timed:
            cells += [
                Cell(milliseconds(row.forward)),
                Cell(_times_faster(row, found)),
                Cell(milliseconds(row.both)),
                Cell(ABSENT if row.gib is None else f"{row.gib:.2f}"),
            ]
        cells += [Cell(f"{100 * row.published[name]:.2f}" if row.published else ABSENT) for name in columns]
        if scored:
            cells.append(Cell(_accuracy(row)))
        rows.append(tuple(cells))
    header: tuple[str, ...] = ("fuser", "params M", found.unit, "scan GFLOP", "GFLOP")
    legend = [_SAYS[found.convention], _GFLOP, _SCAN]
    if timed:
        header += ("ms", "times mvfuser", "+ backward ms", "GiB")
        legend.append(
            f"ms: batch {found.batch}, {found.dtype}, one call of each in turn; median, ± half of what 90 % lie between."
        )
        if found.hardware:
            legend.append(machine(found.hardware, found.environment, found.backends))
    if columns:
        header += (*(f"paper {name[0].upper()}" for name in columns[:-1]), "paper avg.")
        names = ", ".join(f"{name[0].upper()} {name}" for name in columns[:-1])
        legend.append(f"paper: published mIoU in %, {names}, and its average; {found.cite}.")
    if scored:
        header += ("own mIoU",)
        legend.append(f"own mIoU in %: {found.scored}.")
    if found.left_out:
        legend.append(f"Own runs are left out where their towers are not {found.dim} wide: {', '.join(found.left_out)}.")
    if found.unmeasured:
        legend.append(f"No times: {found.unmeasured}.")
    first, second = found.tokens
    title = f"One fusion layer, {first} + {second} tokens of width {found.dim}, convention {found.convention}"
    return Table(title, header, tuple(rows), legend=tuple(legend))


def _times_faster(row: FusionRow, found: FusionProfile) -> str:
    base = found.rows[0].forward
    return f"{row.forward.median / base.median:.2f}" if row.forward and base else ABSENT


def _accuracy(row: FusionRow) -> str:
    if row.accuracy is None:
        return ABSENT
    spread = f" ±{100 * row.accuracy.spread:.1f}" if row.accuracy.seeds > 1 else ""
    return f"{100 * row.accuracy.mean:.1f}{spread} ({row.accuracy.seeds})"


def _sweep(found: FusionProfile) -> list[Table]:
    def table(title: str, value: Callable[[FusionRow], str]) -> Table:
        rows = tuple(
            (Cell(_size(point.size)), Cell(str(sum(point.tokens))), *(Cell(value(row)) for row in point.rows))
            for point in found.sweep
        )
        return Table(title, ("images", "tokens", *(row.fuser for row in found.sweep[0].rows)), rows, keys=2)

    tables = [table(f"{found.unit} of the same layer at other token counts", lambda row: _giga(row.total))]
    if any(row.forward for point in found.sweep for row in point.rows):
        tables.append(table(f"ms of its forward pass, batch {found.batch}", lambda row: milliseconds(row.forward)))
        tables.append(table(f"ms of forward and backward, batch {found.batch}", lambda row: milliseconds(row.both)))
    return tables


# ---- for other programs


def profile_rows(found: Profile | FusionProfile) -> list[FlatRow]:
    """Return a row for each model or fuser, with unrounded numbers and units in the names of columns."""
    rows = []
    for row in found.rows:
        values = flat_row(row, without=("components", "by_operator", "by_module", "timings", "backends"))
        for timing in getattr(row, "timings", ()):
            flatten(f"batch{timing.batch}", timing, values)
        values |= {"convention": found.convention, "dtype": found.dtype, "gpu": found.hardware.name if found.hardware else None}
        rows.append(values)
    return rows
