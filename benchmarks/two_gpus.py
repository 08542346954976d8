"""Measure training and evaluation on one and on two GPUs by `dgbench` itself, and how two end; writes scale.md and scale.json.

    python benchmarks/two_gpus.py OUT                                # all parts, about twelve minutes
    python benchmarks/two_gpus.py OUT --parts ends                   # one; the table is that of all parts measured so far
    python benchmarks/two_gpus.py OUT --parts train --batches 8 16   # global batches; --options without a word: eager
    python benchmarks/two_gpus.py OUT --device cpu --tiny            # every path in minutes; means nothing

- train: MFuser from random towers on `streets-game`, by global batch; images a second behind the first ten steps, in which
  blocks are compiled and graphs captured, and the losses. One GPU and two have the same options, by default all.
- eval: images of 2048x1024 of two domains, scored once by one process, once by two; the matrices must be equal to the last bit.
- ends: a process is killed, or the launcher is told to end; how long until no process and no GPU memory of theirs is left, and
  how far the resumed run's weights lie from those of a run that nothing ended, and how far two such runs lie from each other.

What `--device cuda` runs on one GPU runs on both at a time, a batch size each.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from queue import SimpleQueue
from statistics import fmean
from typing import Any

import numpy as np
import psutil
import torch
from safetensors.torch import load_file

import mfuser
from dgbench import atomic, results
from dgbench.environment import code_commit, describe_environment
from dgbench.recipe import load_recipe

RECIPE = "mfuser/eva02-gta"
DOMAINS = ("streets-city", "streets-world")
OPTIONS = {"frozen": "train.frozen=bf16", "compile": "train.compile=blocks", "graphs": "train.graphs=true"}
BARS = {"train": 1.85, "eval": 1.9, "seconds": 30.0}


class Bench:
    """What is measured on, and where it is kept."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.out = given, given.out
        self.work: Path = given.work or given.out / "work"
        self.tiny: bool = given.tiny
        self.cuda = given.device == "cuda"
        self.options: list[str] = list(OPTIONS if self.cuda else ()) if given.options is None else given.options

    def towers(self, large: tuple[str, str]) -> tuple[str, str]:
        return ("tiny", "tiny") if self.tiny else large

    def begin(self, towers: tuple[str, str], side: int) -> Path:
        """Return a folder with a model of random towers, from which runs start."""
        folder = self.work / f"{towers[0]}-random"
        if not folder.exists():
            torch.manual_seed(0)
            options = load_recipe(RECIPE, (f"method.vfm={towers[0]}", f"method.vlm={towers[1]}")).method.options
            model = mfuser.build("mfuser", **options, image_size=(side, side), weights="random")
            mfuser.save(model, folder)
        return folder

    def command(self, *words: str, gpus: int, at: int = 0) -> list[str]:
        """Return a `dgbench` command on so many GPUs; `at` is the first one."""
        local = [] if self.cuda or words[0] == "eval" else ["--local-batchnorm"]
        on = ["--gpus", str(gpus), *local] if gpus > 1 else []
        device = [] if self.cuda and gpus > 1 else ["--device", f"cuda:{at}" if self.cuda else "cpu"]
        return [sys.executable, "-m", "dgbench", *words, *on, *device, "--quiet"]


def run(command: Sequence[str]) -> None:
    """Run a command to its end. Raises: SystemExit with what it said if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: ended with {done.returncode}\n{done.stderr[-2000:]}")


def lines(path: Path) -> list[dict[str, float]]:
    """Return the objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(bench: Bench) -> list[dict[str, Any]]:
    """Return what was measured of each batch size."""
    side, every = (64, 2) if bench.tiny else (512, 10)
    steps = 6 if bench.tiny else bench.given.steps
    towers = bench.towers(("dinov2_l", "eva02"))
    init = bench.begin(towers, side)
    batches = bench.given.batches or ((2, 4) if bench.tiny else (8, 16))
    precision = "bf16" if bench.cuda or "frozen" in bench.options else "no"
    free: SimpleQueue[int] = SimpleQueue()  # GPUs
    for at in range(2):
        free.put(at)

    def one(batch: int, gpus: int, at: int) -> Path:
        folder = bench.work / f"train-{batch}-{gpus}"
        shutil.rmtree(folder, ignore_errors=True)
        recipe = {
            "method.vfm": towers[0],
            "method.vlm": towers[1],
            "method.freeze_towers": "true",
            "data.size": f"[{side},{2 * side}]",
            "data.crop": f"[{side},{side}]",
            "data.train_images": 400 if not bench.tiny else 8,
            "train.init": init,
            "train.steps": steps,
            "train.batch_size": batch,
            "train.workers": 0 if bench.tiny else 12 // gpus,
            "train.log_every": every,
            "train.checkpoint_every": steps,
            "train.precision": precision,
        }
        items = [*(f"{key}={value}" for key, value in recipe.items()), *(OPTIONS[option] for option in bench.options)]
        told = [word for item in items for word in ("--set", item)]
        words = ("train", RECIPE, "--source", "streets-game", "--targets", "streets-city", "--no-eval")
        run(bench.command(*words, "--out", str(folder), *told, gpus=gpus, at=at))
        for old in (folder / "checkpoint").iterdir():  # gigabytes that nobody asks for again
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        return folder

    def alone_on_one(batch: int) -> Path:
        at = free.get()
        try:
            return one(batch, 1, at)
        finally:
            free.put(at)

    with ThreadPoolExecutor(2) as pool:
        alone = list(pool.map(alone_on_one, batches))
    found = []
    for batch, single in zip(batches, alone, strict=True):
        both = one(batch, 2, 0)
        speed = [[line for line in lines(path / "speed.jsonl") if line["step"] > every] for path in (single, both)]
        rate = [fmean(line["images_per_second"] for line in of) for of in speed]
        logs = [lines(path / "log.jsonl") for path in (single, both)]
        found.append(
            {
                "batch": batch,
                "precision": precision,
                "options": bench.options,
                "images_per_second": rate,
                "factor": rate[1] / rate[0],
                "peak_gib": [max(line["peak_gib"] for line in of) for of in speed],
                "waiting_for_data": [fmean(line["waiting_for_data"] for line in of) for of in speed],
                "waiting_for_others": fmean(line["waiting_for_others"] for line in speed[1]),
                "losses": [[line["loss"] for line in log] for log in logs],
                "furthest": max(abs(b["loss"] / a["loss"] - 1) for a, b in zip(*logs, strict=True)),
            }
        )
        print(found[-1], file=sys.stderr, flush=True)
    return found


def evaluate(bench: Bench) -> dict[str, Any]:
    """Return seconds of scoring by one process and by two, and whether all matrices are equal."""
    side, images = (64, 3) if bench.tiny else (512, bench.given.images // len(DOMAINS))
    towers = bench.towers(("dinov2_b", "eva02_b"))
    init, folder = bench.begin(towers, side), bench.work / "eval"
    shutil.rmtree(folder, ignore_errors=True)
    recipe = {
        "method.vfm": towers[0],
        "method.vlm": towers[1],
        "data.size": f"[{2 * side},{4 * side}]",
        "data.crop": f"[{side},{side}]",
        "data.train_images": 4,
        "data.val_images": images,
        "train.init": init,
        "train.steps": 1,
        "train.batch_size": 2,
        "train.workers": 0 if bench.tiny else 6,
        "eval.batch_size": 1 if bench.tiny else 2,  # whole batches are dealt out: of 25, one process would have 13
    }
    told = [word for key, value in recipe.items() for word in ("--set", f"{key}={value}")]
    words = ("train", RECIPE, "--source", "streets-game", "--targets", *DOMAINS, "--no-eval")
    run(bench.command(*words, "--out", str(folder), *told, gpus=1))
    for gpus in (1, 2):
        run(bench.command("eval", str(folder), "--targets", *DOMAINS, gpus=gpus))
    records = sorted((r for r in results.query(folder) if r.kind == "eval"), key=lambda record: record.created)
    pairs = [[record for record in records if record.target == domain] for domain in DOMAINS]
    seconds = [sum(float(pair[i].seconds["total"] or "nan") for pair in pairs) for i in range(2)]
    return {
        "images": len(DOMAINS) * images,
        "size": [2 * side, 4 * side],
        "towers": list(towers),
        "images_per_second": [len(DOMAINS) * images / each for each in seconds],
        "factor": seconds[0] / seconds[1],
        "equal": all(np.array_equal(*results.paired(*pair)) for pair in pairs),
    }


def ends(bench: Bench) -> dict[str, Any]:
    """Return how a killed process and an ended launcher are survived."""
    steps, every = (12, 4) if bench.tiny else (60, 20)
    small = ("data.train_images=16", "data.val_images=4", "train.log_every=1", f"train.steps={steps}")
    told = [word for item in (*small, f"train.checkpoint_every={every}") for word in ("--set", item)]

    def begun(name: str) -> tuple[Path, list[str]]:
        folder = bench.work / name
        shutil.rmtree(folder, ignore_errors=True)
        return folder, bench.command("train", "streets/mfuser", "--no-eval", "--out", str(folder), *told, gpus=2)

    whole = []
    for name in ("whole", "again"):
        folder, command = begun(name)
        run(command)
        whole.append(folder)

    def interrupted(name: str, stop: Callable[[psutil.Process, psutil.Process], None]) -> dict[str, Any]:
        folder, command = begun(name)
        launcher = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
        try:
            while not (folder / "log.jsonl").exists() or len(lines(folder / "log.jsonl")) < every + every // 2:
                if launcher.poll() is not None:
                    raise SystemExit(f"{name} ended by itself: {launcher.communicate()[1][-2000:]}")
                time.sleep(0.05)
            parent = psutil.Process(launcher.pid)
            processes = [parent, *parent.children(recursive=True)]
            rank = next(each for each in processes if _rank(each) == "1" and _rank(each.parent()) is None)
            since = time.perf_counter()
            stop(parent, rank)
            _, said = launcher.communicate(timeout=120)
            psutil.wait_procs(processes, timeout=120)
            gone = time.perf_counter() - since
            while on_gpus() & {each.pid for each in processes} and time.perf_counter() < since + 120:
                time.sleep(0.1)
            free = time.perf_counter() - since
        finally:
            for each in psutil.process_iter():
                if _session(each.pid) == launcher.pid:
                    each.kill()
        left = lines(folder / "log.jsonl")[-1]["step"]
        run(bench.command("train", "--resume", str(folder), "--no-eval", gpus=2))
        return {
            "status": launcher.returncode,
            "said": [line for line in said.splitlines() if line.startswith(("error", "stopped", "interrupted"))],
            "processes_gone_s": gone,
            "memory_free_s": free,
            "last_step": left,
            "furthest_weight": apart(whole[0], folder),
        }

    return {
        "two_whole_runs": apart(*whole),
        "a process killed": interrupted("killed", lambda _, rank: rank.kill()),
        "the launcher told to end": interrupted("told", lambda parent, _: parent.send_signal(signal.SIGTERM)),
    }


def _rank(process: psutil.Process | None) -> str | None:
    try:
        return process.environ().get("RANK") if process else None
    except psutil.Error:
        return None


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None


def on_gpus() -> set[int]:
    """Return the processes that hold memory on a GPU."""
    if not shutil.which("nvidia-smi"):
        return set()
    query = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader,nounits"]
    return {int(pid) for pid in subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()}


def apart(a: Path, b: Path) -> float:
    """Return the largest difference between the weights of two runs."""
    states = [load_file(next((path / "checkpoint").rglob("model.safetensors"))) for path in (a, b)]
    return max(float((states[0][name].double() - states[1][name].double()).abs().max()) for name in states[0])


def markdown(found: dict[str, Any]) -> str:
    """Return all that was measured as Markdown."""
    told = ["# Training and evaluation on two GPUs", "", *(f"- {key}: {value}" for key, value in found["about"].items())]
    if of := found.get("train"):
        told += [
            "",
            f"## Training: {found['train_towers']}, random towers, `streets-game`, crops of 512x512",
            "",
            "| global batch | options | images/s, one GPU | two | factor | peak GiB, one | two, each | waiting for data, one "
            "| two | largest difference of a logged loss |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in of:
            rate, peak, wait = row["images_per_second"], row["peak_gib"], row["waiting_for_data"]
            told.append(
                f"| {row['batch']} | {' + '.join([row['precision'], *row['options']])} | {rate[0]:.1f} | {rate[1]:.1f} "
                f"| {row['factor']:.2f} (asked: {BARS['train']}) | {peak[0]:.1f} | {peak[1]:.1f} "
                f"| {100 * wait[0]:.1f} % | {100 * wait[1]:.1f} % | {100 * row['furthest']:.2g} % |"
            )
    if of := found.get("eval"):
        rate = of["images_per_second"]
        told += [
            "",
            f"## Scoring: {of['images']} images of {of['size'][1]}x{of['size'][0]}, {' + '.join(of['towers'])}, fp32",
            "",
            f"{rate[0]:.2f} images/s on one GPU, {rate[1]:.2f} on two: {of['factor']:.2f} times (asked: {BARS['eval']}). "
            f"The confusion matrices of all images are {'equal to the last bit' if of['equal'] else '**not** equal'}.",
        ]
    if of := found.get("ends"):
        told += [
            "",
            "## Ends: `streets/mfuser` on two GPUs",
            "",
            f"Weights of two runs that nothing ended: at most {of['two_whole_runs']:.2g} apart.",
            "",
            "| | exit | no process after | memory free after | last step | weights of the resumed run, from the first |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for name in ("a process killed", "the launcher told to end"):
            row = of[name]
            told.append(
                f"| {name} | {row['status']} | {row['processes_gone_s']:.1f} s "
                f"| {row['memory_free_s']:.1f} s (asked: {BARS['seconds']:.0f}) | {row['last_step']} "
                f"| {row['furthest_weight']:.2g} |"
            )
    return "\n".join([*told, ""])


def main() -> None:
    """Measure the parts asked for, and write the table of all that was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--parts", nargs="+", choices=("train", "eval", "ends"), default=("ends", "eval", "train"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--work", type=Path, help="where runs and random towers are kept; default: OUT/work")
    parser.add_argument("--batches", type=int, nargs="+", metavar="N", help="global batches of trainings; default: 8 and 16")
    parser.add_argument("--options", nargs="*", choices=tuple(OPTIONS), help="of trainings; default: all on GPUs")
    parser.add_argument("--steps", type=int, default=50, help="of trainings, the first ten of which are not timed")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--tiny", action="store_true", help="tiny models on small images: a trial of this script")
    given = parser.parse_args()
    if given.device == "cpu" and "graphs" in (given.options or ()):
        parser.error("--options graphs: CUDA graphs need a GPU; leave it out")
    if odd := [batch for batch in given.batches or () if batch < 2 or batch % 2]:
        parser.error(f"--batches {odd[0]}: two GPUs have equal parts, so even numbers from 2 on")
    if not given.tiny and given.steps <= 10:
        parser.error("--steps: the first ten are not timed, so more than those")
    bench = Bench(given)
    bench.work.mkdir(parents=True, exist_ok=True)
    path = given.out / "scale.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    commit, dirty = code_commit()
    device = torch.cuda.get_device_name() if bench.cuda else "cpu"
    found["about"] = {
        **describe_environment(device, torch.get_num_threads()),
        "GPUs": torch.cuda.device_count() if bench.cuda else 0,
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if bench.cuda else "none",
        "commit": f"{commit}{'+' if dirty else ''}",
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
    }
    for part in given.parts:
        begun = time.perf_counter()
        found[part] = {"train": train, "eval": evaluate, "ends": ends}[part](bench)
        found[f"{part}_seconds"] = time.perf_counter() - begun
        found["train_towers"] = " + ".join(bench.towers(("dinov2_l", "eva02")))
        atomic.write(path, json.dumps(found, indent=1) + "\n")
        atomic.write(given.out / "scale.md", markdown(found))
        print(f"{part}: {found[f'{part}_seconds']:.0f} s", file=sys.stderr, flush=True)
    print(markdown(found))


if __name__ == "__main__":
    main()
