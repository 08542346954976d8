"""Time a full-size training step of MFuser, with the options of docs/training.md added one by one, and say where it goes.

    python benchmarks/step.py                              # batches of 2 and 8 on a GPU: some 120 s, most of it compiling
    python benchmarks/step.py --batch 2 --options frozen compile
    python benchmarks/step.py --batch 2 --options frozen compile --align 0   # the same with MLPs as wide as they are
    python benchmarks/step.py --towers tiny --size 64 --device cpu --batch 2 --options frozen   # every path; means nothing

A step is that of `dgbench train` (the same functions) under bf16 autocast, on noise with ten classes in each image; towers have
random weights. Rows are medians over the steps with the lowest and the highest, and the peak of allocated memory; then, for
the last row, the kernels that take the most time, and how often the host waits for the device or copies from it. Rows are printed
as they come.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mfuser
from dgbench import atomic
from dgbench.data.places import cache_root
from dgbench.engine import step
from dgbench.engine.device import accelerator_on, device_name, pick_device
from dgbench.engine.optim import optimizer_of
from dgbench.engine.parallel import Loss, prepared
from dgbench.engine.team import ALONE
from dgbench.recipe import OptimSpec, TrainSpec
from mfuser import blocks, fast, training_graphs
from mfuser.decoder.matching import present_classes
from mfuser.segmentor import Batch, Segmentor

OPTIONS = ("frozen", "compile", "graphs", "checkpoint")
TOWERS = {"large": {"vfm": "dinov2_l", "vlm": "eva02"}, "tiny": {"vfm": "tiny", "vlm": "tiny"}}
CLASSES = 10  # in an image, as in a crop of a street
WAITS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "Memcpy DtoH",
    "Memcpy HtoD",
    "cudaLaunchKernel",
    "cudaGraphLaunch",
)


@dataclass(frozen=True)
class Row:
    """One measurement: milliseconds of a step, GiB at its peak, seconds of the first step."""

    batch: int
    options: str
    ms: float
    lowest: float
    highest: float
    gib: float
    first: float

    def line(self) -> str:
        """Return the row of the table."""
        ms = f"{self.ms:.1f} ({self.lowest:.1f} to {self.highest:.1f})"
        return f"| {self.batch} | {self.options} | {ms} | {self.gib:.2f} | {self.first:.1f} |"


def noise(model: Segmentor, images: int, device: torch.device) -> Batch:
    """Return a batch of noise whose labels are squares of some classes in each image."""
    height, width = model.image_size
    classes = torch.stack([torch.randperm(len(model.classes))[:CLASSES] for _ in range(images)])
    cells = torch.randint(CLASSES, (images, (height // 32 + 1) * (width // 32 + 1)))
    coarse = classes.gather(1, cells).view(images, height // 32 + 1, width // 32 + 1)
    labels = coarse.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, :height, :width].contiguous()
    pixels = torch.rand(images, 3, height, width).to(device, memory_format=torch.channels_last)
    return Batch(pixels, labels.to(device), present=present_classes(labels, len(model.classes)))


class Training:
    """A model in training and what a step of it needs; options are added to it in place."""

    def __init__(self, model: Segmentor, device: torch.device, clip: float | None, align: int | None = None) -> None:
        self.model, self.device, self.clip, self.align = model, device, clip, align
        self.graphs: training_graphs.TrainingGraphs | None = None
        self.spec = TrainSpec(steps=1, batch_size=1, precision="bf16")
        self.accelerator = accelerator_on(device, "bf16")
        optimizer, _ = optimizer_of(model, OptimSpec(lr=1e-6))
        model.to(memory_format=torch.channels_last)
        self.loss_of, self.optimizer = prepared(self.accelerator, Loss(model), optimizer)

    def add(self, option: str) -> None:
        """Add an option of OPTIONS."""
        if option == "frozen":
            self.frozen = blocks.FrozenWeights(self.model, align=self.align)
        elif option == "compile":
            fast.keep_in(cache_root() / "compiled")
            blocks.compile_blocks(self.model)
        elif option == "graphs":
            self.graphs = training_graphs.capture(self.model)
        else:
            blocks.recompute_blocks(self.model)

    def step(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Take a step, and return loss and terms on the device."""
        found = step.gradients(self.accelerator, self.loss_of, self.model, batch, spec=self.spec, team=ALONE, seed=0)
        if self.clip is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return found


def wait(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object], device: torch.device, steps: int) -> tuple[list[float], float]:
    """Return milliseconds of so many calls, and the seconds of the first one, which is not among them."""
    begun = time.perf_counter()
    call()
    wait(device)
    first = time.perf_counter() - begun
    for _ in range(2):
        call()
    found = []
    for _ in range(steps):
        wait(device)
        begun = time.perf_counter()
        call()
        wait(device)
        found.append(1e3 * (time.perf_counter() - begun))
    return found, first


def measured(training: Training, batch: Batch, options: str, steps: int) -> Row:
    """Measure one row."""
    device = training.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    ms, first = timed(partial(training.step, batch), device, steps)
    peak = step.Speed(None, 0, "", training.graphs).peak_gib(device)
    return Row(len(batch.images), options, statistics.median(ms), min(ms), max(ms), peak, first)


def profiled(call: Callable[[], object], device: torch.device, rows: int) -> str:
    """Return the operators and kernels that take the most time in a call, and how often the host waits."""
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        wait(device)
    averages = profile.key_averages()

    def own(event: Any) -> float:
        return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3

    of_device = [e for e in averages if not on_gpu or str(e.device_type).endswith("CUDA")]
    total = sum(map(own, of_device))
    lines = [
        f"{total:.1f} ms of {'kernels' if on_gpu else 'operators'} in a step.",
        "",
        "| ms | share | calls | name |",
        "| --- | --- | --- | --- |",
    ]
    for event in sorted(of_device, key=own, reverse=True)[:rows]:
        share = 100 * own(event) / total if total else 0.0
        lines.append(f"| {own(event):.2f} | {share:.1f} % | {event.count} | `{event.key[:110]}` |")
    counts = {name: sum(e.count for e in averages if e.key.startswith(name)) for name in WAITS}
    return "\n".join([*lines, "", "Calls in a step: " + ", ".join(f"{name} {count}" for name, count in counts.items())])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 8])
    parser.add_argument(
        "--options", nargs="*", choices=OPTIONS, help="added one by one; default: frozen compile, and on a GPU graphs"
    )
    parser.add_argument("--towers", choices=TOWERS, default="large")
    parser.add_argument("--size", type=int, default=512, help="side of the images")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a row")
    parser.add_argument("--clip", type=float, help="as train.clip_norm")
    parser.add_argument("--align", type=int, help="frozen MLPs are padded to its multiples; 0: none; default: as in a training")
    parser.add_argument("--rows", type=int, default=15, help="of the profile")
    parser.add_argument("--device")
    parser.add_argument("--json", type=Path, help="a file for the rows")
    given = parser.parse_args(arguments)
    device = pick_device(given.device)
    if given.options is None:
        given.options = ["frozen", "compile", *(["graphs"] if device.type == "cuda" else [])]
    if given.align is not None and (given.align < 0 or given.align % 8):
        parser.error(f"--align {given.align}: products are slow at widths that are no multiples of 8; use 64, or 0 for none")
    for option in ("compile", "graphs"):
        if {option, "checkpoint"} <= set(given.options):
            parser.error(f"--options {option} and checkpoint do not go together: measure one after the other")
    if "graphs" in given.options and device.type != "cuda":
        parser.error("--options graphs: CUDA graphs need a GPU; leave it out")
    torch.manual_seed(0)
    model = mfuser.build(
        "mfuser", **TOWERS[given.towers], image_size=(given.size, given.size), freeze_towers=True, weights="random"
    )
    model.enter_training()
    training = Training(model.train(), device, given.clip, given.align)
    batches = {images: noise(model, images, device) for images in given.batch}
    print(
        f"{device_name(device)}, torch {torch.__version__}, MFuser with {given.towers} towers, {given.size}x{given.size}, bf16\n"
    )
    print("| batch | options | step, ms | GiB | first step, s |\n| --- | --- | --- | --- | --- |", flush=True)
    found = []
    for number in range(len(given.options) + 1):
        if number:
            training.add(given.options[number - 1])
        options = " + ".join(["bf16", *given.options[:number]])
        for batch in batches.values():
            found.append(measured(training, batch, options, given.steps))
            print(found[-1].line(), flush=True)
    for images, batch in batches.items():
        training.step(batch)  # graphs are kept for the shape that came last
        where = profiled(partial(training.step, batch), device, given.rows)
        print(f"\n## Batch {images}, {options}\n\n{where}", flush=True)
    if given.json is not None:
        about = {"device": device_name(device), "torch": torch.__version__, "towers": given.towers, "size": given.size}
        atomic.write(given.json, json.dumps({"about": about, "rows": [asdict(row) for row in found]}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
