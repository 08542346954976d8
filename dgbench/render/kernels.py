"""Tables of the operators' backends: which run here, the library that was built for them, and their times."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from dgbench.render.flat import FlatRow, flat_row, flat_rows
from dgbench.render.table import ABSENT, Cell, Table

if TYPE_CHECKING:
    from dgbench.cost.kernels import Bench, Built, KernelList, TimedCase


def kernel_tables(found: KernelList) -> list[Table]:
    rows = []
    for row in found.backends:
        picked = ", ".join(row.auto) or ("named only" if row.named_only else ABSENT)
        state = Cell("runs", "good") if row.reason is None else Cell(row.reason, "dim")
        rows.append((Cell(row.op), Cell(row.backend), Cell(picked, "best" if row.auto else "dim"), state))
    legend = [f"Asked on {found.device} with fp32 tensors. default for: the dtypes for which `auto` takes this backend."]
    if named := os.environ.get("MFUSER_BACKEND"):
        legend.append(f"MFUSER_BACKEND={named} stands for `auto`.")
    library = found.library
    facts = (
        ("state", Cell("loads", "good") if library.reason is None else Cell(library.reason, "dim")),
        ("in use", Cell(library.path or ABSENT)),
        *(("built", Cell(path)) for path in library.built if path != library.path),
        ("folder", Cell(library.folder)),
        ("sources", Cell(", ".join(library.sources) or "none")),
        ("their hash", Cell(library.sources_hash)),
        ("this GPU", Cell(library.architecture or "none")),
        ("nvcc", Cell(library.nvcc or "not found")),
    )
    return [
        Table("", ("operator", "backend", "default for", "state"), tuple(rows), keys=2, left=True, legend=tuple(legend)),
        Table("", ("CUDA library", ""), tuple((Cell(name), cell) for name, cell in facts), left=True),
    ]


def built_tables(built: Built) -> list[Table]:
    size = f"{built.bytes / 1e6:.1f} MB for {', '.join(built.architectures)}"
    how = f"compiled in {built.seconds:.0f} s" if built.new else "there already"
    return [Table(f"{built.path}: {size}, {how}", (), ())]


def bench_tables(bench: Bench) -> list[Table]:
    return [_timed_case(case, bench.machine.name) for case in bench.cases]


def _timed_case(case: TimedCase, machine: str) -> Table:
    rows = []
    for row in case.timings:
        texts = (row.backend, *_milliseconds(row.forward_ms, row.both_ms), f"{row.forward_speed:.2f}", f"{row.both_speed:.2f}")
        rows.append(tuple(map(Cell, texts)))
    rows.append(tuple(Cell(text, "dim") for text in ("floor", *_milliseconds(*case.floor_ms), "", "")))
    legend = [f"floor: what {' and '.join(dict.fromkeys(case.floor_by))} alone would take."]
    if case.timings:
        legend.insert(0, f"speed: times as fast as {case.timings[0].backend}; higher is better.")
    legend += [f"{name}: {reason}" for name, reason in case.refused.items()]
    title = f"{case.op}, {case.shape}, {case.dtype} on {machine}: median ms, lower is better"
    header = ("backend", "forward", "+ backward", "forward speed", "+ backward speed")
    return Table(title, header, tuple(rows), legend=tuple(legend))


def _milliseconds(*values: float) -> tuple[str, ...]:
    return tuple(f"{value:.3f}" if value < 10 else f"{value:.1f}" for value in values)


def kernel_rows(found: KernelList) -> list[FlatRow]:
    """Return a row for each backend; the library is in JSON alone."""
    return [row | {"device": found.device} for row in flat_rows(found.backends)]


def bench_rows(bench: Bench) -> list[FlatRow]:
    """Return a row for each backend that was timed on a case, with the case's lower bound."""
    rows = []
    for case in bench.cases:
        about = {"op": case.op, "shape": case.shape, "dtype": case.dtype, "machine": bench.machine.name}
        rows += [flat_row(timing, **about) for timing in case.timings]
        rows.append({**about, "backend": "floor", "forward_ms": case.floor_ms[0], "both_ms": case.floor_ms[1]})
        rows += [{**about, "backend": name, "refused": reason} for name, reason in case.refused.items()]
    return rows
