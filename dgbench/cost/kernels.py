"""The operators' backends on this machine: which run and why not, how their library is built, how long a call takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dgbench.cost.cases import DTYPES, Case, block_case, deform_case, scan_case
from dgbench.cost.timing import median_ms, nvidia_smi
from dgbench.engine.device import device_name, pick_device
from dgbench.errors import DgbenchError, unknown
from dgbench.progress import Progress
from mfuser.ops import BackendError, compiled, dispatch

_EXPS_PER_CLOCK = 16  # of a multiprocessor's special function units: CUDA programming guide, arithmetic throughput, 8.0 to 10.0


# ---- what there is


@dataclass(frozen=True, slots=True)
class BackendState:
    """A backend of an operator. `reason` says why it does not run fp32 tensors on this machine, None when it does."""

    op: str
    backend: str
    reason: str | None
    auto: tuple[str, ...]  # the dtypes for which "auto" takes it
    named_only: bool


@dataclass(frozen=True, slots=True)
class LibraryState:
    """The compiled kernels. `reason` says why they do not run here, None when they do."""

    reason: str | None
    path: str | None  # of the library in use
    built: tuple[str, ...]  # all libraries of these sources
    folder: str
    sources_hash: str
    sources: tuple[str, ...]
    architecture: str | None  # of this machine's GPU
    nvcc: str | None


@dataclass(frozen=True, slots=True)
class KernelList:
    """What `dgbench kernels list` shows; backends in the order in which "auto" tries them."""

    device: str
    backends: tuple[BackendState, ...]
    library: LibraryState


def listing() -> KernelList:
    """Check every backend of every operator, with small tensors on the GPU, if there is one, else on the CPU."""
    device = pick_device(None)
    states = []
    for op, rows in dispatch.TABLE.items():
        # an operator without a case is checked without tensors
        probes = {name: _CASES[op](dtype, device, **_TINY[op]).probe if op in _CASES else () for name, dtype in DTYPES.items()}
        picks = {name: _pick(op, probe) for name, probe in probes.items()}
        for row in rows:
            auto = tuple(name for name, pick in picks.items() if pick == row.name)
            states.append(BackendState(op, row.name, dispatch.unusable(row, *probes["fp32"]), auto, not row.auto))
    return KernelList(device_name(device), tuple(states), library_state())


def candidates(op: str, device: torch.device) -> list[dispatch.Backend]:
    """Return the backends worth timing on a device, whether "auto" takes them or not.

    Left out are the reference's loop and, on a CPU, kernels for a GPU, which run there interpreted or emulated at best.
    """
    return [row for row in dispatch.TABLE[op] if row.name != "reference" and (device.type != "cpu" or not row.gpu)]


def _pick(op: str, probe: Sequence[Tensor | None]) -> str | None:
    try:
        return dispatch.resolve(op, "auto", *probe).name
    except BackendError:
        return None


def library_state() -> LibraryState:
    """Check sources, compiler, GPU and library; changes nothing."""
    found = compiled.status()
    return LibraryState(
        reason=found.reason,
        path=None if found.reason else str(compiled.library().path),
        built=tuple(map(str, found.built)),
        folder="" if found.folder is None else str(found.folder),
        sources_hash="" if found.folder is None else found.folder.name,
        sources=tuple(path.name for path in found.sources),
        architecture=found.architecture,
        nvcc=found.nvcc,
    )


# ---- building


@dataclass(frozen=True, slots=True)
class Built:
    """The library of all kernels; `new` is False when it was there already."""

    path: str
    architectures: tuple[str, ...]
    bytes: int
    seconds: float
    new: bool


def build(architectures: Sequence[str], progress: Progress) -> Built:
    """Compile the kernels ahead of time, by default for the GPUs of this machine.

    Raises:
        DgbenchError: no compiler, no GPU to build for, or the compiler failed; with its last lines.
        ValueError: for a malformed architecture.
    """
    new = False

    def tell(line: str) -> None:
        nonlocal new
        if not new:
            progress.start(line, len(compiled.status().sources), "files")
            new = True
        elif line.startswith("compiled "):
            progress.advance()
            progress.note(line)
        else:
            progress.note(line)

    begun = time.perf_counter()
    try:
        path = compiled.build(architectures or None, on_line=tell)
    except compiled.BuildError as error:
        raise DgbenchError(str(error), _build_hint(str(error))) from error
    finally:
        progress.stop()
    names = tuple(path.name.partition("-cuda")[0].split("+"))
    return Built(str(path), names, path.stat().st_size, time.perf_counter() - begun, new)


def _build_hint(problem: str) -> str | None:
    if "nvcc is missing" in problem:
        return (
            "CUDA's compiler comes with the toolkit (https://developer.nvidia.com/cuda-downloads) or, in an environment "
            "of conda's, with `conda install -c nvidia cuda-nvcc`; without it Triton's kernels are used, or torch"
        )
    if "name the architectures" in problem:
        return f"{compiled.BUILD_COMMAND} --arch sm_90"
    return None


# ---- timing

_CASES: dict[str, Callable[..., Case]] = {"selective_scan": scan_case, "ms_deform_attn": deform_case, "mvfuser": block_case}
_TINY: dict[str, dict[str, object]] = {
    "selective_scan": {"batch": 1, "length": 4, "dim": 16, "state": 16},
    "ms_deform_attn": {"batch": 1, "sides": (1, 2), "heads": 2, "dim": 16, "points": 4},
    "mvfuser": {"batch": 1, "length": 4, "width": 32},
}
_ON_CPU: dict[str, dict[str, object]] = {
    "selective_scan": {"batch": 1, "length": 577, "dim": 256, "state": 16},
    "ms_deform_attn": {"batch": 1, "sides": (8, 16, 32), "heads": 8, "dim": 32, "points": 4},
    "mvfuser": {"batch": 1, "length": 577, "width": 512},
}
_ON_GPU: dict[str, dict[str, object]] = {
    "selective_scan": {"batch": 2, "length": 2594, "dim": 512, "state": 16},
    "ms_deform_attn": {"batch": 2, "sides": (18, 36, 72), "heads": 8, "dim": 32, "points": 4},
    "mvfuser": {"batch": 2, "length": 2594, "width": 1024},
}


@dataclass(frozen=True, slots=True)
class Machine:
    """Limits of a machine: bandwidth measured by a large copy; on a GPU also the units that compute exponentials.

    Attributes:
        gb_per_s: bytes read plus bytes written.    multiprocessors, ghz: 0 on a CPU; the clock is the highest allowed.
    """

    name: str
    gb_per_s: float
    multiprocessors: int = 0
    ghz: float = 0.0

    def floor_ms(self, case: Case, *, backward: bool) -> tuple[float, str]:
        """Return the lower bound of any implementation's time in ms, and what sets it. The backward includes its forward.

        The backward needs every exponential once more, since (B, L, D, N) of them are not stored.
        """
        memory = sum(case.bytes[: 1 + backward]) / self.gb_per_s / 1e6
        rate = self.multiprocessors * _EXPS_PER_CLOCK * self.ghz * 1e6
        exps = case.exps * (1 + backward) / rate if rate else 0.0
        return max((memory, "memory"), (exps, "exp"))


def machine(device: torch.device) -> Machine:
    """Measure a device."""
    elements = 2**28 if device.type == "cuda" else 2**24
    source, target = (torch.ones(elements, device=device) for _ in range(2))
    seconds = median_ms(lambda: target.copy_(source), device, at_most=0.2, flush=False) / 1e3
    gb_per_s = 2 * 4 * elements / seconds / 1e9
    if device.type == "cpu":
        return Machine("cpu", gb_per_s)
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return Machine(device_name(device), gb_per_s, count, float(nvidia_smi("clocks.max.sm", device) or 0) / 1e3)


@dataclass(frozen=True, slots=True)
class Timing:
    """Median milliseconds of a backend, and its speed-up over the base."""

    backend: str
    forward_ms: float
    both_ms: float
    forward_speed: float
    both_speed: float


@dataclass(frozen=True, slots=True)
class TimedCase:
    """All backends on one case; `refused` are those that do not run it, with their reasons."""

    op: str
    shape: str
    dtype: str
    timings: tuple[Timing, ...]
    floor_ms: tuple[float, float]  # forward, forward and backward
    floor_by: tuple[str, str]
    refused: dict[str, str]


@dataclass(frozen=True, slots=True)
class Bench:
    """What `dgbench kernels bench` shows."""

    machine: Machine
    cases: tuple[TimedCase, ...]


def bench(
    ops: Sequence[str],
    backends: Sequence[str],
    progress: Progress,
    *,
    shape: tuple[int, int, int, int] | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> Bench:
    """Time backends against each other, each case for about a second per backend.

    Args:
        ops: by default all.    backends: by default those that run; the first is what the others are compared with.
        shape: (B, L, D, N) of the scan, which is then all that is timed.    dtype: one of DTYPES.

    Raises:
        DgbenchError: for an unknown name.
        BackendError: when a named backend runs none of the operators; with the reasons.
    """
    for op in ops:
        if op not in _CASES or op not in dispatch.TABLE:
            raise DgbenchError(*unknown("operator", op, _CASES.keys() & dispatch.TABLE.keys()))
    if shape is not None:
        ops = ["selective_scan"]
    chosen = list(ops) or [op for op in dispatch.TABLE if op in _CASES]
    known = {row.name for op in chosen for row in dispatch.TABLE[op]}
    for name in backends:
        if name not in known:
            raise DgbenchError(*unknown("backend", name, known))
    on = pick_device(device)
    precision = dtype or ("bf16" if on.type == "cuda" else "fp32")
    if precision not in DTYPES:
        raise DgbenchError(*unknown("dtype", precision, DTYPES))
    sizes = _ON_GPU if on.type == "cuda" else _ON_CPU
    if shape is not None:
        sizes = {"selective_scan": dict(zip(("batch", "length", "dim", "state"), shape, strict=True))}
    cases = [_CASES[op](DTYPES[precision], on, **sizes[op]) for op in chosen]
    plans = [_plan(case, backends) for case in cases]
    for name in backends:
        if all(name in refused for _, refused in plans):
            reasons = {refused[name] for _, refused in plans}
            raise BackendError(f"{name}: {'; '.join(sorted(reasons))}")
    limits = machine(on)
    timed = []
    progress.start(f"timing on {limits.name}", sum(len(names) for names, _ in plans), "backends")
    try:
        for case, (names, refused) in zip(cases, plans, strict=True):
            timed.append(_timed(case, precision, names, refused, limits, on, progress))
    finally:
        progress.stop()
    return Bench(limits, tuple(timed))


def _plan(case: Case, named: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the backends to be timed, in the order asked for, and the reasons why others are not."""
    rows = {row.name: row for row in dispatch.TABLE[case.op]}
    wanted = list(named) or [row.name for row in candidates(case.op, case.dout.device)]
    reasons = {
        name: dispatch.unusable(rows[name], *case.probe) if name in rows else f"{case.op} has no such backend" for name in wanted
    }
    return [n for n, why in reasons.items() if why is None], {n: why for n, why in reasons.items() if why is not None}


def _timed(
    case: Case,
    dtype: str,
    names: Sequence[str],
    refused: dict[str, str],
    limits: Machine,
    device: torch.device,
    progress: Progress,
) -> TimedCase:
    times: dict[str, tuple[float, float]] = {}
    for name in names:
        times[name] = (
            median_ms(partial(case.forward, name), device),
            median_ms(partial(case.both, name), device),
        )
        progress.advance()
    base = next(iter(times.values()), (0.0, 0.0))
    timings = tuple(Timing(n, *ms, *(b / t for b, t in zip(base, ms, strict=True))) for n, ms in times.items())
    floors, causes = zip(*(limits.floor_ms(case, backward=backward) for backward in (False, True)), strict=True)
    return TimedCase(case.op, case.shape, dtype, timings, floors, causes, refused)
