"""Trace how long the steps of a full-size training wait for their batches; print Markdown.

    python benchmarks/loader_trace.py WORK --device cuda            # 200 steps of MFuser on 8 images each, with 8 workers
    python benchmarks/loader_trace.py WORK --step-ms 170            # the loader alone, against steps that take so long
    python benchmarks/loader_trace.py WORK --towers tiny --side 64 --steps 6 --files 4 --workers 0 --device cpu   # means nothing

WORK gets `data-...`, scenes of `streets-game` in GTA5's layout, twice as wide as high (2048x1024 for crops of 512), by
`dgbench data export`; they are kept for the next call. Batches are those of the recipe `mfuser/eva02-gta` as `dgbench train`
loads them: rare-class sampling, scaling, distortion. Every step ends by waiting for the GPU, so that all time in which the loader
keeps it idle is seen; `dgbench train` does not wait, and hides more. The first steps, in which workers start, are told apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import mfuser
from dgbench import atomic
from dgbench.data.export import export
from dgbench.data.union import sources
from dgbench.engine import batches
from dgbench.engine.device import device_name, pick_device
from dgbench.errors import DgbenchError
from dgbench.progress import Silent
from dgbench.recipe import Recipe, load_recipe
from dgbench.resources import usable_cores
from mfuser.segmentor import Batch, Segmentor

TOWERS = {"large": ("dinov2_l", "eva02"), "base": ("dinov2_b", "eva02_b"), "tiny": ("tiny", "tiny")}
BAR = 0.02  # of the time may be waited


def recipe_of(towers: str, side: int, steps: int, batch: int, workers: int) -> Recipe:
    """Return the recipe of MFuser's training on GTA5."""
    vfm, vlm = TOWERS[towers]
    settings = [f"method.vfm={vfm}", f"method.vlm={vlm}", f"data.crop=[{side}, {side}]", "data.targets=[cityscapes]"]
    return load_recipe(
        "mfuser/eva02-gta",
        [*settings, f"train.steps={steps}", f"train.batch_size={batch}", f"train.workers={workers}"],
    )


def write_files(root: Path, count: int, size: tuple[int, int]) -> None:
    """Export scenes of (H, W) as GTA5's training split."""
    export("streets-game", "gta5", root, n=count, splits=("train",), size=size)


@dataclass(frozen=True)
class Step:
    """Milliseconds that a step waited for its batch, and that it then took."""

    waited: float
    took: float


def trace(loader: Iterator[batches.Samples], work: Callable[[batches.Samples, int], object]) -> Iterator[Step]:
    """Run every batch of a loader through `work`, and yield the times of each step."""
    mark = time.perf_counter()
    for number, samples in enumerate(loader):
        there = time.perf_counter()
        work(samples, number)
        done = time.perf_counter()
        yield Step(1e3 * (there - mark), 1e3 * (done - there))
        mark = time.perf_counter()


def kept(steps: Iterator[Step]) -> tuple[list[Step], str]:
    """Return the steps, and what stopped them, "" for nothing: those before an error are worth having."""
    found: list[Step] = []
    try:
        for step in steps:
            found.append(step)
    except Exception as error:
        if not found:
            raise
        traceback.print_exc()
        return found, f"stopped behind {len(found)} steps: {type(error).__name__}: {error}"
    return found, ""


def training(model: Segmentor, device: torch.device, steps: int) -> Callable[[batches.Samples, int], object]:
    """Return what trains a model by a batch as `dgbench train` does, and waits for the device."""
    model.enter_training()
    model.train().to(device)
    optimizer = torch.optim.AdamW(model.groups(1e-5, 0.0), fused=True)

    def work(samples: batches.Samples, step: int) -> None:
        batch: Batch = batches.batch_of(samples, device, step, steps)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = torch.stack(list(model.loss(batch).values())).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return work


def sleeping(ms: float, device: torch.device, steps: int) -> Callable[[batches.Samples, int], object]:
    """Return a step that takes so many milliseconds, the copy to the device included."""

    def work(samples: batches.Samples, step: int) -> None:
        begun = time.perf_counter()
        batches.batch_of(samples, device, step, steps)
        time.sleep(max(0.0, ms / 1e3 - (time.perf_counter() - begun)))

    return work


def report(found: Sequence[Step], first: int, images: int, about: str) -> Iterator[str]:
    """Yield the lines of the report."""
    later = found[first:] or found
    waited, took = (sum(getattr(step, name) for step in later) for name in ("waited", "took"))
    share = waited / (waited + took)
    longest = sorted((step.waited for step in later), reverse=True)
    yield f"# Waiting for batches, {about}"
    yield ""
    yield "| steps | images/s | step, ms | waited, ms a step | share of the time | longest waits, ms |"
    yield "| --- " * 6 + "|"
    rate = 1e3 * images * len(later) / (waited + took)
    cells = [str(len(later)), f"{rate:.1f}", f"{statistics.median(step.took for step in later):.1f}"]
    cells += [f"{waited / len(later):.2f}", f"{share:.2%}", ", ".join(f"{ms:.0f}" for ms in longest[:3])]
    yield f"| {' | '.join(cells)} |"
    yield ""
    yield f"This {'is within' if share <= BAR else 'misses'} the bar, {BAR:.0%} of the time."
    if first and len(found) > first:
        yield f"The first {first} steps waited {sum(step.waited for step in found[:first]):.0f} ms, in which workers start."


def share_waited(found: Sequence[Step], first: int) -> float:
    """Return the share of the time that was waited, the first steps left out."""
    later = found[first:] or found
    waited = sum(step.waited for step in later)
    return waited / (waited + sum(step.took for step in later))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, metavar="WORK", help="folder of the files")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--files", type=int, default=24, help="scenes to export")
    parser.add_argument("--towers", choices=tuple(TOWERS), default="large")
    parser.add_argument("--side", type=int, default=512, help="of the crops")
    parser.add_argument("--first", type=int, default=5, help="steps that are told apart")
    parser.add_argument("--step-ms", type=float, help="no model: steps that take so long")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--json", type=Path, dest="out", help="also write every step's times here")
    given = parser.parse_args(arguments)
    if given.workers > (cores := usable_cores()):
        raise DgbenchError(f"--workers {given.workers} are more than the {cores} usable cores", f"use at most {cores}")
    device = pick_device(given.device)
    size = (2 * given.side, 4 * given.side)
    root = given.work / f"data-{given.files}-{size[0]}x{size[1]}"
    begun = time.perf_counter()
    if not (root / "gta5").exists():
        write_files(root, given.files, size)
        print(f"files: {time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)
    recipe = recipe_of(given.towers, given.side, given.steps, given.batch, given.workers)
    dataset = sources(recipe.data, root)
    dataset.prepare(Silent())
    place = batches.Place(0, 1, device)
    if given.step_ms is not None:
        work, what = sleeping(given.step_ms, device, given.steps), f"steps of {given.step_ms:g} ms"
    else:
        with torch.device(device):
            options = recipe.method.options
            model = mfuser.build(recipe.method.name, **options, image_size=recipe.data.crop, weights="random")
        work, what = training(model, device, given.steps), f"{recipe.variant} on {device_name(device)}"
    loader = batches.of_steps(recipe, dataset, (), 0, place, Silent())
    found, error = kept(trace(iter(loader), work))
    files = [path.stat().st_size for path in sorted((root / "gta5/images").glob("*.png"))]
    about = f"{what}, {given.batch} images of {given.side}x{given.side} a step, {given.workers} workers, "
    about += f"{len(files)} PNGs of {size[1]}x{size[0]} and {sum(files) / len(files) / 1e6:.1f} MB"
    print("\n".join([*report(found, given.first, given.batch, about), *([error] if error else [])]))
    if given.out:
        content = {
            "about": about,
            "error": error,
            "share": share_waited(found, given.first),
            "waited_ms": [round(step.waited, 3) for step in found],
            "took_ms": [round(step.took, 3) for step in found],
        }
        atomic.write(given.out, json.dumps(content, indent=1) + "\n")
    return int(bool(error))


if __name__ == "__main__":
    sys.exit(main())
