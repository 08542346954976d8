"""Train one recipe with each fuser over several seeds, and print the fusion table with its accuracy column.

    python benchmarks/ablation.py --runs runs/ablation

Complete runs are kept, and interrupted ones are resumed. `--jobs` trainings share the device.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dgbench.recipe import load_recipe
from dgbench.results import query
from mfuser.fusion import FUSERS


def train(recipe: str, fuser: str, seed: int, runs: Path, more: Sequence[str]) -> None:
    """Train and score one run.

    Raises: CalledProcessError if that fails.
    """
    run = runs / f"{fuser}-seed{seed}"
    settings = ("--set", f"method.fuser={fuser}", f"train.seed={seed}", *more)
    started = (run / "recipe.yaml").is_file()
    scored = {record.target for record in (query(run) if started else ()) if record.kind == "eval"}
    if started and scored.issuperset(load_recipe(run / "recipe.yaml").data.targets):
        return
    command = ["--resume", str(run)] if started else [recipe, "--out", str(run), *settings]
    program = [sys.executable, "-m", "dgbench", "train", "--runs", str(runs)]
    subprocess.run([*program, *command], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="streets/mfuser", help="an MFuser recipe")
    parser.add_argument("--fusers", nargs="+", default=list(FUSERS), choices=list(FUSERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"), help="where the runs are kept")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--set", nargs="+", default=[], dest="settings", metavar="KEY=VALUE", help="as of dgbench train")
    options = parser.parse_args()
    with ThreadPoolExecutor(options.jobs) as pool:
        # seed by seed, so that every fuser has one before any has two
        waiting = [
            pool.submit(train, options.recipe, fuser, seed, options.runs, options.settings)
            for seed in options.seeds
            for fuser in options.fusers
        ]
    for each in waiting:
        each.result()
    command = ["profile", "--fusion", "--convention", "paper", "--format", "markdown", "--runs", str(options.runs)]
    subprocess.run([sys.executable, "-m", "dgbench", *command], check=True)


if __name__ == "__main__":
    main()
