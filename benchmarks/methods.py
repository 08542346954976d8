"""Measure what the methods cost at full size on one GPU, and print one table of them beside their published means.

    python benchmarks/methods.py OUT                              # all: a process each, half a minute or so a model
    python benchmarks/methods.py OUT --recipes shade/mit_b5-gta erm/resnet101-gta

Models are those of the recipes that published rows name, and baselines; towers have random weights, which cost what trained ones
do. OUT holds `methods.json`, to which every call adds its rows, and `methods.md`, the table of all rows in it. Each row is
measured by `dgbench profile RECIPE`; one that cannot be measured is told, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dgbench import atomic
from dgbench.render.outside import in_markdown
from dgbench.report.published import load_published

BASELINES = ("erm/resnet101-gta", "linear/dinov2-gta", "mask2former/dinov2-gta")
TARGETS = ("cityscapes", "bdd100k", "mapillary")
MANY = 8  # images at a time


def published() -> dict[str, float]:
    """Return the published mean over `TARGETS`, trained on GTA5, in percent, by the recipe that trains the row."""
    tables = [table for table in load_published() if table.source == "gta5" and tuple(table.targets) == TARGETS]
    return {row.recipe: 100 * row.mean.miou for table in tables for row in table.rows if row.recipe and row.mean}


def measured(recipe: str, size: int, device: str | None) -> dict[str, Any]:
    """Return the profile of one recipe's model, or what went wrong under `problem`."""
    on = ["--device", device] if device else []
    command = ["profile", recipe, "--passes", "1", "--batch", "1", str(MANY), "--size", str(size), "--json", "--quiet", *on]
    done = subprocess.run([sys.executable, "-m", "dgbench", *command], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"problem": (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]}
    found = json.loads(done.stdout)
    (row,) = found["rows"]
    for key in ("by_module", "components", "by_operator"):
        row.pop(key, None)
    about = {key: found[key] for key in ("hardware", "environment", "dtype", "commit", "dirty", "created")}
    return {**row, **about}


def line(recipe: str, row: Mapping[str, Any], mean: float | None) -> str:
    """Return a row of the table."""
    if row.get("problem"):
        return f"| `{recipe}` | {in_markdown(row['problem'])} |" + " – |" * 8
    timings = {timing["batch"]: timing for timing in row["timings"]}
    one, many, step = timings.get(1), timings.get(MANY), row["step"]
    cells = [
        row["variant"],
        f"{row['trainable'] / 1e6:.2f}",
        f"{row['parameters'] / 1e6:.1f}",
        f"{row['total']:.0f}",
        f"{one['ms']['median']:.1f}" if one else "–",
        f"{1e3 * MANY / many['ms']['median']:.0f}" if many else "–",
        f"{step['ms']['median']:.0f}" if step else "–",
        f"{step['gib']:.1f}" if step and step["gib"] is not None else "–",
        f"{mean:.2f}" if mean is not None else "–",
    ]
    return f"| `{row['method']}` | {' | '.join(cells)} |"


def markdown(rows: Mapping[str, Mapping[str, Any]], size: int) -> str:
    """Return the table, by operations, and what it was measured with."""
    means = published()
    header = "method | towers | trained, M | parameters, M | GMAC | one image, ms"
    header += f" | images/s, {MANY} at once | training step of 2, ms | GiB of it | published mean"
    ordered = sorted(rows.items(), key=lambda item: item[1].get("total", float("inf")))
    lines = [f"| {header} |", "| --- " * 10 + "|", *(line(recipe, row, means.get(recipe)) for recipe, row in ordered)]
    machines = dict.fromkeys(
        f"{row['hardware']['name']}, driver {row['hardware']['driver']}, torch {row['environment']['torch']}, {row['dtype']}, "
        f"{size}x{size}, commit {row['commit']}{'+' if row['dirty'] else ''}"
        for row in rows.values()
        if row.get("hardware")
    )
    return "\n".join([*lines, "", *(f"Measured on {machine}." for machine in machines), ""])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of methods.json and methods.md")
    parser.add_argument("--recipes", nargs="*", help="default: those of published rows, and baselines; none: only the table")
    parser.add_argument("--size", type=int, default=512, help="side of the images")
    parser.add_argument("--device", help="as dgbench profile")
    given = parser.parse_args(arguments)
    file = given.out / "methods.json"
    rows: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    wanted = given.recipes if given.recipes is not None else dict.fromkeys((*BASELINES, *published()))
    given.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for recipe in wanted:
        begun = time.perf_counter()
        rows[recipe] = measured(recipe, given.size, given.device)
        problem = rows[recipe].get("problem")
        failed += bool(problem)
        print(f"{recipe}: {problem or 'done'}, {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
        atomic.write(file, json.dumps(rows, indent=1) + "\n")
    text = markdown(rows, given.size)
    atomic.write(given.out / "methods.md", text)
    print(text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
