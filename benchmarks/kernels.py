"""Time every backend of the operators and third-party kernels, on one device in one run; see `--help`.

The peers are used where they can be imported and left out where not:
    selective_scan_cuda              the compiled scan of mamba-ssm (Gu & Dao 2023), called directly
    mamba_ssm                        the same through its autograd function, and its Triton norm in the block
    MultiScaleDeformableAttention    the CUDA operator of Deformable-DETR (Zhu et al. 2021), fp32 and fp64 only
Each peer gets its own layout, made beforehand: the scan's is (B, D, L).

Two times are taken of each call. `eager` is what a caller waits for: CUDA events around one call, the cache emptied
before it. `graph` leaves Python out: a CUDA graph of calls on input sets that together exceed the cache, by their number.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dgbench.cost.cases import DTYPES, Case, block_case, deform_case, scan_case
from dgbench.cost.kernels import candidates, machine
from dgbench.cost.timing import median_ms, nvidia_smi
from dgbench.engine.device import device_name, pick_device
from dgbench.environment import code_commit
from mfuser.fusion import MVFuser
from mfuser.ops import compiled, dispatch

HERE = Path(__file__).parent
PARTS = {"scan": "selective_scan", "deform": "ms_deform_attn", "block": "mvfuser"}
FOREIGN = ("mamba_ssm",)  # third-party backends, for which our guarantees do not hold
Result = tuple[Tensor, ...]  # what comes out, then the gradient of every leaf


# ---- implementations


@dataclass(frozen=True)
class Bound:
    """A contender with the inputs of one case in its own layout; `ours` brings its result back to the case's."""

    forward: Callable[[], object]
    both: Callable[[], Result]
    ours: Callable[[Result], Result] = lambda result: result


@dataclass(frozen=True)
class Contender:
    """An implementation: `bind` prepares it for a case, or raises with the reason why it cannot run."""

    name: str
    bind: Callable[[Case], Bound]
    own: bool = True
    graph: bool = True  # whether its calls can be captured
    peer: bool = False  # not a backend of this package


def own(op: str, device: torch.device) -> list[Contender]:
    """Return the backends of an operator, including those that "auto" does not take."""

    def bind(row: dispatch.Backend, case: Case) -> Bound:
        if (reason := dispatch.unusable(row, *case.probe)) is not None:
            raise ImportError(reason)
        return Bound(partial(case.forward, row.name), partial(case.both, row.name))

    return [
        # the torch backends copy small tables from the host, which no graph can hold
        Contender(row.name, partial(bind, row), own=row.name not in FOREIGN, graph=row.name != "torch")
        for row in candidates(op, device)
    ]


def mamba_raw(case: Case) -> Bound:
    """Bind mamba-ssm's compiled scan, without autograd."""
    scan = _imported("selective_scan_cuda")
    (u, delta, B, C), (A, D, bias) = _channels_first(case), (case.leaves[i].detach() for i in (2, 5, 6))
    B, C, dout = B[:, None], C[:, None], case.dout.mT.contiguous()  # one group

    def forward() -> list[Tensor]:
        found: list[Tensor] = scan.fwd(u, delta, A, B, C, D, None, bias, True)
        return found

    def both() -> Result:
        y, states, *_ = forward()
        return y, *scan.bwd(u, delta, A, B, C, D, None, bias, dout, states, None, None, True, False)

    def ours(result: Result) -> Result:
        y, du, ddelta, dA, dB, dC, dD, dbias, *_ = result
        return y.mT, du.mT, ddelta.mT, dA, dB.squeeze(1).mT, dC.squeeze(1).mT, dD, dbias

    return Bound(forward, both, ours)


def mamba_autograd(case: Case) -> Bound:
    """Bind the same as its users call it."""
    _imported("selective_scan_cuda")
    scan = _imported("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    u, delta, B, C = (tensor.requires_grad_() for tensor in _channels_first(case))
    A, D, bias = (case.leaves[i] for i in (2, 5, 6))
    dout = case.dout.mT.contiguous()

    def call() -> Tensor:
        y: Tensor = scan(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True)
        return y

    def both() -> Result:
        y = call()
        return y, *torch.autograd.grad(y, (u, delta, A, B, C, D, bias), dout)

    def ours(result: Result) -> Result:
        y, du, ddelta, dA, dB, dC, dD, dbias = result
        return y.mT, du.mT, ddelta.mT, dA, dB.mT, dC.mT, dD, dbias

    return Bound(torch.no_grad()(call), both, ours)


def _channels_first(case: Case) -> tuple[Tensor, ...]:
    return tuple(case.leaves[i].detach().mT.contiguous() for i in (0, 1, 3, 4))


def deformable_detr(case: Case) -> Bound:
    """Bind Deformable-DETR's operator, without autograd; widening bf16 values and narrowing results is timed."""
    attend = _imported("MultiScaleDeformableAttention")
    value, locations, weights = (leaf.detach() for leaf in case.leaves)
    sides: tuple[int, ...] = case.remake.keywords["sides"]  # type: ignore[attr-defined]
    shapes = torch.tensor([(side, side) for side in sides], device=value.device)
    starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
    wide = locations.dtype
    step = 64  # images at a time; the paper's setting

    def forward() -> Tensor:
        out: Tensor = attend.ms_deform_attn_forward(value.to(wide), shapes, starts, locations, weights, step)
        return out.to(value.dtype)

    def both() -> Result:
        widened, dout = value.to(wide), case.dout.to(wide)
        out = attend.ms_deform_attn_forward(widened, shapes, starts, locations, weights, step)
        dvalue, *rest = attend.ms_deform_attn_backward(widened, shapes, starts, locations, weights, dout, step)
        return out.to(value.dtype), dvalue.to(value.dtype), *rest

    return Bound(forward, both)


def composition(scan: Callable[..., Tensor] | None, norm: Callable[..., Tensor] | None, case: Case) -> Bound:
    """Bind MVFuser's block in plain modules around another scan, channels before tokens from the convolutions to the scan.

    Args:
        scan: mamba-ssm's interface; None imports it.    norm: (y, z, weight) gated; None takes its Triton norm.
    """
    if scan is None:
        _imported("selective_scan_cuda")
        scan = _imported("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    if norm is None:
        fused = _imported("mamba_ssm.ops.triton.layernorm_gated").rmsnorm_fn
        norm = lambda y, z, weight: fused(y, weight, None, z=z, eps=1e-5)  # noqa: E731
    joint, *parameters = case.leaves
    width = joint.shape[2]
    p = dict(zip(dict(MVFuser(width).named_parameters()), parameters, strict=True))
    state, rank = p["A_log"].shape[1], p["dt_proj.weight"].shape[1]
    low = joint.dtype in (torch.bfloat16, torch.float16)

    def block() -> Tensor:
        x, z = F.linear(joint, p["in_proj.weight"]).mT.chunk(2, 1)  # (B, C/2, L) each
        x = F.silu(F.conv1d(x, p["conv1d_x.weight"], padding=1, groups=x.shape[1]))
        z = F.silu(F.conv1d(z, p["conv1d_z.weight"], padding=1, groups=z.shape[1]))
        steps, B, C = F.linear(x.mT, p["x_proj.weight"]).split([rank, state, state], -1)
        delta = F.linear(steps, p["dt_proj.weight"], p["dt_proj.bias"]).mT
        A, bias = -p["A_log"].float().exp(), p["dt_proj.bias"].float()
        y = scan(x, delta, A, B.mT.contiguous(), C.mT.contiguous(), p["D"].float(), delta_bias=bias, delta_softplus=True)
        gated = norm(y.mT.contiguous(), z.mT.contiguous(), p["norm.weight"])
        return F.linear(gated.to(joint.dtype), p["out_proj.weight"]) * p["scale"]

    def call() -> Tensor:
        with torch.autocast(joint.device.type, joint.dtype, enabled=low):
            return block()

    def both() -> Result:
        out = call()
        return out, *torch.autograd.grad(out, case.leaves, case.dout.to(out.dtype))

    return Bound(torch.no_grad()(call), both)


def plain_norm(y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """Return x / rms(x) * weight * silu(z), in fp32."""
    wide = y.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * weight * F.silu(z.float())


def plain_loop(pick: Callable[[Tensor], Sequence[Tensor] | Callable[[int], Tensor]], case: Case) -> Bound:
    """Bind the scan as a loop over time under autograd, like Mamba's own reference.

    All decays and inputs, (B, D, L, N), are computed before the loop.

    Args:
        pick: how a time step is taken from them.
    """
    u, delta, A, B, C, D, bias = case.leaves

    def call() -> Tensor:
        x, step = u.mT, F.softplus(delta + bias).mT  # (B, D, L)
        decay = torch.exp(step[..., None] * A[:, None])
        inflow = (step * x)[..., None] * B[:, None]
        decays, inflows, readouts = pick(decay), pick(inflow), pick(C[:, None])
        h, ys = x.new_zeros(len(x), *A.shape), []
        for t in range(x.shape[2]):
            h = _at(decays, t) * h + _at(inflows, t)
            ys.append((h * _at(readouts, t)).sum(-1))
        return torch.stack(ys, 1) + u * D

    def both() -> Result:
        out = call()
        return out, *torch.autograd.grad(out, case.leaves, case.dout)

    return Bound(torch.no_grad()(call), both)


def _at(steps: Sequence[Tensor] | Callable[[int], Tensor], t: int) -> Tensor:
    return steps(t) if callable(steps) else steps[t]


def indexed(tensor: Tensor) -> Callable[[int], Tensor]:
    """Return steps by indexing: the backward of each is a tensor of zeros as large as the whole."""
    return lambda t: tensor[:, :, t]


def unbound(tensor: Tensor) -> Sequence[Tensor]:
    """Return all steps at once: one backward for all."""
    return tensor.unbind(2)


def _imported(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"no peer: {error}") from error


SCAN_PEERS = [
    Contender("mamba-ssm, raw", mamba_raw, own=False, peer=True),
    Contender("mamba-ssm, autograd", mamba_autograd, own=False, peer=True),
]
DEFORM_PEERS = [Contender("Deformable-DETR", deformable_detr, own=False, peer=True)]
BLOCK_PEERS = [
    Contender("authors' composition over mamba-ssm", partial(composition, None, plain_norm), own=False, peer=True),
    Contender("the same, mamba-ssm's norm", partial(composition, None, None), own=False, peer=True),
]


# ---- what is timed


@dataclass(frozen=True)
class Plan:
    """A part's cases: `make(dtype, device, seed)` each, and the small one on which errors are taken."""

    cases: list[Callable[..., Case]]
    dtypes: list[str]
    small: Callable[..., Case]
    contenders: list[Contender]


def _scans(shapes: Sequence[tuple[int, int, int, int]]) -> list[Callable[..., Case]]:
    return [partial(scan_case, batch=b, dim=d, length=length, state=n) for b, d, length, n in shapes]


def plans(device: torch.device, *, quick: bool, tiny: bool) -> dict[str, Plan]:
    """Return what is timed on a device, by part."""
    maps = {"batch": 2, "sides": (18, 36, 72), "heads": 8, "dim": 32, "points": 4}
    shapes = [(2, 512, 2594, 16), (18, 512, 2594, 16), (1, 2048, 65536, 16)]
    shapes += [] if quick else [(b, 512, length, 16) for b in (1, 8) for length in (577, 2050, 8192)]
    blocks, dtypes = [(2, 2594, 1024), (18, 2594, 1024)], ["bf16", "fp32"]
    block_dtypes = ["bf16"]
    if device.type == "cpu":
        shapes, blocks, dtypes = [(2, 512, 2594, 16)], [(2, 2594, 1024)], ["fp32"]
        block_dtypes = ["fp32"]
    if tiny:
        shapes, blocks = [(1, 8, 5, 4)], [(1, 5, 32)]
        maps = {"batch": 2, "sides": (2, 3), "heads": 2, "dim": 4, "points": 2}
    few = {"batch": 2, "dim": 16, "length": 7, "state": 4} if tiny else {"batch": 2, "dim": 64, "length": 577, "state": 16}
    scan = Plan(_scans(shapes), dtypes, partial(scan_case, **few), [*own("selective_scan", device), *SCAN_PEERS])
    spreads = [partial(deform_case, **maps, spread=spread) for spread in ("near", "anywhere")]
    deform = Plan(
        spreads,
        dtypes,
        partial(deform_case, **{**maps, "sides": maps["sides"][:2]}),
        [*own("ms_deform_attn", device), *DEFORM_PEERS],
    )
    block = Plan(
        [partial(block_case, batch=b, length=length, width=c) for b, length, c in blocks],
        block_dtypes,
        partial(block_case, batch=2, length=7 if tiny else 577, width=32 if tiny else 256),
        [*own("mvfuser", device), *BLOCK_PEERS],
    )
    return {"scan": scan, "deform": deform, "block": block}


def loops(tiny: bool) -> list[tuple[Callable[..., Case], list[Contender]]]:
    """Return the plain loops on a CPU. Indexing costs the square of L, so its L is smaller; the backend is timed there, too."""
    torch_backend = [c for c in own("selective_scan", torch.device("cpu")) if c.name == "torch"]
    by_index = Contender("loop, indexed steps", partial(plain_loop, indexed), own=False, peer=True)
    by_unbind = Contender("loop, unbound steps", partial(plain_loop, unbound), own=False, peer=True)
    sizes = [(2, 8, 3, 4)] * 3 if tiny else [(2, 512, 128, 16), (2, 512, 256, 16), (2, 512, 2594, 16)]
    both, long = [*torch_backend, by_unbind, by_index], [*torch_backend, by_unbind]
    return list(zip(_scans(sizes), (both, both, long), strict=True))


# ---- measuring


@dataclass
class Row:
    """One contender on one case; milliseconds, None where it was not measured."""

    part: str
    shape: str
    dtype: str
    contender: str
    forward_ms: float | None = None
    both_ms: float | None = None
    forward_graph_ms: float | None = None
    both_graph_ms: float | None = None
    floor_ms: tuple[float, float] = (0.0, 0.0)
    floor_by: tuple[str, str] = ("", "")
    error: float | None = None  # of the result, relative to fp64's, on the small case
    gradient_error: float | None = None  # the largest
    note: str = ""
    peer: bool = False  # third-party: the first of a case is what the others are compared with


@dataclass
class Report:
    """All that a run found."""

    about: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    failed: bool = False  # one of ours broke


class Bench:
    """One device and how long each measurement may take."""

    def __init__(self, device: torch.device, seconds: float, tell: Callable[[str], None]) -> None:
        self.device, self.seconds, self.tell = device, seconds, tell
        self.cuda = device.type == "cuda"
        self.limits = machine(device)
        self.macs = {name: self._macs(dtype) for name, dtype in DTYPES.items() if name in ("fp32", "bf16")} if self.cuda else {}

    def _macs(self, dtype: torch.dtype) -> float:
        """Return the multiply-adds a second of a large matrix product."""
        side = 8192 if dtype == torch.bfloat16 else 4096
        a = torch.randn(side, side, device=self.device).to(dtype)
        return side**3 / (median_ms(lambda: a @ a, self.device, at_most=0.2) / 1e3)

    def clock_mhz(self) -> str:
        """Return the GPU's clock under load."""
        a = torch.randn(8192, 8192, device=self.device).bfloat16()
        for _ in range(300):
            a @ a
        read = nvidia_smi("clocks.sm", self.device)
        torch.cuda.synchronize(self.device)
        return read or "?"

    def part(self, name: str, plan: Plan, report: Report) -> None:
        """Time a part's contenders on all of its cases."""
        errors: dict[tuple[str, str], tuple[float, float]] = {}
        for dtype in plan.dtypes:
            small = plan.small(DTYPES[dtype], self.device)
            expected = small.precise().both("torch")
            for contender in plan.contenders:
                try:
                    bound = contender.bind(small)
                    found = bound.ours(bound.both())
                except (ImportError, ValueError, RuntimeError):
                    continue  # told below, where it is timed
                out, *grads = (relative(*pair) for pair in zip(found, expected, strict=True))
                errors[contender.name, dtype] = out, max(grads)
        for dtype in plan.dtypes:
            for make in plan.cases:
                for row in self.case(name, dtype, make, plan.contenders, report):
                    row.error, row.gradient_error = errors.get((row.contender, dtype), (None, None))

    def case(
        self, part: str, dtype: str, make: Callable[..., Case], contenders: Sequence[Contender], report: Report
    ) -> Iterator[Row]:
        """Time contenders on one case, and yield their rows."""
        cases = [make(DTYPES[dtype], self.device)]
        while self.cuda and len(cases) < max(2, min(8, -(-2 * self._cache() // cases[0].bytes[0]))):
            cases.append(make(DTYPES[dtype], self.device, seed=len(cases)))
        for contender in contenders:
            row = Row(part, cases[0].shape, dtype, contender.name, peer=contender.peer)
            floors = [self._floor(cases[0], dtype, backward=backward) for backward in (False, True)]
            row.floor_ms, row.floor_by = (floors[0][0], floors[1][0]), (floors[0][1], floors[1][1])
            begun = time.perf_counter()
            try:
                self._measure(contender, cases, row)
            except ImportError as error:
                row.note = str(error)
            except (ValueError, RuntimeError) as error:
                row.note = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                report.failed |= contender.own
            report.rows.append(row)
            self.tell(f"{part}, {row.shape}, {dtype}, {row.contender}: {time.perf_counter() - begun:.1f} s {row.note}")
            yield row
        if self.cuda:
            cases.clear()
            torch.cuda.empty_cache()

    def _cache(self) -> int:
        return int(torch.cuda.get_device_properties(self.device).L2_cache_size)

    def _floor(self, case: Case, dtype: str, *, backward: bool) -> tuple[float, str]:
        floor = self.limits.floor_ms(case, backward=backward)
        if not (rate := self.macs.get(dtype)):
            return floor
        # the backward has two products for each of the forward's
        return max(floor, (1e3 * case.products * (3 if backward else 1) / rate, "products"))

    def _measure(self, contender: Contender, cases: Sequence[Case], row: Row) -> None:
        first, *others = (contender.bind(case) for case in cases)
        row.forward_ms = median_ms(first.forward, self.device, at_most=self.seconds)
        row.both_ms = median_ms(first.both, self.device, at_most=self.seconds)
        if self.cuda and contender.graph:
            row.forward_graph_ms = self._graph_ms([first.forward, *(other.forward for other in others)])
            row.both_graph_ms = self._graph_ms([first.both, *(other.both for other in others)])

    def _graph_ms(self, calls: Sequence[Callable[[], object]]) -> float:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return median_ms(graph.replay, self.device, at_most=self.seconds, flush=False) / len(calls)


def relative(found: Tensor, expected: Tensor) -> float:
    """Return || found - expected || / || expected ||."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm()) / (float(expected.norm()) or 1.0)


# ---- checking


def checks(tiny: bool) -> Iterator[tuple[str, list[str], Callable[..., Case]]]:
    """Yield cases to compare with fp64: operator, dtypes, how to make it; `steep_case`s element by element."""
    low = ["fp32", "bf16"] if tiny else ["fp32", "bf16", "fp16"]
    for length in (1, 2, 65) if tiny else (1, 2, 63, 64, 65, 577, 1000, 2049, 2594):
        yield "selective_scan", low, partial(scan_case, batch=2, length=length, dim=33 if tiny else 96, state=16)
    for length in (65,) if tiny else (65, 577, 2049):
        for shift in (-40.0, 30.0):
            yield "selective_scan", low, partial(scan_case, batch=1, length=length, dim=40, state=16, shift=shift)
        yield "selective_scan", low, partial(scan_case, batch=2, length=length, dim=72, state=16, gated=True)
    for length, state in ((21, 16),) if tiny else ((21, 8), (21, 16), (300, 8), (300, 16), (300, 64), (2594, 16)):
        yield "selective_scan", low, partial(steep_case, batch=2, length=length, dim=3 if tiny else 96, state=state)
    for dim, state in ((3, 5),) if tiny else ((1, 1), (3, 5), (64, 8), (130, 32), (512, 16)):
        yield "selective_scan", low, partial(scan_case, batch=3, length=70 if tiny else 300, dim=dim, state=state)
    spreads = ("near", "anywhere", "outside")
    for sides, heads, dim, points in (
        [((3, 1), 2, 8, 2)] if tiny else [((1,), 1, 1, 1), ((3, 5), 4, 33, 3), ((8, 16, 32), 8, 32, 4), ((18, 36), 8, 64, 4)]
    ):
        for spread in spreads:
            sizes: dict[str, Any] = {"sides": sides, "heads": heads, "dim": dim, "points": points}
            yield "ms_deform_attn", low, partial(deform_case, batch=2, spread=spread, **sizes)
    for length in (1, 65) if tiny else (1, 2, 63, 65, 577, 2594):
        yield "mvfuser", low[:2], partial(block_case, batch=2, length=length, width=32 if tiny else 256)
    if not tiny:
        yield "mvfuser", low[:2], partial(block_case, batch=2, length=577, width=1024)


def steep_case(dtype: torch.dtype, device: torch.device, *, batch: int, length: int, dim: int, state: int, seed: int = 0) -> Case:
    """Return a gated scan whose state n decays by about exp(-32 (n + 1) / N) in a step, and whose other inputs are positive.

    Nothing cancels in a gradient, and each of its elements has digits to compare, however much smaller than the others it is.
    """
    case = scan_case(dtype, device, batch=batch, length=length, dim=dim, state=state, gated=True, seed=seed)
    u, delta, A, B, C, D, bias, z, initial = (leaf.detach() for leaf in case.leaves)
    u, B, C, D, z, initial, dout = (0.5 + torch.sigmoid(tensor) for tensor in (u, B, C, D, z, initial, case.dout))
    dout = dout.to(dtype).to(case.dout)  # as y's gradient is rounded, for fp64 to start from the same
    size = 32 / state
    # softplus of it is `size`, but for a tenth
    delta = math.log(math.expm1(size)) + torch.tanh(delta) * size / 10
    A = -torch.arange(1, state + 1, device=device).to(A) * (1 + torch.tanh(A) / 10)
    leaves = (u, delta.to(dtype), A, B, C, D, torch.zeros_like(bias), z, initial)
    return case.remake(tuple(leaf.requires_grad_() for leaf in leaves), dout)


def check(
    device: torch.device,
    *,
    tiny: bool,
    tell: Callable[[str], None],
    only: Sequence[str] = (),
    backends: Sequence[str] = (),
    compare: bool = True,
) -> bool:
    """Check that every backend has at most twice the torch backend's error against fp64, and is deterministic; print failures.

    Where states decay within a step, every element of every gradient is compared with fp64 itself, also for torch, since it
    is only a valid reference as far as it has been checked.

    Args:
        only: operators; none means all.    backends: the same.    compare: False asks for the same bits only.
    """
    counts: dict[tuple[str, str], list[float]] = {}  # compared, failed, largest ratio
    refused: dict[tuple[str, str], str] = {}
    for op, dtypes, make in checks(tiny):
        if only and op not in only:
            continue
        rows = [row for row in candidates(op, device) if row.name not in FOREIGN and (not backends or row.name in backends)]
        for dtype in dtypes:
            draws = [make(DTYPES[dtype], device, seed=seed) for seed in range(_draws(op, make) if compare else 1)]
            case = draws[0]
            expected = _pooled(draw.precise().both("torch") for draw in draws) if compare else ()
            usual = _pooled(draw.both("torch") for draw in draws) if compare else ()
            alone = getattr(make, "func", None) is steep_case
            for row in rows:
                if (reason := dispatch.unusable(row, *case.probe)) is not None:
                    refused[op, row.name] = reason
                    continue
                tallied = counts.setdefault((op, row.name), [0, 0, 0.0])
                problems = []
                try:
                    found, again = (_pooled(draw.both(row.name) for draw in draws) for _ in range(2))
                except (ValueError, RuntimeError) as error:
                    found = again = ()
                    problems.append(f"{type(error).__name__}: {str(error).splitlines()[0]}")
                for name, *tensors in zip(result_names(case), found, usual, expected, strict=False):
                    if alone:
                        # the result comes in the last state's type, but most of it is rounded to the tokens' type
                        rounded = DTYPES[dtype] if name == "result" else tensors[0].dtype
                        ratio, text = _element_by_element(*tensors, DTYPES[dtype], rounded)
                    else:
                        ratio, text = _compared(*tensors, _rounding(case))
                    tallied[0] += 1
                    tallied[2] = max(tallied[2], ratio)
                    if ratio > 2 or math.isnan(ratio):
                        problems.append(f"{name}: {text}")
                if not all(torch.equal(a, b) for a, b in zip(found, again, strict=True)):
                    problems.append("a second run gives other bits")
                tallied[1] += len(problems)
                for problem in problems:
                    tell(f"FAILED {op} {row.name} {dtype}, {case.shape}: {problem}")
    for (op, name), reason in refused.items():
        tell(f"{op} {name}: refused some or all: {reason}")
    for (op, name), (compared, failed, ratio) in counts.items():
        text = f"{compared:.0f} tensors compared, {failed:.0f} problems, largest error {ratio / 2:.2f} of what is allowed"
        tell(f"{op} {name}: {text}")
    return not any(failed for _, failed, _ in counts.values())


def _draws(op: str, make: Callable[..., Case]) -> int:
    """Return how many draws of a case are compared together.

    A gradient of the block that is a single number, or a few, is a sum of terms that nearly cancel: under autocast the
    error of one draw is random, for torch as for the kernels, and only that of several shows which is more exact.
    """
    return 16 if op == "mvfuser" and getattr(make, "keywords", {})["length"] <= 65 else 1


def _pooled(results: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Return the results of several draws, stacked."""
    return tuple(torch.stack(tensors) for tensors in zip(*results, strict=True))


def result_names(case: Case) -> list[str]:
    """Return what `Case.both` returns, in words."""
    names = {
        "selective_scan": ("u", "delta", "A", "B", "C", "D", "bias", "z", "initial"),
        "ms_deform_attn": ("value", "locations", "weights"),
        "mvfuser": ("joint", *dict(MVFuser(32).named_parameters())),
    }[case.op]
    return ["result", *(f"gradient of {name}" for name in names)]


def _rounding(case: Case) -> float:
    """Return the relative error that is always allowed.

    For bf16 and fp16 inputs, whose own rounding hides an exponential that is good to 2^-18, that is 1e-5 of what is summed
    in fp32. MVFuser's block under autocast rounds everything between its parts: torch's error of a single number is random.
    """
    dtype = case.leaves[0].dtype
    if dtype.itemsize > 2:
        return 1e-6
    return torch.finfo(dtype).eps / 2 if case.op == "mvfuser" else 1e-5


def _compared(found: Tensor, usual: Tensor, expected: Tensor, rounding: float) -> tuple[float, str]:
    """Return how many times the torch backend's error this one is, by norm, by maximum or by element, whichever is more.

    Twice is allowed, of what nine elements in ten are within four times: the kernels' exponentials are less exact by roundings.
    An error of `rounding` and one rounding of the result are always allowed.
    """
    rounding = max(rounding, torch.finfo(found.dtype).eps / 2)
    if problem := _other_kind(found, usual, expected):
        return math.nan, problem
    largest = (0.0, "")
    for measure, share in ((relative, 1.0), (by_maximum, 1.0), (by_element, 0.5)):
        mine, theirs = measure(found, expected), measure(usual, expected)
        if math.isnan(mine):
            return math.nan, "is not a number"
        ratio = share * mine / max(theirs, rounding)
        largest = max(largest, (ratio, f"error {mine:.1e}, torch's {theirs:.1e}"))
    return largest


def _element_by_element(
    found: Tensor, usual: Tensor, expected: Tensor, tokens: torch.dtype, rounded: torch.dtype
) -> tuple[float, str]:
    """Return the worst element's error, relative to that element, as 2 where it is as large as allowed.

    fp32 rounds the exponent of exp(-32) to 2e-6 of it; powers of 2, short inputs' functions and sums over time add to that.
    """
    if problem := _other_kind(found, usual, expected):
        return math.nan, problem
    allowed = (2e-4 if tokens.itemsize <= 2 else 3e-5) + torch.finfo(rounded).eps / 2
    worst = float(((found.detach().double() - expected.detach()) / expected.detach()).abs().max())
    return 2 * worst / allowed, f"error of an element {worst:.1e}, allowed are {allowed:.1e}"


def _other_kind(found: Tensor, usual: Tensor, expected: Tensor) -> str:
    if found.shape == expected.shape and found.dtype == usual.dtype:
        return ""
    return f"{found.dtype} {tuple(found.shape)}, expected {usual.dtype} {tuple(expected.shape)}"


def by_element(found: Tensor, expected: Tensor) -> float:
    """Return the 90th percentile of the elements' relative errors: a norm hides the errors of small elements.

    What fp32 has no digits for, such as e^-480, is left out.
    """
    found, expected = found.detach().double().flatten(), expected.detach().flatten()
    error = ((found - expected) / expected)[expected.abs() >= torch.finfo(torch.float32).tiny * 2**20].abs()
    return float(error.kthvalue(-(-9 * len(error) // 10)).values) if len(error) else 0.0


def by_maximum(found: Tensor, expected: Tensor) -> float:
    """Return the largest error over the largest number."""
    found, expected = found.detach().double(), expected.detach()
    return float((found - expected).abs().max()) / (float(expected.abs().max()) or 1.0)


def sanitize(arguments: Sequence[str]) -> bool:
    """Run the small cases under compute-sanitizer, without torch's allocator, which would hide accesses beyond a tensor."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    clean = True
    for tool in ("memcheck", "racecheck"):
        command = [program, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9"]
        command += [sys.executable, __file__, "--check", "--tiny", "--bits", *arguments]
        print("+ PYTORCH_NO_CUDA_MEMORY_CACHING=1 " + " ".join(command), flush=True)
        if not Path(program).exists():
            print(f"{program} does not exist", flush=True)
            return False
        try:
            done = subprocess.run(
                command,
                env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                text=True,
                timeout=270,
                check=False,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        except subprocess.TimeoutExpired as error:
            print(f"{tool}: stopped after {error.timeout:.0f} s", flush=True)
            clean = False
            continue
        print("\n".join(done.stdout.splitlines()[-40:]), flush=True)
        print(f"{tool}: {'clean' if done.returncode == 0 else f'exit status {done.returncode}'}", flush=True)
        clean &= done.returncode == 0
    return clean


# ---- report


def about(bench: Bench) -> dict[str, str]:
    """Return what the numbers depend on."""
    commit, dirty = code_commit()
    device, limits = bench.device, bench.limits
    found = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device_name(device),
        "commit": f"{commit or 'unknown'}{' with changes' if dirty else ''}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "copy": f"{limits.gb_per_s:.0f} GB/s, bytes read plus bytes written",
    }
    if not bench.cuda:
        return found | {"processor": _processor(), "threads": str(torch.get_num_threads())}
    found |= {f"matrix product, {name}": f"{2 * rate / 1e12:.0f} TFLOP/s" for name, rate in bench.macs.items()}
    return found | {
        "multiprocessors": str(limits.multiprocessors),
        "driver": nvidia_smi("driver_version", device) or "unknown",
        "clock": f"{bench.clock_mhz()} MHz under a matrix product, {limits.ghz * 1e3:.0f} at most",
        "memory clock": f"{nvidia_smi('clocks.mem', device) or '?'} MHz",
        "nvcc": compiled.status().nvcc or "not found",
        "mamba-ssm": _version("mamba-ssm"),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def markdown(report: Report, *, cuda: bool) -> str:
    """Return the report as Markdown tables."""
    lines = [
        "# Times of the operators' backends",
        "",
        f"By `python benchmarks/kernels.py`. {_METHOD['cuda' if cuda else 'cpu']}",
        "",
    ]
    lines += [f"- {key}: {value}" for key, value in report.about.items()]
    titles = {
        "scan": "Selective scan",
        "deform": "Multi-scale deformable attention",
        "block": "MVFuser's block",
        "loops": "Selective scan against plain loops under autograd",
    }
    for part in dict.fromkeys(row.part for row in report.rows):
        rows = [row for row in report.rows if row.part == part]
        lines += ["", f"## {titles[part]}", "", *_table(rows, cuda=cuda)]
        notes = dict.fromkeys(f"{row.contender}: {row.note}" for row in rows if row.note)
        lines += ["", *(f"- {note}" for note in notes)] if notes else []
    return "\n".join([*lines, ""])


_METHOD = {
    "cuda": "Median milliseconds. graph: replays of a CUDA graph of calls on rotating inputs. eager: events around one call, the "
    "cache emptied before it, Python's time included where it is longer. speed: times as fast as the first of the other people's "
    "kernels, forward / forward and backward / backward alone, by graphs where both have them. floor: the longest of bytes over "
    "the measured copy bandwidth, exponentials over their units at the highest clock, and products over the measured rate. "
    "error: ||x - x64|| / ||x64|| on a small case, of the result and of the worst gradient.",
    "cpu": "Median milliseconds. speed: times as fast as the first loop, forward / forward and backward / backward alone. "
    "floor: bytes over the measured copy bandwidth. error: ||x - x64|| / ||x64|| on a small case, of the result and of the worst "
    "gradient.",
}


def _table(rows: Sequence[Row], *, cuda: bool) -> list[str]:
    header = ["shape", "dtype", "", "forward", "+ backward", "speed", "floor", "error", "gradients"]
    if cuda:
        header[3:5] = ["forward, graph", "+ backward, graph", "forward, eager", "+ backward, eager"]
    texts = [header]
    above = ""
    peers = {_case(row): row for row in reversed(rows) if row.peer and row.both_ms is not None}
    for row in rows:
        eager = [_ms(row.forward_ms), _ms(row.both_ms)]
        graph = [_ms(row.forward_graph_ms), _ms(row.both_graph_ms)] if cuda else []
        floor = " / ".join(f"{_ms(ms)} {by}" for ms, by in zip(row.floor_ms, row.floor_by, strict=True))
        errors = ["" if e is None else f"{e:.1e}" for e in (row.error, row.gradient_error)]
        case = _case(row)
        names = [row.shape, row.dtype] if case != above else ["", ""]
        speed = _speed(row, peers.get(case))
        texts.append([*names, row.contender, *graph, *eager, speed, floor if case != above else "", *errors])
        above = case
    widths = [max(len(line[i]) for line in texts) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in texts]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def _case(row: Row) -> str:
    return f"{row.shape} {row.dtype}"


def _speed(row: Row, peer: Row | None) -> str:
    """Return the speed-up over the peer: forward / forward and backward / backward alone; by graphs if both have them."""
    if peer is None or row.both_ms is None or row is peer:
        return "1" if row is peer else ""
    pairs = ((row.forward_graph_ms, row.both_graph_ms), (peer.forward_graph_ms, peer.both_graph_ms))
    if None in (*pairs[0], *pairs[1]):
        pairs = ((row.forward_ms, row.both_ms), (peer.forward_ms, peer.both_ms))
    (forward, both), (peer_forward, peer_both) = pairs
    assert forward is not None
    assert both is not None
    assert peer_forward is not None
    assert peer_both is not None
    ratios = (peer_forward / forward, peer_both / both, (peer_both - peer_forward) / max(both - forward, 1e-9))
    return " / ".join(f"{ratio:.2f}" for ratio in ratios)


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}" if value < 1 else f"{value:.3f}" if value < 100 else f"{value:.0f}"


def main() -> int:
    """Run as a program; the summary comes last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cpu, cuda, cuda:1; default: a GPU if there is one")
    parser.add_argument("--only", nargs="+", choices=(*PARTS, "loops"), help="parts; default: all that the device has")
    parser.add_argument("--bits", action="store_true", help="with --check: the same bits twice, no comparison")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="with --check or --sanitize: these only")
    parser.add_argument("--out", type=Path, help=f"folder of the .md and .json; default: {HERE.name}/, none with --tiny")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, shorter measurements")
    parser.add_argument("--tiny", action="store_true", help="every path in seconds, on shapes that mean nothing")
    parser.add_argument("--check", action="store_true", help="compare all backends with fp64 instead; print what fails")
    parser.add_argument("--sanitize", action="store_true", help="small cases under compute-sanitizer's memcheck and racecheck")
    given = parser.parse_args()
    device = pick_device(given.device)
    tell = partial(print, file=sys.stderr, flush=True)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
        try:
            compiled.build(on_line=tell)
        except compiled.BuildError as error:
            tell(f"the CUDA kernels are not built: {error}")
    if given.sanitize:
        same = (("--device", [given.device] if given.device else []), ("--only", given.only), ("--backends", given.backends))
        return 0 if sanitize([word for flag, values in same if values for word in (flag, *values)]) else 1
    if given.check:
        # empty tensors are filled with NaN, so that elements that a kernel does not write are found
        torch.use_deterministic_algorithms(True, warn_only=True)
        warnings.filterwarnings("ignore", message=".*deterministic")
        ops = [PARTS[part] for part in given.only or PARTS if part in PARTS]
        ok = check(
            device,
            tiny=given.tiny,
            tell=partial(print, flush=True),
            only=ops,
            backends=given.backends or (),
            compare=not given.bits,
        )
        return 0 if ok else 1
    return measure(given, device, tell)


def measure(given: argparse.Namespace, device: torch.device, tell: Callable[[str], None]) -> int:
    """Time all parts, write the report and print it."""
    cuda = device.type == "cuda"
    begun = time.perf_counter()
    bench = Bench(device, 0.02 if given.tiny else 0.1 if given.quick else 0.25 if cuda else 2.0, tell)
    report = Report({} if cuda else {"load before": f"{os.getloadavg()[0]:.1f}"})
    parts = given.only or [*PARTS, *([] if cuda else ["loops"])]
    for name, plan in plans(device, quick=given.quick, tiny=given.tiny).items():
        if name in parts:
            bench.part(name, plan, report)
    if "loops" in parts and not cuda:
        for make, contenders in loops(given.tiny):
            list(bench.case("loops", "fp32", make, contenders, report))
    report.about |= about(bench) | {"run": f"{time.perf_counter() - begun:.0f} s"}
    text = markdown(report, cuda=cuda)
    out = given.out or (None if given.tiny else HERE)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        stem = "kernels" if cuda else "kernels-cpu"
        (out / f"{stem}.md").write_text(text, encoding="utf-8")
        rows = [asdict(row) for row in report.rows]
        (out / f"{stem}.json").write_text(json.dumps({"about": report.about, "rows": rows}, indent=1) + "\n")
        tell(f"written: {out / stem}.md and .json")
    print(text)
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
