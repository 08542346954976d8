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
import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path

import kernel_check
import torch
from kernel_peers import BLOCK_PEERS, DEFORM_PEERS, SCAN_PEERS, Contender, indexed, own, plain_loop, unbound
from kernel_table import Report, Row, markdown

from dgbench.cost.cases import DTYPES, Case, block_case, deform_case, scan_case
from dgbench.cost.kernels import machine
from dgbench.cost.timing import median_ms, nvidia_smi
from dgbench.engine.device import device_name, pick_device
from dgbench.environment import code_commit
from mfuser.ops import compiled

HERE = Path(__file__).parent
PARTS = {"scan": "selective_scan", "deform": "ms_deform_attn", "block": "mvfuser"}


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
                out, *grads = (kernel_check.relative(*pair) for pair in zip(found, expected, strict=True))
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
        ok = kernel_check.check(
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
