"""Time `dgbench eval` end to end on images like Cityscapes', from files to a record, against the model's own rate.

    python benchmarks/end_to_end.py WORK                                  # 500 images, MFuser with DINOv2-L and EVA02-CLIP-L
    python benchmarks/end_to_end.py WORK --mode fast --json fast.json
    python benchmarks/end_to_end.py WORK --run runs/mfuser-...            # a trained run; the same time
    python benchmarks/end_to_end.py WORK --towers tiny --images 6 --side 64 --device cpu   # every path in a minute; means nothing

WORK gets 2048x1024 PNGs in Cityscapes' layout and a run of an untrained model; both are kept for the next call. A few scenes are
rendered and softened, so that a PNG has the size of Cityscapes' own, 2.1 to 2.2 MB, and about their decoding time
(docs/profile.md); the other files are further names of these (hard links). They are read from the system's cache: the disk is
not measured.

The record of an evaluation has the seconds in which the model ran, from the copy to the device to the classes of every pixel,
those in which it waited for images, and those of the confusion matrices. What happens once (compilation, CUDA graphs, workers
that start) is in them, too; so the first few images are scored beforehand, twice, and rates are those of the images beyond them:
the differences of two evaluations with warm caches. `--own-ms` takes the milliseconds of an image from `benchmarks/model.py` as
the model's own rate.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

import mfuser
from dgbench import atomic, streets
from dgbench.data.labels import CLASSES, IGNORE
from dgbench.engine import checkpoints
from dgbench.errors import DgbenchError
from dgbench.recipe import Recipe, dump, load_recipe

SOFTENED = 0.75  # standard deviation in pixels of the blur
TOWERS = {"large": ("dinov2_l", "eva02"), "base": ("dinov2_b", "eva02_b"), "tiny": ("tiny", "tiny")}
BAR = 0.9  # of the model's own rate


# ---- files


def write_files(folder: Path, count: int, unique: int, size: tuple[int, int]) -> None:
    """Write `count` validation images of (H, W) and their labels in Cityscapes' layout, `unique` of them different."""
    images, labels = folder / "leftImg8bit/val/frankfurt", folder / "gtFine/val/frankfurt"
    for each in (images, labels):
        each.mkdir(parents=True)
    ids = np.zeros(256, np.uint8)
    ids[: len(CLASSES)] = [c.label_id for c in CLASSES]
    ids[IGNORE] = 0
    for number in range(count):
        paths = _named(images, labels, number)
        if number >= unique:
            for path, first in zip(paths, _named(images, labels, number % unique), strict=True):
                os.link(first, path)
            continue
        picture, label = streets.render("streets-city", "val", number, size)
        Image.fromarray(softened(picture)).save(paths[0], compress_level=6)
        Image.fromarray(ids[label]).save(paths[1])


def _named(images: Path, labels: Path, number: int) -> tuple[Path, Path]:
    stem = f"frankfurt_000000_{number:06d}"
    return images / f"{stem}_leftImg8bit.png", labels / f"{stem}_gtFine_labelIds.png"


def softened(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a rendered scene as sharp as a photograph: its own noise makes files of 3.5 MB."""
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), SOFTENED), np.uint8)


# ---- the run


def recipe_of(towers: str, side: int, workers: int, batch: int) -> Recipe:
    """Return the recipe of an untrained MFuser that is scored on Cityscapes alone."""
    vfm, vlm = TOWERS[towers]
    settings = [f"method.vfm={vfm}", f"method.vlm={vlm}", f"data.crop=[{side}, {side}]", "data.targets=[cityscapes]"]
    return load_recipe("mfuser/eva02-gta", [*settings, f"train.workers={workers}", f"eval.batch_size={batch}"])


def write_run(folder: Path, recipe: Recipe) -> None:
    """Write a run with random weights, as a training of no steps would leave it."""
    torch.manual_seed(0)
    model = mfuser.build(recipe.method.name, **recipe.method.options, image_size=recipe.data.crop, weights="random")
    folder.mkdir(parents=True)
    dump(recipe, folder / "recipe.yaml")
    checkpoints.save(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.0), folder, 0)


# ---- measuring


def scored(run: Path, root: Path, options: Sequence[str]) -> tuple[dict[str, Any], float]:
    """Return the record of `dgbench eval`, and the seconds that the command took from start to end.

    Raises: DgbenchError with the command's own words if it fails.
    """
    command = [sys.executable, "-m", "dgbench", "eval", str(run), "--targets", "cityscapes", "--root", str(root), *options]
    begun = time.perf_counter()
    done = subprocess.run([*command, "--json", "--quiet"], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begun
    if done.returncode:
        raise DgbenchError(f"{' '.join(command[2:])} failed:\n{done.stderr.strip()}", "run it by hand")
    print(done.stderr, end="", file=sys.stderr, flush=True)  # such as a size without a CUDA graph
    (record,) = json.loads(done.stdout)
    return dict(record), seconds


def summed(record: dict[str, Any], before: dict[str, Any] | None, command: float, own_ms: float | None) -> dict[str, Any]:
    """Return rates in images a second, and shares of the time of scoring, of the images beyond an earlier record's.

    Args:
        before: of fewer images; None: nothing is taken off.    command: seconds of the whole command.
    """
    names = ("data", "model", "metric", "total")
    seconds = {name: record["seconds"][name] - (before["seconds"][name] if before else 0.0) for name in names}
    images = record["n_images"] - (before["n_images"] if before else 0)
    own = 1e3 / own_ms if own_ms else images / seconds["model"]
    rate = images / seconds["total"]
    return {
        "images": images,
        "seconds": seconds,
        "whole": {name: record["seconds"][name] for name in names} | {"command": command},
        "images_per_second": rate,
        "images_per_second_with_start": record["n_images"] / command,
        "own_images_per_second": own,
        "share_of_own_rate": rate / own,
        "waiting": seconds["data"] / seconds["total"],
        "matrices": seconds["metric"] / seconds["total"],
    }


def report(found: dict[str, Any], record: dict[str, Any], about: str) -> Iterator[str]:
    """Yield the lines of the report."""
    yield f"# `dgbench eval` end to end, {about}"
    yield ""
    yield f"{record['variant']}, {record['environment'].get('device', '?')}, protocol {record['protocol']}"
    yield ""
    yield "| images | images/s, end to end | all, with the command's start | the model's own | share of it | waiting for images |"
    yield "| --- " * 6 + "|"
    rates = [found[key] for key in ("images_per_second", "images_per_second_with_start", "own_images_per_second")]
    shares = [found[key] for key in ("share_of_own_rate", "waiting")]
    cells = [str(found["images"]), *(f"{rate:.3g}" for rate in rates), *(f"{share:.1%}" for share in shares)]
    yield f"| {' | '.join(cells)} |"
    yield ""
    bar = "is within" if found["share_of_own_rate"] >= BAR else "misses"
    yield f"This {bar} the bar, {BAR:.0%} of the model's own rate."
    for what, name in (("Seconds of these images", "seconds"), (f"Of all {record['n_images']}", "whole")):
        yield f"{what}: {', '.join(f'{part} {value:.3g}' for part, value in found[name].items())}."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, metavar="WORK", help="folder of files and run")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--unique", type=int, default=8, help="different pictures among them")
    parser.add_argument("--towers", choices=tuple(TOWERS), default="large")
    parser.add_argument("--side", type=int, default=512, help="of the window; images are twice as high and four times as wide")
    parser.add_argument("--run", type=Path, help="a run with a checkpoint, in place of an untrained model")
    parser.add_argument("--workers", type=int, default=8, help="of the untrained run")
    parser.add_argument("--batch", type=int, default=4, help="images at a time, of the untrained run")
    parser.add_argument("--mode", help="as that of dgbench eval")
    parser.add_argument("--protocol", help="as that of dgbench eval")
    parser.add_argument("--device", help="as that of dgbench eval")
    parser.add_argument("--start", type=int, default=12, help="images that are scored beforehand; 0: none")
    parser.add_argument("--own-ms", type=float, help="milliseconds of an image, by benchmarks/model.py")
    parser.add_argument("--json", type=Path, dest="out", help="also write the numbers here")
    given = parser.parse_args(arguments)
    if not 0 <= given.start < given.images:
        parser.error(f"--start {given.start} must be less than --images {given.images}")
    size = (2 * given.side, 4 * given.side)
    unique = min(given.unique, given.images)

    def root_of(count: int) -> Path:
        root = given.work / f"data-{count}-{unique}-{size[0]}x{size[1]}"
        if not root.exists():
            begun = time.perf_counter()
            given.work.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=given.work) as folder:
                write_files(Path(folder) / "root/cityscapes", count, unique, size)
                os.replace(Path(folder) / "root", root)
            print(f"{count} files: {time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)
        return root

    begun, run = time.perf_counter(), given.run
    if run is None:
        run = given.work / f"run-{given.towers}-{given.side}-{given.workers}-{given.batch}"
        if checkpoints.newest(run) is None:
            write_run(run, recipe_of(given.towers, given.side, given.workers, given.batch))
            print(f"run: {time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)
    chosen = {"--mode": given.mode, "--protocol": given.protocol, "--device": given.device}
    options = [word for name, value in chosen.items() if value for word in (name, value)]
    about = f"{size[1]}x{size[0]}, mode {given.mode or 'of the recipe'}"

    def told(count: int) -> tuple[dict[str, Any], float]:
        """Score so many images, say how long it took, and keep what is known: the larger evaluation may fail."""
        root = root_of(count)
        one, whole = scored(run, root, options)
        print(f"{count} images: {whole:.1f} s", file=sys.stderr, flush=True)
        if given.out:
            early = {"about": about, "images": count, "seconds": one["seconds"], "command": whole, "complete": False}
            atomic.write(given.out, json.dumps(early | {"environment": one["environment"]}, indent=1) + "\n")
        return one, whole

    before = None
    for _ in range(2 if given.start else 0):  # the second has what the first has compiled
        before, _ = told(given.start)
    record, command = told(given.images)
    root = root_of(given.images)
    found = summed(record, before, command, given.own_ms)
    files = [path.stat().st_size for path in sorted((root / "cityscapes/leftImg8bit/val/frankfurt").iterdir())[:unique]]
    about = f"{size[1]}x{size[0]}, PNGs of {sum(files) / len(files) / 1e6:.2f} MB, mode {given.mode or 'of the recipe'}"
    print("\n".join(report(found, record, about)))
    if given.out:
        content = found | {"about": about, "environment": record["environment"], "commit": record["commit"]}
        atomic.write(given.out, json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
