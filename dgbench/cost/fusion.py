"""Cost of the fusion layers: parameters, operations, time and memory, over token counts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from dgbench import results
from dgbench.cost.conventions import CONVENTIONS, Cost
from dgbench.cost.profile import DTYPES, SIZE, settled
from dgbench.cost.timing import Call, Hardware, Times, hardware, samples
from dgbench.environment import code_commit, describe_environment
from dgbench.errors import RecipeError
from dgbench.progress import Progress
from dgbench.report.ablation import Accuracy, ablation, published
from dgbench.results import Record
from mfuser import ops
from mfuser.fusion import FUSERS, Fuser, Site
from mfuser.towers.meta import unfilled
from mfuser.towers.table import tower
from mfuser.towers.vit import VisionEncoder

SWEEP = ((512, 512), (768, 768), (1024, 1024), (1536, 1536), (2048, 2048))  # (H, W) of images
_BATCH = 2  # images a GPU trains on at a time in the paper's recipes


@dataclass(frozen=True, slots=True)
class FusionRow:
    """One fuser."""

    fuser: str
    parameters: int
    cost: Cost  # of an image
    total: float  # by the profile's convention, in units of 1e9
    gflop: float  # of an image, the scan included
    forward: Times | None = None
    both: Times | None = None  # with the backward
    gib: float | None = None  # that forward and backward need at their peak, beyond inputs and weights
    accuracy: Accuracy | None = None  # of one's own runs
    published: Mapping[str, float] | None = None  # mIoU in 0..1 by target, and `average` as it is printed


@dataclass(frozen=True, slots=True)
class FusionPoint:
    """All fusers on images of one size."""

    size: tuple[int, int]
    tokens: tuple[int, int]  # of the foundation and the vision-language tower
    rows: tuple[FusionRow, ...]


@dataclass(frozen=True, slots=True)
class FusionProfile:
    """What `dgbench profile --fusion` shows: all fusers at one size, the same over sizes."""

    vfm: str
    vlm: str
    dim: int
    size: tuple[int, int]
    tokens: tuple[int, int]
    rows: tuple[FusionRow, ...]
    sweep: tuple[FusionPoint, ...]
    convention: str
    unit: str
    batch: int
    dtype: str
    hardware: Hardware | None
    unmeasured: str  # why nothing was timed
    backends: dict[str, str]
    scored: str  # a description of `accuracy`
    left_out: tuple[str, ...]  # towers of own runs with another width
    cite: str  # where `published` is from
    created: str
    environment: dict[str, str]
    commit: str | None
    dirty: bool | None


def profile_fusion(
    progress: Progress,
    *,
    vfm: str | None = None,
    vlm: str | None = None,
    size: tuple[int, int] | None = None,
    sweep: Sequence[tuple[int, int]] = SWEEP,
    convention: str = "mac",
    batch: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    timed: bool = True,
    records: Iterable[Record] = (),
    passes: int = 3,
) -> FusionProfile:
    """Count and time one layer of every fuser between two towers.

    Args:
        vfm, vlm: the towers, by default dinov2_l and eva02.    size: (H, W) of the images, by default 512 x 512.
        sweep: further sizes.    convention: one of CONVENTIONS.    batch: images at a time, by default two.
        dtype, device, timed, passes: as those of `profile`.
        records: of own runs with each fuser; those count whose towers are as wide.

    Raises: DgbenchError for unknown names.
    """
    on, precision, unmeasured = settled(convention, dtype, device, timed=timed)
    size, batch = size or SIZE, batch or _BATCH
    bench = _Bench(_site(vfm or "dinov2_l", vlm or "eva02"), convention, on, DTYPES[precision], batch)
    own = ablation(records, lambda vfm, vlm: _widths(vfm, vlm) == {bench.dim})
    paper = published()
    printed = paper.scores if paper.width == bench.dim else {}
    gpu, ran = (hardware(on) if on is not None else None), ops.tally()
    sizes = dict.fromkeys((size, *sweep))
    passes = 0 if on is None else passes if on.type == "cuda" else 1
    progress.start("profiling fusion layers", len(sizes) * (1 + passes), "visits")
    taken: dict[tuple[int, int], _Taken] = {each: _Taken() for each in sizes}
    points = {}
    try:
        for _ in range(passes):
            for each in sizes:
                bench.visit(each, taken[each])
                progress.advance()
        for each in sizes:
            points[each] = bench.point(each, taken[each], own.accuracy, printed)
            progress.advance()
    finally:
        progress.stop()
    main, (commit, dirty) = points[size], code_commit()
    return FusionProfile(
        vfm or "dinov2_l",
        vlm or "eva02",
        bench.dim,
        size,
        main.tokens,
        main.rows,
        tuple(points[each] for each in sorted(points)),
        convention,
        CONVENTIONS[convention].unit,
        batch,
        precision,
        gpu,
        unmeasured,
        ops.ran_since(ran),
        own.described,
        own.left_out,
        paper.cite if printed else "",
        results.now_iso(),
        describe_environment(gpu.name if gpu else "none", torch.get_num_threads()),
        commit,
        dirty,
    )


def _site(vfm: str, vlm: str) -> Callable[[tuple[int, int]], Site]:
    """Return the towers around a fuser, for images of any size."""
    try:
        patch = tower(vlm).patch
        with unfilled():
            first, second = (VisionEncoder(name, SIZE, patch=patch) for name in (vfm, vlm))
    except ValueError as error:
        raise RecipeError(str(error), "choose others by --vfm and --vlm") from error
    if first.dim != second.dim:
        raise RecipeError(f"`{vfm}` is {first.dim} wide and `{vlm}` {second.dim}; they must be equal", "choose others")
    dim, prefixes = first.dim, (first.prefix, second.prefix)
    return lambda size: Site(dim, (size[0] // patch, size[1] // patch), prefixes)


def _widths(*towers: str) -> set[int]:
    """Return the widths of towers; none for an unknown one."""
    return {width for name in towers for width in _width(name)}


@functools.cache
def _width(name: str) -> tuple[int, ...]:
    try:
        with unfilled():
            return (VisionEncoder(name, SIZE).dim,)
    except ValueError:
        return ()


@dataclass
class _Taken:
    """Measurements of each fuser over several passes: ms of forward, ms of forward and backward, and peak GiB."""

    forward: dict[str, list[float]] = field(default_factory=dict)
    both: dict[str, list[float]] = field(default_factory=dict)
    gib: dict[str, float] = field(default_factory=dict)


class _Bench:
    """All fusers between the same towers, counted and timed at any size."""

    def __init__(
        self,
        site: Callable[[tuple[int, int]], Site],
        convention: str,
        device: torch.device | None,
        dtype: torch.dtype,
        batch: int,
    ) -> None:
        self.site, self.rule, self.device, self.dtype, self.batch = site, CONVENTIONS[convention], device, dtype, batch
        self.dim = site(SIZE).dim

    def point(
        self, size: tuple[int, int], taken: _Taken, accuracy: Mapping[str, Accuracy], printed: Mapping[str, Mapping[str, float]]
    ) -> FusionPoint:
        """Count and time every fuser on images of this size."""
        site = self.site(size)
        tokens, rows = self._tokens(size, site), []
        for name in FUSERS:
            from dgbench.cost.count import count

            # the torch backend, since kernels do not take tensors without data; the computation is the same
            fuser = FUSERS[name](replace(site, backend="torch")).to("meta")
            cost = count(fuser, *(torch.empty(1, length, self.dim, device="meta") for length in tokens)).total
            parameters = sum(parameter.numel() for parameter in fuser.parameters())
            total, gflop = (rule.total(cost) / 1e9 for rule in (self.rule, CONVENTIONS["flop"]))
            forward, both = (Times.of(ms[name]) if name in ms else None for ms in (taken.forward, taken.both))
            gib, own, paper = taken.gib.get(name), accuracy.get(name), printed.get(name)
            rows.append(FusionRow(name, parameters, cost, total, gflop, forward, both, gib, own, paper))
        return FusionPoint(size, tokens, tuple(rows))

    def _tokens(self, size: tuple[int, int], site: Site) -> tuple[int, int]:
        patches = site.grid[0] * site.grid[1]
        if not patches:
            raise RecipeError(f"images of {size[0]}x{size[1]} hold no patch", "choose a larger --size")
        return site.prefixes[0] + patches, site.prefixes[1] + patches

    def visit(self, size: tuple[int, int], taken: _Taken) -> None:
        """Build every fuser for images of this size, and measure all in turn."""
        assert self.device is not None
        site = self.site(size)
        fusers = {name: make(site).to(self.device).train() for name, make in FUSERS.items()}
        lengths = self._tokens(size, site)
        given = [torch.randn(self.batch, length, self.dim, device=self.device, requires_grad=True) for length in lengths]
        both: dict[str, Call] = {name: self._both(fuser, given) for name, fuser in fusers.items()}
        peaks = {name: self._peak(call) for name, call in both.items()}
        both = {name: call for name, call in both.items() if peaks[name] is not None}
        forward: dict[str, Call] = {name: self._forward(fusers[name], given) for name in both}
        for calls, pool in ((forward, taken.forward), (both, taken.both)):
            for name, ms in samples(calls, self.device, at_most=0.25).items():
                pool[name] = pool.get(name, []) + ms
        if self.device.type == "cuda":
            taken.gib |= {name: peak for name, peak in peaks.items() if peak is not None}

    def _forward(self, fuser: Fuser, given: Sequence[Tensor]) -> Call:
        def call() -> None:
            with torch.no_grad(), self._autocast():
                fuser(*given)

        return call

    def _both(self, fuser: Fuser, given: Sequence[Tensor]) -> Call:
        leaves: list[Tensor | nn.Parameter] = [*given, *fuser.parameters()]

        def call() -> None:
            with self._autocast():
                out = fuser(*given)
            torch.autograd.grad(out, leaves, [torch.ones_like(each) for each in out])

        return call

    def _autocast(self) -> torch.autocast:
        kind = self.device.type if self.device else "cpu"
        return torch.autocast(kind, self.dtype, enabled=self.dtype != torch.float32)

    def _peak(self, call: Call) -> float | None:
        """Return the GiB in addition to those in use; None if it does not fit."""
        if self.device is None or self.device.type != "cuda":
            return 0.0
        call()  # allocates buffers that stay
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        try:
            call()
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return None
        return float(torch.cuda.max_memory_allocated(self.device) - before) / 2**30
