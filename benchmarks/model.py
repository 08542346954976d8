"""Time MFuser at full size, inference and training, against the matrix products and attention of its towers; print Markdown.

    python benchmarks/model.py                       # DINOv2-L with EVA02-CLIP-L at 512x512, two minutes on one GPU
    python benchmarks/model.py --vlm siglip --towers base --stages --json base.json
    python benchmarks/model.py --towers tiny --size 64 --device cpu   # every path in a minute; means nothing

Weights are random, which cost what trained ones do. Each row times its columns in turn, one call of each a round, and has the
median and half the width of the central 90 % of the calls; `--against FILE` compares them with those of an earlier run. Rows are
printed to standard error as they come, and `--json FILE` has them from then on. What fails is named, and costs no other row; the
exit status is 1 then.

- eager: fp32 weights under bf16 autocast.    exact: fp32, as `dgbench eval` scores by default.
- fast: as `dgbench eval --mode fast` runs it, and a training with `train.frozen`, `train.compile` and `train.graphs`. Stages are
  those of a pass without graphs, inside of which nothing can be told apart.
- products: the matrix products and attentions of both image towers alone (`dgbench.cost.products`), in bf16, one after the other,
  replayed as one CUDA graph. Widths that are no multiple of 8 (EVA02-L's MLPs have 2730) are padded to one, which is faster,
  and so the stricter measure; the time without that is beside the lower bounds. Of a training step they are the forward pass's,
  and those of the gradients with regard to inputs from the second block on: the first fuser stands behind the first block, and
  towers are frozen. Fused attention computes its scores again in the backward pass, which is part of its time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import model_table
import torch
from model_calls import (
    Bench,
    as_scored,
    fast_inference,
    fast_stages,
    parts_of,
    training,
    training_stages,
)
from model_table import CROP, EAGER, EXACT, FAST, NAMES, PRODUCTS, ROWS, SLIDE, STEP, Measured, Row

from dgbench import atomic
from dgbench.cost import products
from dgbench.cost.counted import Subject
from dgbench.cost.profile import counted_total
from dgbench.cost.stages import Stages, traced
from dgbench.cost.timing import Call, hardware, interleaved, median_ms
from dgbench.engine.device import pick_device
from dgbench.environment import code_commit, describe_environment
from dgbench.recipe import load_method

PAIRS = {
    "large": {"eva02": ("dinov2_l", "eva02"), "clip": ("dinov2_l", "clip"), "siglip": ("dinov2_l", "siglip")},
    "base": {"eva02": ("dinov2_b", "eva02_b"), "clip": ("dinov2_b", "clip_b"), "siglip": ("dinov2_b", "siglip_b")},
    "tiny": {"eva02": ("tiny", "tiny")},
}
FOR_MS = ("dinov2_l", "eva02")  # the pair whose bars are in ms and GiB, too


# ---- rows


def infer(bench: Bench, rows: Sequence[Row], *, staged: bool) -> None:
    """Measure inference, exact rows without autocast."""
    before = bench.held()
    model = bench.model()
    calls: dict[str, dict[str, Call]] = {row.name: {} for row in rows}
    quick, slow = ([row for row in rows if row.exact == exact] for exact in (False, True))

    def first(column: str, some: Sequence[Row], asked: Any, dtype: torch.dtype | None, above: float) -> None:
        for row in some:
            with bench.going_on(column, row, column):
                call = bench.asked(row, asked, dtype)
                bench.measured[row.name].gib[column] = bench.peak(call, above)
                calls[row.name][column] = call
            bench.tell(f"{row.name}, {column}, first calls")

    first(EAGER, quick, model, bench.dtype, before)
    between = bench.held()
    if slow:
        first(EXACT, slow, as_scored(model), None, between)
        between = bench.held()
    with bench.going_on("the fast model"):
        if quick:
            ready = fast_inference(bench, model)
            first(FAST, quick, ready, None, between)
            bench.notes += [f"no CUDA graph of {what}: {why}" for what, why in ready.uncaptured.items()]
    timed(bench, rows, calls)
    if staged:
        stages = Stages(bench.device)
        with stages.watching(parts_of(model), then={"mask decoder": "upsampling"}):
            for row in quick:
                with bench.going_on("stages of the eager model", row, f"stages, {EAGER}"):
                    call = calls[row.name][EAGER]
                    bench.measured[row.name].stages[EAGER] = stages.times(call, first="towers", repeats=bench.rounds)
        bench.tell("stages")
        if some := [row for row in quick if FAST in calls[row.name]]:
            with bench.going_on("stages of the fast model"):
                fast_stages(bench, model, some)
            bench.tell("stages of the fast model")


def train(bench: Bench, rows: Sequence[Row], *, staged: bool) -> None:
    """Measure training steps."""
    calls: dict[str, dict[str, Call]] = {row.name: {} for row in rows}
    for name in (EAGER, FAST):
        before = bench.held()
        with bench.going_on(f"{name} training"):
            model = bench.model()
            steps, peak = training(bench, model, Stages(bench.device), fast=name == FAST)
            for row in rows:
                with bench.going_on(name, row, name):
                    call = steps(row.images)
                    bench.measured[row.name].gib[name] = bench.peak(call, before, peak)
                    calls[row.name][name] = call
                bench.tell(f"{row.name}, {name}, first steps")
    timed(bench, rows, calls)
    calls.clear()
    for name in (EAGER, FAST) if staged else ():
        bench.released()
        with bench.going_on(f"stages of {name} training"):
            training_stages(bench, rows, fast=name == FAST)
        bench.tell(f"stages of {name} training")


def timed(bench: Bench, rows: Sequence[Row], calls: Mapping[str, Mapping[str, Call]]) -> None:
    """Time rows one after the other, each with its products, and trace those that miss a bar; print each as it is there."""
    for row in rows:
        found, beside, steps = bench.measured[row.name], dict(calls[row.name]), list[products.Step]()
        if not row.exact:
            with bench.going_on(PRODUCTS, row, PRODUCTS):
                steps = bench.towers(row)
                found.flop = products.flop(steps, training=row.kind == STEP)
                beside[PRODUCTS] = bench.bare(products.aligned(steps), row)
        settings: dict[str, Any] = {"at_most": bench.seconds, "least": bench.rounds, "flush": False}
        with bench.going_on("calls in turn", row, "in turn"):
            found.times = interleaved(beside, bench.device, **settings) if beside else {}
        if "in turn" in found.errors:  # one of them fails beside the others
            for name, call in beside.items():
                with bench.going_on(name, row, name):
                    found.times |= interleaved({name: call}, bench.device, **settings)
        with bench.going_on("products as they are", row, "as they are"):
            if steps and products.aligned(steps) != steps:
                found.as_they_are = median_ms(bench.bare(steps, row), bench.device, at_most=0.2, flush=False)
        with bench.going_on("trace", row, "trace"):
            if found.missed(row):
                found.traces[found.ours] = traced(beside[found.ours], bench.device, calls=min(3, bench.rounds))
        beside.clear()
        bench.released()
        print(model_table.line(row, found), file=sys.stderr, flush=True)
        bench.tell(row.name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vlm", choices=tuple(PAIRS["large"]), default="eva02", help="the vision-language tower")
    parser.add_argument("--towers", choices=tuple(PAIRS), default="large")
    parser.add_argument("--size", type=int, default=512, help="side of the crops, in pixels")
    parser.add_argument("--rows", nargs="+", choices=NAMES, default=NAMES, metavar="ROW", help=f"of: {', '.join(NAMES)}")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--seconds", type=float, default=0.6, help="for each call of a row")
    parser.add_argument("--rounds", type=int, default=10, help="at least, within four times the seconds; and calls of --stages")
    parser.add_argument("--stages", action="store_true", help="also time part by part")
    parser.add_argument("--no-compile", action="store_true", help="of the fast path")
    parser.add_argument("--json", type=Path, dest="out", help="also write the numbers here, after every row")
    parser.add_argument("--against", type=Path, metavar="JSON", help="compare with an earlier run's numbers")
    given = parser.parse_args(arguments)
    if given.vlm not in PAIRS[given.towers]:
        parser.error(f"--towers {given.towers} has no pair with {given.vlm}; choose from {', '.join(PAIRS[given.towers])}")
    earlier = json.loads(given.against.read_text(encoding="utf-8")) if given.against else None
    begun = time.perf_counter()
    device, rows = pick_device(given.device), [row for row in ROWS if row.name in given.rows]
    vfm, vlm = PAIRS[given.towers][given.vlm]
    subject = Subject(load_method("mfuser", {"vfm": vfm, "vlm": vlm}, ()), (given.size, given.size))
    bench = Bench(subject, device, torch.bfloat16, given.seconds, given.rounds, not given.no_compile)
    absolute = (vfm, vlm, given.size) == (*FOR_MS, 512) and device.type == "cuda"
    bench.measured = {row.name: Measured(bench.crops(row), absolute) for row in rows}
    torch.manual_seed(0)
    about_device = hardware(device)
    side = 8192 if device.type == "cuda" else 256
    square = torch.randn(side, side, device=device, dtype=bench.dtype)
    rate = 2 * side**3 / (1e-3 * median_ms(lambda: square @ square, device, at_most=0.3))
    commit, dirty = code_commit()
    about = {
        "towers": [vfm, vlm],
        "size": given.size,
        "hardware": {key: getattr(about_device, key) for key in about_device.__slots__},
        "environment": describe_environment(about_device.name, torch.get_num_threads()),
        "compiled": bench.compiled,
        "commit": commit,
        "dirty": dirty,
        "flop_per_second": rate,
    }

    def keep(**more: object) -> None:
        if given.out:
            content = {**about, **more, "notes": bench.notes, "seconds": time.perf_counter() - begun}
            content["rows"] = model_table.as_json(bench.measured)
            atomic.write(given.out, json.dumps(content, indent=1) + "\n")

    bench.keep = keep
    bench.tell("one large product")
    for measure, kinds in ((infer, (CROP, SLIDE)), (train, (STEP,))):
        if some := [row for row in rows if row.kind in kinds]:
            with bench.going_on(f"rows of {measure.__name__}"):
                measure(bench, some, staged=given.stages)
            bench.released()
    lines = [f"# MFuser with {vfm} and {vlm} at {given.size}x{given.size}", ""]
    lines += [f"{about_device.name}, torch {torch.__version__}, commit {commit}{' with changes' if dirty else ''}", ""]
    whole = 1e9 * counted_total(subject, "flop")
    lines += [*model_table.table(rows, bench.measured), "", *model_table.floors(rows, bench.measured, rate, whole)]
    if given.stages:
        how = " by CUDA events, waiting for launches included" if device.type == "cuda" else ""
        lines += ["", f"Stages, ms{how}:", "", *model_table.staged(rows, bench.measured)]
    for row in rows:
        for name, trace in bench.measured[row.name].traces.items():
            lines += ["", *model_table.traced(row, name, trace)]
    lines += ["", *(f"- {note}" for note in bench.notes)]
    if earlier is not None:
        lines += ["", *model_table.agreement(bench.measured, earlier)]
    lines += ["", f"This run took {time.perf_counter() - begun:.0f} s."]
    print("\n".join(lines))
    keep(flop=whole)
    return int(bench.failed)


if __name__ == "__main__":
    sys.exit(main())
