"""Compare the forms of the selective scan's CUDA forward, and what the deformable backward's time depends on, on one GPU.

    python benchmarks/scan_forms.py --json forms.json                  # all parts, an estimated 60 to 90 s on 16 cores
    python benchmarks/scan_forms.py --parts check forward              # some

Needs nvcc. Compiles the kernels twice, in parallel: `plain`, the library of users, and `forms`, with MFUSER_SCAN_FORMS, by which
the scan's forward has further forms, and MFUSER_EXACT_DECAYS, by which decays near 1 are more exact in fp32 (cuda/README.md).
Both are kept in the cache folder, so that a second run does not compile. What is measured is printed as it comes:

- unit: the relative error of 2^x by the GPU's unit of exponentials, by the range of x: mean, root mean square and largest.
- deform: microseconds of deformable attention, forward and backward, with points that are near and anywhere.
- sweep: the deformable backward in bf16 by its tuning parameters: the six best and the slowest. What could not run is named.
- profile: microseconds of each kernel of the deformable attention, by torch's profiler.
- block: errors of MVFuser's block in fp32, as multiples of the torch backend's, of the gradient of A_log and of the worst tensor:
  by norm, largest element, and 90th percentile of the elements; both libraries.
- check: every form against the torch backend in fp64 (for the largest shape, form 0): the errors of result and last state by
  norm. `WRONG`: beyond the limit; `OTHER BITS`: a second call differs; `KEPT`: the states for the backward are not form 0's;
  `CANNOT RUN`: the launch failed.
- forward: microseconds of every form, and of the backward behind form 0; both libraries, of which `plain` has form 0 only.

Times are medians of replays of a CUDA graph, by call, with the 5 % quantile in brackets; forms take turns. A graph has two to
eight sets of inputs, which together exceed the cache where eight are enough for that. A part that fails costs no other one; the
exit status is 1 if a check or a part fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kernel_check import by_element, by_maximum, relative, result_names
from torch import Tensor

from dgbench import atomic
from dgbench.cost.cases import DTYPES, Case, block_case, deform_case
from dgbench.cost.timing import Call, Times, graphed, hardware, interleaved
from dgbench.environment import code_commit, describe_environment
from mfuser.ops import compiled
from mfuser.ops.ms_deform_attn import cuda_backend as deformable
from mfuser.ops.selective_scan import cuda_backend as scan
from mfuser.ops.selective_scan import torch_backend

PARTS = ("unit", "deform", "sweep", "profile", "block", "check", "forward")
LIBRARIES = {"plain": (), "forms": ("MFUSER_SCAN_FORMS", "MFUSER_EXACT_DECAYS")}
FORMS = {  # of `form_of` in cuda/selective_scan.cuh
    0: "two passes, what runs",
    1: "8 steps of a lane, 4 teams, 1 buffer",
    2: "8 steps, 4 teams, 2 buffers",
    3: "8 steps, 3 teams, 2 buffers, 2 states abreast",
    4: "12 steps, 3 teams, 1 buffer",
    5: "16 steps, 2 teams, 2 buffers",
}
# batch, length, dim, state; gate; first state; whether states are kept for the backward
CHECKED = (
    (1, 5, 4, 4, False, False, False),
    (2, 300, 12, 16, False, True, True),
    (1, 1100, 24, 16, True, True, True),
    (1, 1030, 8, 8, False, False, False),
    (3, 530, 20, 12, True, False, True),
    (2, 577, 30, 13, True, True, True),
    (2, 2594, 512, 16, False, False, True),
)
# relative errors of result and last state by norm, and of kept states against form 0
LIMITS = {"bf16": (4e-3, 2e-5), "fp32": (2e-6, 2e-6)}
KEPT_LIMIT = 1e-5
TIMED = ((2, 2594, 512, 16), (18, 2594, 512, 16), (1, 577, 512, 16), (1, 2050, 512, 16), (1, 8192, 512, 16), (8, 2050, 512, 16))
BLOCKS = ((577, 256, 3), (2594, 256, 1))  # length, width, seeds
SIDES = (18, 36, 72)
RANGES = ((-1 / 64, 0.0), (-1 / 16, -1 / 64), (-1 / 4, -1 / 16), (-1.0, -1 / 4), (-8.0, -1.0))
SWEPT: tuple[dict[str, int], ...] = (
    *({"cell_tile": tile, "gather_threads": threads} for threads in (64, 128, 192, 256) for tile in (5, 6, 7, 8)),
    *({"segment": segment} for segment in (1820, 2800, 8192)),
    *({"sort_threads": 256, **more} for more in ({}, {"segment": 2800})),
)
Found = tuple[Tensor, Tensor, Tensor]  # result, last state, and the states kept for the backward
INPUT_BYTES = 120_000_000  # of a graph's inputs and results: more than an H200's cache of 50 MB


class Bench:
    """The device, what has been found so far, and the file that it is written to."""

    def __init__(self, device: torch.device, out: Path | None) -> None:
        self.device, self.out = device, out
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.about: dict[str, Any] = {}
        self.wrong = 0
        self._begun = time.perf_counter()

    def tell(self, text: str) -> None:
        """Print a line with the seconds since the start."""
        print(f"[{time.perf_counter() - self._begun:5.1f}] {text}", flush=True)

    def add(self, part: str, text: str, **row: Any) -> None:
        """Print a row and keep its numbers, also in the file: a later kernel may hang."""
        self.tell(f"{part}: {text}")
        self.rows.setdefault(part, []).append(row)
        self.write()

    def attempt(self, part: str, measure: Callable[..., None], *given: Any) -> None:
        """Measure a part; an error is told and counted, and costs no other part."""
        try:
            measure(self, *given)
        except RuntimeError as error:
            self.wrong += 1
            self.add(part, f"FAILED: {traceback.format_exc()}", error=f"{type(error).__name__}: {error}")

    def write(self) -> None:
        """Write the file, if there is to be one."""
        if self.out is not None:
            content = {**self.about, "wrong": self.wrong, "seconds": time.perf_counter() - self._begun}
            atomic.write(self.out, json.dumps({**content, "rows": self.rows}, indent=1) + "\n")


def built(tell: Callable[[str], None]) -> dict[str, Path]:
    """Compile the libraries, both at once.

    Raises: compiled.BuildError without nvcc, or with the compiler's words.
    """

    def build(name: str) -> Path:
        return compiled.build(macros=LIBRARIES[name], on_line=lambda line: tell(f"{name}: {line}"))

    with ThreadPoolExecutor(len(LIBRARIES)) as pool:
        return dict(zip(LIBRARIES, pool.map(build, LIBRARIES), strict=True))


# ---- times


def microseconds(
    bench: Bench, calls: Mapping[str, Sequence[Call]], *, least: int = 25, at_most: float = 0.03
) -> dict[str, Times | str]:
    """Time each list of calls as a graph, in turns; the times are those of one call. A string says why a list cannot run."""
    found: dict[str, Times | str] = {}
    replays: dict[str, Call] = {}
    for name, some in calls.items():
        try:
            replays[name] = graphed(*some)
        except RuntimeError as error:
            found[name] = first_line(error)
    timed = interleaved(replays, bench.device, least=least, at_most=at_most, flush=False) if replays else {}
    for name, times in timed.items():
        each = 1e3 / len(calls[name])
        found[name] = Times(each * times.median, each * times.low, each * times.high, times.calls)
    return {name: found[name] for name in calls}


def first_line(error: RuntimeError) -> str:
    """Return the beginning of what an error says."""
    return (str(error).splitlines() or ["failed"])[0][:120]


def worded(times: Times | str) -> str:
    """Return the median and the lower end, or why there is none."""
    return times if isinstance(times, str) else f"{times.median:.1f} ({times.low:.1f})"


def kept(times: Times | str) -> dict[str, Any]:
    """Return the same for the file."""
    return {"error": times} if isinstance(times, str) else {"median": times.median, "low": times.low, "high": times.high}


def unit(bench: Bench) -> None:
    """Compare 2^x in fp32 with fp64."""
    for low, high in RANGES:
        x = torch.linspace(low, high, 200_001, device=bench.device)
        error = torch.exp2(x).double() / torch.exp2(x.double()) - 1
        mean, rms, most = float(error.mean()), float(error.square().mean().sqrt()), float(error.abs().max())
        text = f"x in {low:.4f}..{high:.4f}: mean {mean:+.1e}, rms {rms:.1e}, largest {most:.1e}"
        bench.add("unit", text, low=low, high=high, mean=mean, rms=rms, largest=most)


# ---- deformable attention


def deform(bench: Bench, parts: Sequence[str]) -> None:
    """Time forward and backward, then the backward by its tuning parameters and by kernel."""
    for name in ("bf16", "fp32"):
        for spread in ("near", "anywhere"):
            make = partial(
                deform_case, DTYPES[name], bench.device, batch=2, sides=SIDES, heads=8, dim=32, points=4, spread=spread
            )
            cases = [make(seed=seed) for seed in range(5)]
            calls = {way: [lambda c=c, way=way: getattr(c, way)("cuda") for c in cases] for way in ("forward", "both")}
            found = microseconds(bench, calls)
            if "deform" in parts:
                text = ", ".join(f"{way} {worded(times)}" for way, times in found.items())
                numbers = {way: kept(times) for way, times in found.items()}
                if isinstance(found["forward"], Times) and isinstance(found["both"], Times):
                    text += f", difference {found['both'].median - found['forward'].median:.1f}"
                bench.add("deform", f"{name} {spread}, us: {text}", dtype=name, spread=spread, **numbers)
            if "sweep" in parts and name == "bf16" and isinstance(found["forward"], Times):
                sweep(bench, spread, calls["both"], found["forward"].median)
            if "profile" in parts:
                profile(bench, f"{name} {spread}", cases)


@contextmanager
def tuned(change: Mapping[str, int]) -> Iterator[None]:
    """Run the deformable attention of 16-bit values with other tuning parameters, and `segment`, within the context."""
    parameters = deformable._TUNING[2]
    before, segment = dict(parameters), deformable._SEGMENT
    parameters.update({name: value for name, value in change.items() if name != "segment"})
    deformable._SEGMENT = change.get("segment", segment)
    try:
        yield
    finally:
        parameters.update(before)
        deformable._SEGMENT = segment


def sweep(bench: Bench, spread: str, calls: Sequence[Call], forward: float) -> None:
    """Time the backward, as what a call takes beyond the forward, with each of `SWEPT` in place of the parameters in use."""
    timed: list[tuple[float, dict[str, int]]] = []
    failed: list[str] = []
    for change in SWEPT:
        with tuned(change):
            found = microseconds(bench, {"": calls}, least=8, at_most=0.01)[""]
        if isinstance(found, str):
            failed.append(f"{change} {found}")
        else:
            timed.append((found.median - forward, change))
    timed.sort(key=lambda pair: pair[0])
    text = "; ".join(f"{us:.1f} {change}" for us, change in timed[:6])
    text += f" ... {timed[-1][0]:.1f} {timed[-1][1]}" if len(timed) > 6 else ""
    text += f"; cannot run: {', '.join(failed)}" if failed else ""
    numbers = [{"backward": us, **change} for us, change in timed]
    bench.add("sweep", f"backward of bf16 {spread}, us: {text}", spread=spread, timed=numbers, failed=failed)


def profile(bench: Bench, name: str, cases: Sequence[Case]) -> None:
    """Show the mean time of each kernel."""
    kind = torch.profiler.ProfilerActivity.CUDA
    try:
        with torch.profiler.profile(activities=[kind]) as found:
            for case in [*cases] * 3:
                case.both("cuda")
            torch.cuda.synchronize()
    except RuntimeError as error:  # such as of a driver that lets only root count
        bench.add("profile", f"{name}: {error}", case=name, error=str(error))
        return
    rows = sorted(found.key_averages(), key=lambda row: -row.device_time_total)[:7]
    means = {row.key: row.device_time_total / row.count for row in rows if row.device_time_total}
    text = "; ".join(f"{key.split('(')[0][:60]} {mean:.1f}" for key, mean in means.items())
    bench.add("profile", f"{name}, us of a kernel: {text or 'nothing was counted'}", case=name, means=means)


# ---- MVFuser's block


def block(bench: Bench, library: str) -> None:
    """Compare errors with those of the torch backend."""
    measures = {"norm": relative, "largest": by_maximum, "element": by_element}
    for length, width, seeds in BLOCKS:
        for seed in range(seeds):
            case = block_case(torch.float32, bench.device, batch=2, length=length, width=width, seed=seed)
            expected, usual, found = case.precise().both("torch"), case.both("torch"), case.both("cuda")
            times = {
                name: {way: error(mine, true) / max(error(other, true), 1e-6) for way, error in measures.items()}
                for name, mine, other, true in zip(result_names(case), found, usual, expected, strict=True)
            }
            # of elements, twice as much is allowed as by norm or maximum (docs/kernels.md)
            worst = max(times, key=lambda name: max(times[name]["norm"], times[name]["largest"], times[name]["element"] / 2))
            shown = {name: ", ".join(f"{way} {x:.2f}" for way, x in times[name].items()) for name in ("gradient of A_log", worst)}
            text = "; ".join(f"{name}: {words}" for name, words in shown.items())
            row = {"library": library, "length": length, "width": width, "seed": seed, "times": times, "worst": worst}
            bench.add("block", f"{library}, L {length}, C {width}, seed {seed}: {text}", **row)


# ---- the scan


def scan_inputs(
    bench: Bench, sizes: Sequence[int], dtype: torch.dtype, *, gated: bool = False, first: bool = False, seed: int = 0
) -> tuple[Any, ...]:
    """Draw what `cuda_backend.forward` takes, up to the first state: tokens in `dtype`, weights in fp32."""
    B, L, D, N = sizes
    generator = torch.Generator(bench.device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=bench.device)

    u, delta, Bm, C, z = draw(B, L, D), draw(B, L, D) - 2, draw(B, L, N), draw(B, L, N), draw(B, L, D)
    A, skip, bias, initial = -draw(D, N).exp(), draw(D), draw(D) - 1, draw(B, D, N)
    tokens = [tensor.to(dtype) for tensor in (u, delta, Bm, C, z)]
    return (*tokens[:2], A, *tokens[2:4], skip, tokens[4] if gated else None, bias, initial if first else None)


def forward(form: int, given: tuple[Any, ...], keep: bool) -> Found:
    """Run a form: the result, the last state, and, with `keep`, the states for the backward."""
    scan._FORM = form
    try:
        return scan.forward(*given, True, keep)
    finally:
        scan._FORM = 0


@torch.no_grad()
def check(bench: Bench) -> None:
    """Compare all forms by errors and bits."""
    for name in ("bf16", "fp32"):
        for case in CHECKED:
            *sizes, gated, first, keep = case
            given = scan_inputs(bench, sizes, DTYPES[name], gated=gated, first=first)
            usual = expected = forward(0, given, keep)
            if case != CHECKED[-1]:
                wide: list[Any] = [tensor if tensor is None else tensor.double() for tensor in given]
                expected = torch_backend.forward(*wide, True, False)
            options = [word for word, on in (("gate", gated), ("first state", first), ("kept", keep)) if on]
            for form in FORMS:
                try:
                    twice = forward(form, given, keep), forward(form, given, keep)
                    errors, problems = compared(name, *twice, usual, expected)
                except RuntimeError as error:
                    errors, problems = [], [f"CANNOT RUN: {first_line(error)}"]
                bench.wrong += bool(problems)
                text = f"{name} {', '.join([*map(str, sizes), *options])}, form {form}: "
                text += " ".join([*(f"{error:.1e}" for error in errors), *problems])
                row = {"dtype": name, "sizes": sizes, "options": options, "form": form, "errors": errors, "problems": problems}
                bench.add("check", text, **row)


def compared(dtype: str, found: Found, again: Found, usual: Found, expected: Found) -> tuple[list[float], list[str]]:
    """Return the errors of a form's result and last state, and what is beyond the limits."""
    errors = [relative(mine, true.double()) for mine, true in zip(found[:2], expected[:2], strict=True)]
    problems = [] if all(map(torch.equal, found[:2], again[:2])) else ["OTHER BITS"]
    # not `>`, which NaN would pass
    if not all(error < limit for error, limit in zip(errors, LIMITS[dtype], strict=True)):
        problems.append("WRONG")
    if found[2].numel():
        # without padding
        mine, other = (states[2][..., : found[1].shape[1], : found[1].shape[2]] for states in (found, usual))
        if not (difference := relative(mine, other)) < KEPT_LIMIT:
            problems.append(f"KEPT {difference:.1e}")
    return errors, problems


@torch.no_grad()
def timed(bench: Bench, library: str) -> None:
    """Time the forward in all forms that a library has, and the backward at the first shape."""
    for name, shapes in (("bf16", TIMED), ("fp32", TIMED[:2])):
        for sizes in shapes:
            B, L, D, _ = sizes
            size = 3 * B * L * D * DTYPES[name].itemsize
            count = max(2, min(8, -(-INPUT_BYTES // size)))
            inputs = [scan_inputs(bench, sizes, DTYPES[name], seed=seed) for seed in range(count)]
            for keep in (False, True) if sizes == TIMED[0] else (False,):
                one_shape(bench, library, name, sizes, inputs, keep)
            if sizes == TIMED[0]:
                backward(bench, library, name, sizes, inputs)
            del inputs
            torch.cuda.empty_cache()


def one_shape(
    bench: Bench, library: str, dtype: str, sizes: Sequence[int], inputs: Sequence[tuple[Any, ...]], keep: bool
) -> None:
    """Time the forms at one shape."""
    forms = FORMS if LIBRARIES[library] else (0,)
    calls = {str(form): [lambda given=given, form=form: forward(form, given, keep) for given in inputs] for form in forms}
    found = microseconds(bench, calls)
    text = f"{library}, {dtype} {sizes}{' kept' if keep else ''}, us: "
    text += " | ".join(f"{form}: {worded(times)}" for form, times in found.items())
    numbers = {form: kept(times) for form, times in found.items()}
    bench.add("forward", text, library=library, dtype=dtype, sizes=sizes, keep=keep, times=numbers)


def backward(bench: Bench, library: str, dtype: str, sizes: Sequence[int], inputs: Sequence[tuple[Any, ...]]) -> None:
    """Time the backward alone, which has one form."""
    ready = [(given, forward(0, given, True)[2], torch.randn_like(given[0])) for given in inputs]
    calls = [lambda g=given, s=saved, d=dy: scan.backward(d, None, *g, True, s) for given, saved, dy in ready]
    found = microseconds(bench, {"": calls})[""]
    text = f"{library}, {dtype} {sizes}, us: {worded(found)}"
    bench.add("backward", text, library=library, dtype=dtype, sizes=sizes, times=kept(found))


# ---- the program


def measure(bench: Bench, libraries: Mapping[str, Path], parts: Sequence[str]) -> None:
    """Measure the parts; what can hang or end the process, the forms, comes last."""
    if "unit" in parts:
        bench.attempt("unit", unit)
    for name, path in libraries.items():
        with compiled.use(path):
            # the same kernels in both
            if name == "plain" and {"deform", "sweep", "profile"} & {*parts}:
                bench.attempt("deform", deform, parts)
            if "block" in parts:
                bench.attempt("block", block, name)
            if "check" in parts and LIBRARIES[name]:
                bench.attempt("check", check)
            if "forward" in parts:
                bench.attempt("forward", timed, name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help="of those above; default: all")
    parser.add_argument("--json", type=Path, dest="out", metavar="OUT", help="also write the numbers here, after every row")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: torch finds no CUDA GPU: run this where there is one", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    bench = Bench(device, given.out)
    try:
        libraries = built(bench.tell)
        machine, (commit, dirty) = hardware(device), code_commit()
        bench.about = {"hardware": asdict(machine), "environment": describe_environment(machine.name)}
        bench.about |= {"commit": commit, "dirty": dirty, "forms": FORMS}
        bench.tell(f"{machine.name}, torch {torch.__version__}, commit {commit}{' with changes' if dirty else ''}")
        for form, words in FORMS.items():
            bench.tell(f"form {form}: {words}")
        measure(bench, libraries, given.parts)
        bench.write()
    except (OSError, compiled.BuildError) as error:  # a file that cannot be written, or no nvcc
        print(f"error: {error}", file=sys.stderr)
        return 1
    bench.tell(f"done; {bench.wrong} checks or parts failed")
    return int(bench.wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
