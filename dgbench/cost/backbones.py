"""The published backbone tables beside our own counts, and on a device times and memory of every row and trunk.

Counts are of one image in evaluation mode. Those that ship are looked up (`backbone_counts`), or made anew. Times are of random
weights, which cost what trained ones do.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from dgbench import results
from dgbench.cost.backbone_counts import SWEEP, SWEPT, known, made_with, table_net
from dgbench.cost.backbone_nets import Net, NetCount, build, count_net
from dgbench.cost.backbone_tables import TABLES, Printed, PrintedTable
from dgbench.cost.profile import DTYPES, settled
from dgbench.cost.timing import Call, Hardware, Times, hardware, samples
from dgbench.engine.device import peak_gib
from dgbench.environment import code_commit, describe_environment
from dgbench.errors import DgbenchError, unknown
from dgbench.progress import Progress
from mfuser import ops


@dataclass(frozen=True, slots=True)
class Measured:
    """Milliseconds of a forward pass of one image, and the peak of a GPU's memory in GiB, weights included."""

    ms: Times
    gib: float | None


@dataclass(frozen=True, slots=True)
class BackboneRow:
    """One row: what is printed, our count, and what was measured of the network and of its trunk alone."""

    printed: Printed
    count: NetCount
    whole: Measured | None = None
    trunk: Measured | None = None
    problem: str = ""  # why it was not measured

    @property
    def off(self) -> float | None:
        """By how many % our multiply-accumulates differ from the printed ones."""
        if self.printed.operations is None:
            return None
        return 100 * (self.count.operations / 1e9 / self.printed.operations - 1)


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """A trunk alone on a square image."""

    side: int
    operations: int
    ms: Times | None = None


@dataclass(frozen=True, slots=True)
class SweepLine:
    """A trunk alone over image sizes."""

    trunk: str
    points: tuple[SweepPoint, ...]

    @property
    def growth(self) -> float:
        """Cost of a pixel of the largest image by that of the smallest: 1 for a trunk that is linear in tokens."""
        first, last = self.points[0], self.points[-1]
        return last.operations / first.operations * (first.side / last.side) ** 2


@dataclass(frozen=True, slots=True)
class BackboneTable:
    """What `dgbench profile --table` shows."""

    table: PrintedTable
    rows: tuple[BackboneRow, ...]
    calibration: NetCount
    sweep: tuple[SweepLine, ...]
    dtype: str
    hardware: Hardware | None
    unmeasured: str  # why nothing was timed
    backends: dict[str, str]
    counted_with: str  # the packages that counts were made with where other ones are here
    created: str
    environment: dict[str, str]
    commit: str | None
    dirty: bool | None


def backbone_table(
    name: str,
    progress: Progress,
    *,
    anew: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    timed: bool = True,
    passes: int = 1,
    sweep: tuple[SweepLine, ...] | None = None,
) -> BackboneTable:
    """Count the rows of a published table, and time them on a device.

    Args:
        name: one of TABLES.    anew: count again instead of looking counts up.
        dtype, device, timed, passes: as those of `profile`.    sweep: of another table, to be shown instead of being measured.

    Raises: DgbenchError for unknown names; CountError for a network that cannot be counted.
    """
    if name not in TABLES:
        raise DgbenchError(*unknown("table", name, TABLES))
    on, precision, unmeasured = settled("mac", dtype, device, timed=timed)
    table, counts = TABLES[name], _Counts(progress, anew=anew)
    nets = [table_net(name, row.trunk) for row in table.rows]
    calibration, *_ = table.calibration
    swept = {trunk: [Net("", trunk, (side, side)) for side in SWEEP] for trunk in SWEPT if sweep is None}
    squares = [net for line in swept.values() for net in line]
    progress.start("counting", len(nets) + 1 + len(squares), "networks")
    try:
        found = {net: counts(net) for net in (*nets, table_net(name, calibration), *squares)}
    finally:
        progress.stop()
    gpu, ran = (hardware(on) if on is not None else None), ops.tally()
    taken: dict[Net, Taken] = {net: Taken() for net in (*nets, *squares)}
    if on is not None and gpu is not None:
        passes = passes if on.type == "cuda" else 1
        timed_nets = [*nets, *(squares if on.type == "cuda" else ())]  # a processor would take minutes for the largest squares
        progress.start(f"timing on {gpu.name}", passes * len(timed_nets), "networks")
        try:
            for _ in range(passes):
                for net in timed_nets:
                    taken[net].visit(net, on, DTYPES[precision])
                    progress.advance()
        finally:
            progress.stop()
    rows = tuple(
        BackboneRow(printed, found[net], taken[net].measured("net"), taken[net].measured("trunk"), taken[net].problem)
        for printed, net in zip(table.rows, nets, strict=True)
    )
    lines = sweep or tuple(
        SweepLine(trunk, tuple(SweepPoint(n.size[0], found[n].operations, taken[n].times("net")) for n in line))
        for trunk, line in swept.items()
    )
    commit, dirty = code_commit()
    return BackboneTable(
        table,
        rows,
        found[table_net(name, calibration)],
        lines,
        precision,
        gpu,
        unmeasured,
        ops.ran_since(ran),
        "" if anew else made_with(),
        results.now_iso(),
        describe_environment(gpu.name if gpu else "none", torch.get_num_threads()),
        commit,
        dirty,
    )


class _Counts:
    """Counts of networks, looked up or made."""

    def __init__(self, progress: Progress, *, anew: bool) -> None:
        self.progress, self.anew = progress, anew

    def __call__(self, net: Net) -> NetCount:
        found = None if self.anew else known(net)
        if found is None:
            found = count_net(net)
            size = f"{net.size[0]}x{net.size[1]}"
            self.progress.note(
                f"counted {net.trunk} at {size}: {found.parameters / 1e6:,.2f} M parameters, {found.operations / 1e9:,.2f} G"
            )
        self.progress.advance()
        return found


@dataclass
class Taken:
    """Measurements of one network over several passes."""

    ms: dict[str, list[float]] = field(default_factory=dict)
    gib: dict[str, float] = field(default_factory=dict)
    problem: str = ""

    def times(self, what: str) -> Times | None:
        """Sum up one call's passes."""
        return Times.of(self.ms[what]) if self.ms.get(what) else None

    def measured(self, what: str) -> Measured | None:
        """Sum up one call's times and memory."""
        times = self.times(what)
        return None if times is None else Measured(times, self.gib.get(what))

    def visit(self, net: Net, device: torch.device, dtype: torch.dtype) -> None:
        """Build the network, and measure it and its trunk once."""
        gpu = device.type == "cuda"
        model: nn.Module | None = None
        calls: dict[str, Call] = {}
        try:
            with torch.device(device):
                model = build(net)
                image = torch.rand(1, 3, *net.size)
            model = model.to(device)  # what was made on the CPU in spite of that
            calls = {"net": _call(model, image, dtype)}
            if net.table:
                calls["trunk"] = _call(model.get_submodule("trunk"), image, dtype)
            for name, call in calls.items():
                if gpu:
                    torch.cuda.reset_peak_memory_stats(device)
                self.ms[name] = self.ms.get(name, []) + samples({"": call}, device, at_most=0.25, flush=False)[""]
                if gpu:
                    self.gib[name] = peak_gib(device)
        except torch.OutOfMemoryError as error:
            self.problem = str(error).splitlines()[0]
        finally:
            model = None
            calls.clear()
            if gpu:
                torch.cuda.empty_cache()


def _call(model: nn.Module, image: torch.Tensor, dtype: torch.dtype) -> Call:
    def call() -> object:
        with torch.no_grad(), torch.autocast(image.device.type, dtype, enabled=dtype != torch.float32):
            return model(image)

    return call
