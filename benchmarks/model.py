"""Time MFuser at full size, inference and training, against the matrix products and attention of its towers; print Markdown.

    python benchmarks/model.py                       # DINOv2-L with EVA02-CLIP-L at 512x512, two minutes on one GPU
    python benchmarks/model.py --vlm siglip --towers base --stages --json base.json
    python benchmarks/model.py --towers tiny --size 64 --device cpu   # every path in a minute; means nothing

Weights are random, which cost what trained ones do. Each row times its columns in turn, one call of each a round, and has the
median and half the width of the central 90 % of the calls; `--against FILE` compares them with those of an earlier run.

- eager: fp32 weights under bf16 autocast.    exact: fp32, as `dgbench eval` scores by default.
- fast: as `dgbench eval --mode fast` and a training with all speed options run it, if this version has that.
- products: the matrix products and attentions of both image towers alone (`dgbench.cost.products`), of exactly their shapes, in
  bf16, one after the other, replayed as one CUDA graph. Of a training step they are the forward pass's, and those of the
  gradients with regard to inputs from the second block on: the first fuser stands behind the first block, and towers are frozen.
  Fused attention computes its scores again in the backward pass, which is part of its time.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import importlib.util
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import model_table
import torch
from model_table import CROP, EAGER, EXACT, FAST, NAMES, PRODUCTS, ROWS, SLIDE, STEP, Measured, Row
from torch import Tensor

import mfuser
from dgbench import atomic
from dgbench.cost import products
from dgbench.cost.counted import Subject, built
from dgbench.cost.model_times import training_steps
from dgbench.cost.profile import counted_total
from dgbench.cost.stages import Stages, traced
from dgbench.cost.timing import Call, hardware, interleaved, median_ms
from dgbench.engine.device import peak_gib, pick_device
from dgbench.environment import code_commit, describe_environment
from dgbench.errors import DgbenchError
from dgbench.protocol import lookup as protocol
from dgbench.recipe import load_method
from mfuser.inference import windows
from mfuser.segmentor import Batch, Segmentor

PAIRS = {
    "large": {"eva02": ("dinov2_l", "eva02"), "clip": ("dinov2_l", "clip"), "siglip": ("dinov2_l", "siglip")},
    "base": {"eva02": ("dinov2_b", "eva02_b"), "clip": ("dinov2_b", "clip_b"), "siglip": ("dinov2_b", "siglip_b")},
    "tiny": {"eva02": ("tiny", "tiny")},
}
TOGETHER = ("towers", "fusers")  # which are compiled as one
FOR_MS = ("dinov2_l", "eva02")  # the pair whose bars are in ms and GiB, too


@dataclass
class Bench:
    """A pair of towers on a device, and what its calls need."""

    subject: Subject
    device: torch.device
    dtype: torch.dtype
    seconds: float  # for each call of a row
    rounds: int  # at least so many, within four times the seconds
    compiled: bool
    measured: dict[str, Measured] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def whole(self) -> tuple[int, int]:
        """(H, W) of the image under the sliding window: 1024x2048 for crops of 512."""
        return 2 * self.subject.size[0], 4 * self.subject.size[1]

    @property
    def windows(self) -> int:
        """How many of them it takes."""
        rows, columns = windows(self.whole, self.subject.size, protocol("unified").stride_of(self.subject.size))
        return len(rows) * len(columns)

    def crops(self, row: Row) -> int:
        """Return the crops that go through the towers in a call of a row."""
        return self.windows if row.kind == SLIDE else row.images

    def model(self) -> Segmentor:
        """Build it on the device."""
        with torch.device(self.device):
            return built(self.subject).to(self.device).eval()

    def asked(self, row: Row, model: Callable[[Tensor], Tensor], dtype: torch.dtype | None) -> Call:
        """Return an inference call of a row; without a dtype there is no autocast."""
        height, width = self.whole if row.kind == SLIDE else self.subject.size
        images = torch.rand(row.images, 3, height, width, device=self.device)
        stride = protocol("unified").stride_of(self.subject.size)

        def call() -> None:
            with torch.no_grad(), torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
                if row.kind == SLIDE:
                    mfuser.slide(model, images, crop=self.subject.size, stride=stride)
                else:
                    model(images)

        return call

    def peak(self, call: Call, before: float) -> float:
        """Run a call twice, and return the peak GiB of the second above what was there before its model was."""
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        call()
        return peak_gib(self.device) - before

    @contextmanager
    def going_on(self, what: str) -> Iterator[None]:
        """Note an error of what is measured in the block, and go on without it: the rest of a run is worth having."""
        try:
            yield
        except (RuntimeError, ValueError, DgbenchError) as error:
            first = next(iter(str(error).splitlines()), "")
            self.notes.append(f"{what}: {type(error).__name__}: {first}")
            traceback.print_exc()

    def held(self) -> float:
        """Return the GiB that are allocated now; 0 on a CPU, where the peak is the process's."""
        return torch.cuda.memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else 0.0

    def released(self) -> None:
        """Give memory back behind a model that went."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def towers(self, row: Row) -> list[products.Step]:
        """Return the steps of both image towers in a row."""
        model: Any = built(self.subject, weights="meta", backend="torch").to("meta")
        return products.of_towers([model.vfm, model.vlm], self.crops(row), self.subject.size)

    def bare(self, steps: Sequence[products.Step], row: Row) -> Call:
        """Return the products of a row as one call: on a GPU as one graph, so that launches cost nothing."""
        call = products.bare(steps, self.device, self.dtype, training=row.kind == STEP)
        if self.device.type != "cuda":
            return call
        try:
            return graphed(call)
        except RuntimeError as error:
            self.notes.append(f"{row.name}: products were launched one by one, and wait for that; no CUDA graph of them: {error}")
            return call


def graphed(call: Call) -> Call:
    """Capture a call as a CUDA graph, and return its replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay(kept: Call = call) -> None:  # with what it reads
        graph.replay()

    return replay


# ---- the fast path, if there is one


def fast_inference(bench: Bench, model: Segmentor, **chosen: Any) -> Any:
    """Prepare a model as `dgbench eval --mode fast` does; None where this version has no such mode."""
    if importlib.util.find_spec("mfuser.fast") is None:
        bench.notes.append("this version has no fast inference: its column is missing")
        return None
    from mfuser import fast

    return fast.prepare(model, dtype=bench.dtype, compile=bench.compiled, **chosen)


def fast_stages(bench: Bench, model: Segmentor, rows: Sequence[Row]) -> None:
    """Time fast inference part by part, without CUDA graphs, inside of which nothing can be told apart.

    Parts are those that are not compiled as a whole; what is compiled between them counts as one.
    """
    ready = fast_inference(bench, model, graphs=False)
    inner: Any = ready._model  # its parts are where the model's are
    parts = outside(inner, (*TOGETHER, "neck", "texts"))
    stages = Stages(bench.device)
    with stages.watching(parts, then={"mask decoder": "upsampling"}):
        for row in rows:
            call = bench.asked(row, ready, None)
            call()  # compiles
            found = stages.times(call, first=" + ".join((*TOGETHER, "neck")), repeats=bench.rounds)
            bench.measured[row.name].stages[f"{FAST}, no graph"] = found


def eager_training(bench: Bench, model: Segmentor, stages: Stages) -> Callable[[int], Call]:
    """Return the training steps of a recipe without speed options, under autocast."""
    return training_steps(model, bench.subject.size, bench.device, bench.dtype, begins=stages.begin, loaded=as_loaded)


def fast_training(bench: Bench, model: Segmentor, stages: Stages) -> Callable[[int], Call] | None:
    """Return the training steps with `train.frozen` and `train.compile`; None where this version has no such options."""
    if importlib.util.find_spec("dgbench.engine.step") is None:
        bench.notes.append("this version has no fast training: its column is missing")
        return None
    from dgbench.engine import step
    from dgbench.engine.team import join
    from dgbench.launch import launched
    from dgbench.recipe import TrainSpec

    towers: Any = (model.vfm, model.vlm)
    frozen = not any(parameter.requires_grad for tower in towers for parameter in tower.parameters())
    chosen: dict[str, Any] = {"frozen": "bf16" if frozen else None, "compile": "blocks" if bench.compiled else None}
    spec = TrainSpec(steps=1, batch_size=2, precision="bf16", **chosen)
    model.enter_training()
    said = step.prepare(model.train(), spec, join(launched(), bench.device)).said
    bench.notes.append(f"fast training: {said or 'nothing of these towers is frozen, and nothing is compiled'}")
    return eager_training(bench, model, stages)


def as_scored(model: Segmentor) -> Segmentor:
    """Return what `dgbench eval` scores with in exact mode: in versions that do so, class texts are computed once."""
    if importlib.util.find_spec("mfuser.fast") is None:
        return model
    from mfuser.fast import hold_texts

    held = copy.deepcopy(model)
    hold_texts(held)
    return held


def renamed(stages: Mapping[str, float]) -> dict[str, float]:
    """Return the stages of a fast training step by what they hold: towers and fusers are compiled as one, and begin nothing."""
    whole = " + ".join(TOGETHER)
    names = {"forward": whole, "backward of neck": f"backward of neck + {whole}"}
    return {names.get(label, label): ms for label, ms in stages.items()}


def as_loaded(batch: Batch) -> Batch:
    """Add the classes that a batch shows, which a loader finds on the CPU, so that a GPU need not be asked."""
    if "present" not in (known.name for known in dataclasses.fields(Batch)):
        return batch
    from mfuser.decoder.matching import present_classes

    return dataclasses.replace(batch, present=present_classes(batch.labels.cpu(), len(Segmentor.classes)))


# ---- rows


def infer(bench: Bench, rows: Sequence[Row], told: Callable[[str], None], *, staged: bool) -> None:
    """Measure inference, exact rows without autocast."""
    before = bench.held()
    model = bench.model()
    calls: dict[str, dict[str, Call]] = {row.name: {} for row in rows}
    quick, slow = ([row for row in rows if row.exact == exact] for exact in (False, True))
    for row in quick:
        calls[row.name][EAGER] = call = bench.asked(row, model, bench.dtype)
        bench.measured[row.name].gib[EAGER] = bench.peak(call, before)
    told("eager model")
    between = bench.held()
    if slow:
        exact = as_scored(model)
        for row in slow:
            calls[row.name][EXACT] = call = bench.asked(row, exact, None)
            bench.measured[row.name].gib[EXACT] = bench.peak(call, between)
        told("exact model")
        between = bench.held()
    with bench.going_on("the fast model"):
        if quick and (ready := fast_inference(bench, model)) is not None:
            for row in quick:
                call = bench.asked(row, ready, None)
                bench.measured[row.name].gib[FAST] = bench.peak(call, between)
                calls[row.name][FAST] = call
            told("fast model")
    timed(bench, rows, calls, told)
    if staged:
        stages = Stages(bench.device)
        with stages.watching(parts_of(model), then={"mask decoder": "upsampling"}):
            for row in quick:
                bench.measured[row.name].stages[EAGER] = stages.times(
                    calls[row.name][EAGER], first="towers", repeats=bench.rounds
                )
        told("stages")
        if any(FAST in calls[row.name] for row in quick):
            with bench.going_on("stages of the fast model"):
                fast_stages(bench, model, quick)
            told("stages of the fast model")


def train(bench: Bench, rows: Sequence[Row], told: Callable[[str], None], *, staged: bool) -> None:
    """Measure training steps."""
    stages = Stages(bench.device)
    calls: dict[str, dict[str, Call]] = {row.name: {} for row in rows}
    models: dict[str, Segmentor] = {}
    for name in (EAGER, FAST):
        before = bench.held()
        model = bench.model()
        with bench.going_on(f"{name} training"):
            steps = eager_training(bench, model, stages) if name == EAGER else fast_training(bench, model, stages)
            for row in rows if steps is not None else ():
                call = steps(row.images)
                bench.measured[row.name].gib[name] = bench.peak(call, before)
                calls[row.name][name] = call
                models[name] = model
        told(f"{name} training")
    timed(bench, rows, calls, told)
    for name, model in models.items() if staged else ():
        parts = parts_of(model) if name == EAGER else outside(model, TOGETHER)
        with (
            bench.going_on(f"stages of {name} training"),
            stages.watching(parts, then={"mask decoder": "score map"}, backward=True),
        ):
            for row in (row for row in rows if name in calls[row.name]):
                found = stages.times(calls[row.name][name], first="forward", repeats=bench.rounds)
                bench.measured[row.name].stages[name] = found if name == EAGER else renamed(found)
        told(f"stages of {name} training")


def timed(bench: Bench, rows: Sequence[Row], calls: Mapping[str, Mapping[str, Call]], told: Callable[[str], None]) -> None:
    """Time rows one after the other, each with its products, and trace those that miss a bar."""
    for row in rows:
        found, beside = bench.measured[row.name], dict(calls[row.name])
        if not row.exact:
            steps = bench.towers(row)
            found.flop = products.flop(steps, training=row.kind == STEP)
            beside[PRODUCTS] = bench.bare(steps, row)
        found.times = interleaved(beside, bench.device, at_most=bench.seconds, least=bench.rounds, flush=False)
        if not row.exact and (padded := products.aligned(steps)) != steps:
            found.aligned = median_ms(bench.bare(padded, row), bench.device, at_most=0.2, flush=False)
        if found.missed(row):
            found.traces[found.ours] = traced(beside[found.ours], bench.device, calls=min(3, bench.rounds))
        beside.clear()
        bench.released()
        told(row.name)


def parts_of(model: Any) -> dict[str, list[torch.nn.Module]]:
    """Return MFuser's parts by the name of their stage."""
    towers = [tower for tower in (model.vfm, model.vlm) if tower is not None]
    inner = [part for tower in towers for part in (tower.trunk.patch_embed.proj, *tower.trunk.blocks)]
    return {
        "towers": inner,
        "fusers": [*model.adapters, *model.adapter_proj1, *model.adapter_proj2],
        "neck": [model.fpn1, model.fpn2],
        "texts": [model.text],
        "embeddings and MTEnhancer": [model.embedding, *([model.context_decoder] if model.context_decoder else [])],
        "pixel decoder": [model.pixel_decoder],
        "mask decoder": [model.mask_decoder],
        "loss": [model.criterion],
    }


def outside(model: Any, compiled: Sequence[str]) -> dict[str, list[torch.nn.Module]]:
    """Return the parts that are not compiled, or replaced, as a whole: in the others nothing can be told apart."""
    return {label: modules for label, modules in parts_of(model).items() if label not in compiled}


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
    parser.add_argument("--json", type=Path, dest="out", help="also write the numbers here")
    parser.add_argument("--against", type=Path, metavar="JSON", help="compare with an earlier run's numbers")
    given = parser.parse_args(arguments)
    if given.vlm not in PAIRS[given.towers]:
        parser.error(f"--towers {given.towers} has no pair with {given.vlm}; choose from {', '.join(PAIRS[given.towers])}")
    earlier = json.loads(given.against.read_text(encoding="utf-8")) if given.against else None
    begun = last = time.perf_counter()

    def told(what: str) -> None:
        nonlocal last
        now = time.perf_counter()
        print(f"{what}: {now - last:.1f} s", file=sys.stderr, flush=True)
        last = now

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
    told("one large product")
    for measure, kinds in ((infer, (CROP, SLIDE)), (train, (STEP,))):
        if some := [row for row in rows if row.kind in kinds]:
            measure(bench, some, told, staged=given.stages)
            bench.released()
    commit, dirty = code_commit()
    about = {
        "towers": [vfm, vlm],
        "size": given.size,
        "hardware": {key: getattr(about_device, key) for key in about_device.__slots__},
        "environment": describe_environment(about_device.name, torch.get_num_threads()),
        "compiled": bench.compiled,
        "commit": commit,
        "dirty": dirty,
    }
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
    seconds = time.perf_counter() - begun
    lines += ["", f"This run took {seconds:.0f} s."]
    print("\n".join(lines))
    if given.out:
        about |= {"notes": bench.notes, "flop_per_second": rate, "flop": whole, "seconds": seconds}
        content = {**about, "rows": model_table.as_json(bench.measured)}
        atomic.write(given.out, json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
