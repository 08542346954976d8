"""Compare fast and exact mode on one trained run: mIoU of both by `dgbench eval`, pixels that agree, and errors of logits.

    python benchmarks/fast_exact.py runs/streets-mfuser-gpu/...                          # on the recipe's targets
    python benchmarks/fast_exact.py RUN --targets streets-city --images 50 --json out.json
    python benchmarks/fast_exact.py RUN --inputs windows.safetensors                     # stored windows, under `images`

The run is scored twice, and both records stay in its folder, each with its mode. The difference of mIoU is fast less exact with
its 95 % interval over images, by their confusion matrices. Pixels are compared on the first images of each target, as
`dgbench eval` shows them to the model, on the label's grid. Logits are compared on windows: those given, or of each target's
first images; their error is the largest of all, and the L2 norm of the error over that of the exact logits. What fails is named,
costs nothing else, and makes the exit status 1; `--json` has what there is after every part.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from dgbench import atomic, results
from dgbench.data.labels import IGNORE
from dgbench.engine.modes import without_tf32
from dgbench.engine.targets import Target, chosen_targets
from dgbench.engine.tested import Tested, load
from dgbench.errors import DgbenchError
from dgbench.progress import Silent
from dgbench.protocol import CLASS_SETS
from dgbench.protocol import lookup as protocol
from dgbench.recipe import load_recipe
from dgbench.report.statistics import difference
from mfuser.fast import prepare
from mfuser.segmentor import Segmentor

BAR = 0.001  # of mIoU: 0.1 points
WINDOWS = 4  # of each target, for logits


# ---- mIoU


def scored(run: Path, mode: str, options: Sequence[str]) -> dict[str, results.Record]:
    """Score a run by `dgbench eval` in a mode, and return its records by target.

    Raises: DgbenchError with the command's own words if it fails.
    """
    command = [sys.executable, "-m", "dgbench", "eval", str(run), "--mode", mode, *options]
    done = subprocess.run([*command, "--json", "--quiet"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise DgbenchError(f"{' '.join(command[2:])} failed:\n{done.stderr.strip()}", "run it by hand")
    print(done.stderr, end="", file=sys.stderr, flush=True)  # such as a size without a CUDA graph
    new = {record["id"] for record in json.loads(done.stdout)}
    return {record.target: record for record in results.query(run) if record.id in new}


def scores(exact: results.Record, fast: results.Record) -> dict[str, Any]:
    """Return both scores of a target and their difference, as fractions."""
    rules = protocol(exact.protocol)
    a, b = results.paired(exact, fast)
    found = difference([a], [b], classes=CLASS_SETS[rules.classes], absent=rules.absent_classes)
    classes = [abs(one - two) for one, two in zip(exact.iou, fast.iou, strict=True) if one is not None and two is not None]
    return {
        "exact": exact.miou,
        "fast": fast.miou,
        "difference": found.value,
        "low": found.low,
        "high": found.high,
        "largest_of_a_class": max(classes, default=0.0),
        "exact_images_per_second": exact.n_images / exact.seconds["total"] if exact.seconds.get("total") else None,
        "fast_images_per_second": fast.n_images / fast.seconds["total"] if fast.seconds.get("total") else None,
    }


# ---- pixels and logits


def pixels(exact: Tested, fast: Tested, target: Target, count: int) -> dict[str, Any]:
    """Return the shares of pixels of a target's first images that both give the same class."""
    dataset, same, labelled, total, known = target.dataset, 0, 0, 0, 0
    halved = dataset.found is not None and dataset.found.layout.halved
    for i in range(min(count, len(dataset))):
        sample = dataset[i]
        one, other = (each.segment(sample.image, dataset.domain, sample.label.shape, halved=halved) for each in (exact, fast))
        equal, counts = one == other, sample.label != IGNORE
        same, total = same + int(equal.sum()), total + equal.size
        labelled, known = labelled + int(equal[counts].sum()), known + int(counts.sum())
    return {"images": min(count, len(dataset)), "agree": same / total, "agree_labelled": labelled / known if known else None}


def first_windows(target: Target, crop: tuple[int, int], count: int) -> Tensor:
    """Return windows (count, 3, *crop) in [0, 1] from the middle of a target's first images, which are padded with black."""
    found = []
    for i in range(min(count, len(target.dataset))):
        image = target.dataset[i].image
        top, left = (max(0, (side - window) // 2) for side, window in zip(image.shape[:2], crop, strict=True))
        part = image[top : top + crop[0], left : left + crop[1]]
        window = np.zeros((*crop, 3), np.float32)
        window[: part.shape[0], : part.shape[1]] = part / np.float32(255)
        found.append(torch.from_numpy(window).permute(2, 0, 1))
    return torch.stack(found)


def logits(exact: Segmentor, fast: Any, windows: Tensor, device: torch.device) -> dict[str, dict[str, float]]:
    """Return the errors of logits by their name; of a method without masks, those of its scores alone."""
    errors: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        for window in windows.to(device).split(1):
            for name, ask in _asked(exact).items():
                with without_tf32(exact):
                    known = ask(exact, window).double()
                new = ask(fast, window).double()
                own = errors.setdefault(name, {"largest": 0.0, "of": 0.0, "error": 0.0, "norm": 0.0})
                own["largest"] = max(own["largest"], float((new - known).abs().max()))
                own["of"] = max(own["of"], float(known.abs().max()))
                own["error"] += float((new - known).square().sum())
                own["norm"] += float(known.square().sum())
    return {
        name: {"largest": e["largest"], "of": e["of"], "relative": (e["error"] / e["norm"]) ** 0.5 if e["norm"] else 0.0}
        for name, e in errors.items()
    }


def _asked(model: Segmentor) -> dict[str, Callable[[Any, Tensor], Tensor]]:
    named: dict[str, Callable[[Any, Tensor], Tensor]] = {"scores": lambda asked, window: asked(window)}
    if type(model).masks is not Segmentor.masks:
        named |= {"class logits": lambda asked, w: asked.masks(w)[0], "mask logits": lambda asked, w: asked.masks(w)[1]}
    return named


# ---- the report


def report(run: Path, found: dict[str, dict[str, Any]], device: str) -> Iterator[str]:
    """Yield the lines of the report."""
    yield f"# Fast against exact mode: {run.name}, {device}"
    yield ""
    of_scores = "mIoU, exact | fast | difference, points (95 % interval) | largest of a class"
    yield f"| target | {of_scores} | pixels that agree | labelled ones |"
    yield "| --- " * 7 + "|"
    for target, each in found.items():
        cells = ["–"] * 6
        if s := each.get("scores"):
            points = [f"{100 * s[key]:+.3f}" for key in ("difference", "low", "high")]
            cells[:3] = [f"{100 * s['exact']:.2f}", f"{100 * s['fast']:.2f}", f"{points[0]} ({points[1]} to {points[2]})"]
            cells[3] = f"{100 * s['largest_of_a_class']:.3f}"
        if p := each.get("pixels"):
            cells[4:] = [f"{p[key]:.4%}" if p[key] is not None else "–" for key in ("agree", "agree_labelled")]
        yield f"| {target} | {' | '.join(cells)} |"
    yield ""
    yield "| target | logits | largest error | of values up to | relative error (L2) |"
    yield "| --- " * 5 + "|"
    for target, each in found.items():
        for name, error in each.get("logits", {}).items():
            yield f"| {target} | {name} | {error['largest']:.3g} | {error['of']:.3g} | {error['relative']:.3g} |"
    yield ""
    differences = [abs(each["scores"]["difference"]) for each in found.values() if "scores" in each]
    if not differences:
        yield "There is no difference of mIoU: a mode was not scored."
        return
    worst = max(differences)
    yield f"The largest difference, {100 * worst:.3f} points, {'is within' if worst <= BAR else 'misses'} the bar, {100 * BAR:g}."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a trained run")
    parser.add_argument("--targets", nargs="+", help="default: the recipe's")
    parser.add_argument("--root", type=Path, help="as that of dgbench eval")
    parser.add_argument("--device", help="as that of dgbench eval")
    parser.add_argument("--images", type=int, default=50, help="of each target, for pixels")
    parser.add_argument("--inputs", type=Path, metavar="SAFETENSORS", help="windows (n, 3, H, W) in [0, 1] under `images`")
    parser.add_argument("--no-compile", action="store_true", help="of the fast mode")
    parser.add_argument("--json", type=Path, dest="out", help="also write the numbers here")
    given = parser.parse_args(arguments)
    recipe = load_recipe(str(given.run / "recipe.yaml"), root=given.root)
    rows = recipe.data.rows(given.targets or recipe.data.targets, given.root)
    options = ["--targets", *(row.name for row in rows)]
    options += [word for name in ("root", "device") if getattr(given, name) for word in (f"--{name}", str(getattr(given, name)))]
    found: dict[str, dict[str, Any]] = {row.name: {} for row in rows}
    about: dict[str, Any] = {}
    errors: list[str] = []

    def tell(what: str) -> None:
        print(f"{what}: {time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)
        if given.out:
            atomic.write(given.out, json.dumps({"targets": found, **about, "errors": errors}, indent=1) + "\n")

    @contextmanager
    def going_on(what: str) -> Iterator[None]:
        # what else there is to compare is worth having
        try:
            yield
        except Exception as error:
            errors.append(f"{what}: {type(error).__name__}: {error}")
            traceback.print_exc()
        tell(what)

    begun, records = time.perf_counter(), dict[str, dict[str, results.Record]]()
    for mode, more in (("exact", []), ("fast", ["--no-compile"] if given.no_compile else [])):
        with going_on(f"dgbench eval, {mode}"):
            records[mode] = scored(given.run, mode, [*options, *more])
            one = next(iter(records[mode].values()))
            about |= {"environment": one.environment, "commit": one.commit, "checkpoint": one.checkpoint}
    (exact,) = load([given.run], device=given.device, root=given.root, mode_name="exact")
    fast = dataclasses.replace(exact, model=prepare(exact.model, compile=not given.no_compile))
    for target in chosen_targets(recipe, exact.rules, [(row, None) for row in rows], given.root, None):
        target.dataset.prepare(Silent())
        own = found[target.name]
        if len(records) == 2:
            own["scores"] = scores(*(records[mode][target.name] for mode in ("exact", "fast")))
        with going_on(f"logits of {target.name}"):
            size = exact.model.image_size
            windows = load_file(given.inputs)["images"].float() if given.inputs else first_windows(target, size, WINDOWS)
            own["logits"] = logits(exact.model, fast.model, windows, exact.device)
        with going_on(f"pixels of {target.name}"):
            own["pixels"] = pixels(exact, fast, target, given.images)
    errors += [f"no CUDA graph of {what}: {why}" for what, why in getattr(fast.model, "uncaptured", {}).items()]
    tell("all")
    print("\n".join([*report(given.run, found, about.get("environment", {}).get("device", "?")), *(f"- {e}" for e in errors)]))
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main())
