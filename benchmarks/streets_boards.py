"""Train recipes with several seeds, several at a time on one device, and write one board of them with paired tests.

    python benchmarks/streets_boards.py OUT --jobs 8 --seeds 0 1 2 --recipes streets/erm streets/shade --set train.steps=300
    python benchmarks/streets_boards.py OUT --jobs 8 @benchmarks/boards/cnn.txt

A file behind `@` holds further arguments, and `#` begins a comment. OUT holds the runs, `board.md` and `board.json`. A cell is a
recipe with one seed; what is complete is kept, and what was interrupted goes on, so that a call may be repeated. Each row is held
against the first one: the differences are those of `dgbench compare`, on the same images and over the seeds, and Holm's rule
corrects their p-values over the rows. Ranks are those of `dgbench leaderboard`, which tests every pair.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from dgbench import atomic, results
from dgbench.data.dataset import SegDataset
from dgbench.data.union import sources
from dgbench.errors import DgbenchError, ResultError
from dgbench.progress import Silent
from dgbench.recipe import Recipe, load_recipe, recipe_hash
from dgbench.render.outside import in_markdown, visible
from dgbench.report import compare, sides, statistics
from dgbench.report.leaderboard import leaderboard
from dgbench.report.rows import Row as Place
from dgbench.resources import usable_cores
from dgbench.runs import seed_run


@dataclass(frozen=True)
class Row:
    """One row of the board: a recipe and what is set beside it.

    Attributes:
        name: of its folder below the runs, and in the table.
        missing: what it lacks here of what its paper has.
    """

    name: str
    recipe: str
    settings: tuple[str, ...]
    missing: str = ""

    def of_seed(self, seed: int) -> Recipe:
        """Return its recipe with this seed.

        Raises: RecipeError for wrong settings.
        """
        return load_recipe(self.recipe, (*self.settings, f"train.seed={seed}"))


@dataclass(frozen=True)
class Cell:
    """One training: a row with one seed."""

    row: Row
    seed: int
    recipe: Recipe
    run: Path

    def complete(self) -> bool:
        """Whether it was trained and scored.

        Raises: ResultError if the folder holds a run with other settings.
        """
        if not (self.run / "recipe.yaml").is_file():
            return False
        there = load_recipe(self.run / "recipe.yaml")
        if recipe_hash(there) != recipe_hash(self.recipe):
            raise ResultError(f"{self.run} was begun with other settings", "choose another OUT, or remove that folder")
        scored = {record.target for record in results.query(self.run) if record.kind == "eval"}
        return scored.issuperset((*there.data.targets, *there.data.sources))

    def command(self, device: str | None) -> list[str]:
        """Return the command that trains and scores it, or goes on with it."""
        going = (self.run / "recipe.yaml").is_file()
        told = [item for setting in (*self.row.settings, f"train.seed={self.seed}") for item in ("--set", setting)]
        words = ["--resume", str(self.run)] if going else [self.row.recipe, "--out", str(self.run), *told]
        on = ["--device", device] if device else []
        return [sys.executable, "-m", "dgbench", "train", *words, *on, "--quiet"]


def render_once(cells: Iterable[Cell]) -> None:
    """Render all images that the cells will read, once, before several processes ask for the same ones."""
    seen = set()
    for cell in cells:
        data = cell.recipe.data
        splits = [(row, data.val_images) for row in data.rows((*data.sources, *data.targets)) if row.procedural]
        key = repr((data.source, data.size, data.train_images, splits))
        if key in seen:
            continue
        seen.add(key)
        sources(data).prepare(Silent())
        for row, limit in splits:
            SegDataset(row, "val", size=data.size, limit=limit).prepare(Silent())


def train(cells: Sequence[Cell], jobs: int, device: str | None, until: float) -> list[str]:
    """Train and score cells in parallel processes, in their order, and return a line for each that failed.

    Args:
        until: time of `time.perf_counter` after which none is begun.
    """
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // jobs)))
    failed: list[str] = []
    lock = threading.Lock()

    def one(cell: Cell) -> None:
        begun = time.perf_counter()
        if begun > until:
            print(f"{cell.row.name}, seed {cell.seed}: left for another call", file=sys.stderr)
            return
        done = subprocess.run(cell.command(device), env=environment, capture_output=True, text=True, check=False)
        took = f"{time.perf_counter() - begun:.0f} s"
        with lock:
            if done.returncode:
                said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
                failed.append(visible(f"{cell.row.name}, seed {cell.seed}: ended with {done.returncode}: {said}"))
                sys.stderr.write(done.stderr)
            print(f"{cell.row.name}, seed {cell.seed}: {'failed' if done.returncode else 'done'}, {took}", file=sys.stderr)

    with ThreadPoolExecutor(jobs) as pool:
        for each in [pool.submit(one, cell) for cell in cells]:
            each.result()
    return failed


def asked(rows: Iterable[Row]) -> set[str]:
    """Return the domains that the rows' recipes ask for: a run may have been scored on further ones since."""
    return {name for row in rows for data in (row.of_seed(0).data,) for name in (*data.sources, *data.targets)}


def compared(rows: Sequence[Row], runs: Path) -> dict[str, dict[str, Any]]:
    """Return, by row and target, how each row differs from the first, in 0..1, and of the means whether Holm's rule tells it."""
    domains = asked(rows)

    def side(row: Row) -> sides.Side:
        read = sides.read(runs / row.name, row.name)
        models = [
            replace(model, runs=tuple(replace(run, scores=_of(run.scores, domains)) for run in model.runs))
            for model in read.models
        ]
        return replace(read, models=tuple(models))

    base = side(rows[0])
    found: dict[str, dict[str, Any]] = {}
    for row in rows[1:]:
        scores = compare.compare(base, side(row)).scores
        found[row.name] = {
            score.target: {
                "difference": score.difference.value,
                "low": score.difference.low,
                "high": score.difference.high,
                "p": score.difference.p,
                "seeds": list(score.difference.seeds),
                "images": score.images,
            }
            for score in scores
            if score.difference is not None
        }
    means = {name: by[compare.MEAN]["p"] for name, by in found.items() if compare.MEAN in by}
    for name, told in zip(means, statistics.holm(list(means.values())), strict=True):
        found[name][compare.MEAN]["significant"] = told
    return found


def _of(scores: Mapping[tuple[str, str, str], results.Record], domains: set[str]) -> dict[tuple[str, str, str], results.Record]:
    return {key: record for key, record in scores.items() if record.target in domains}


def board(rows: Sequence[Row], runs: Path) -> dict[str, Any]:
    """Return all that the tables say, ready for JSON: scores in 0..1, by row.

    Raises: ResultError if nothing was scored, or the rows' scores may not be compared.
    """
    kept = [row for row in rows if (runs / row.name).is_dir()]
    domains = asked(kept)
    records = [r for row in kept for r in results.query(runs / row.name) if r.kind != "eval" or r.target in domains]
    arranged = leaderboard(records, published=False)
    if len(arranged.groups) != 1:
        raise ResultError(
            f"the rows make {len(arranged.groups)} tables, not one", "give all the same source, targets and protocol"
        )
    places: dict[str, Place] = {Path(place.origin).parent.name: place for place in arranged.groups[0].rows if place.origin}
    scored = [row for row in kept if row.name in places]
    targets = list(arranged.groups[0].targets)
    trained = [r for r in records if r.kind == "train"]
    differences = compared(scored, runs) if scored and scored[0] == rows[0] else {}
    return {
        "source": arranged.groups[0].source,
        "targets": targets,
        "protocol": arranged.groups[0].protocol,
        "environment": trained[0].environment,
        "commits": sorted({str(r.commit) + ("+" if r.dirty else "") for r in trained}),
        "rows": {row.name: _row(row, places[row.name], targets, records) for row in scored},
        "against": scored[0].name if differences else None,
        "differences": differences,
    }


def _row(row: Row, place: Place, targets: Sequence[str], records: Iterable[results.Record]) -> dict[str, Any]:
    """Return what the tables say of one row; its scores are means over its seeds."""
    own = sorted((r for r in records if r.run and r.run.parent.name == row.name), key=lambda record: record.created)
    trained = {r.seed: r for r in own if r.kind == "train"}
    each = {seed: {r.target: r.miou for r in own if r.kind == "eval" and r.seed == seed} for seed in sorted(trained)}
    scores = {target: [by.get(target) for by in each.values()] for target in targets}
    of_seeds = [[value for value in values if value is not None] for values in zip(*scores.values(), strict=True)]
    means = [fmean(values) if len(values) == len(targets) else None for values in of_seeds]
    source = own[0].source
    return {
        "recipe": row.recipe,
        "settings": list(row.settings),
        "missing": row.missing,
        "variant": place.variant,
        "rank": place.rank,
        "seeds": list(each),
        "steps": max(r.steps for r in trained.values()),
        "source": _over_seeds([by.get(source) for by in each.values()]),
        "scores": {target: _over_seeds(values) for target, values in scores.items()},
        "mean": _over_seeds(means),
        "by_seed": each,
        "train_seconds": [record.seconds.get("train") for record in trained.values()],
        "peak_gib": [record.extra.get("peak_gib") for record in trained.values()],
    }


def _over_seeds(values: Sequence[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return {"miou": None, "deviation": None}
    return {"miou": fmean(known), "deviation": stdev(known) if len(known) > 1 else None}


def markdown(found: Mapping[str, Any]) -> str:
    """Return the board and the differences from its first row as two Markdown tables, in percent."""
    targets = found["targets"]
    lines = [
        f"Trained on {found['source']}, scored under `{found['protocol']}`; mIoU in %, mean ± deviation over seeds. "
        "Ranks count the rows that are significantly better (every pair, Holm).",
        "",
        f"| rank | row | trunk | seeds | steps | source | {' | '.join(targets)} | mean | missing here |",
        "| --- " * (len(targets) + 8) + "|",
    ]
    ordered = sorted(found["rows"].items(), key=lambda item: -(item[1]["mean"]["miou"] or 0))
    for name, row in ordered:
        cells = [_percent(row["source"]), *(_percent(row["scores"][target]) for target in targets), _percent(row["mean"])]
        rank = row["rank"] or "–"
        told = f"{rank} | {name} | {row['variant']} | {len(row['seeds'])} | {row['steps']}"
        lines.append(f"| {told} | {' | '.join(cells)} | {in_markdown(row['missing']) or '–'} |")
    if found["differences"]:
        lines += [
            "",
            f"Differences from {found['against']}, in points, with 95 % intervals over images and seeds; *told apart*: of the "
            "means, by Holm's rule over the rows at 5 %.",
            "",
            f"| row | {' | '.join(targets)} | mean | 95 % | p | told apart |",
            "| --- " * (len(targets) + 5) + "|",
        ]
    for name, by in found["differences"].items():
        mean = by.get(compare.MEAN) or (by.get(targets[0]) if len(targets) == 1 else None)
        values = [f"{100 * by[target]['difference']:+.1f}" if target in by else "–" for target in targets]
        if mean is None:
            lines.append(f"| {name} | {' | '.join(values)} | – | – | – | not comparable |")
            continue
        interval = f"{100 * mean['low']:+.1f} to {100 * mean['high']:+.1f}"
        verdict = "yes" if mean.get("significant", mean["p"] < statistics.LEVEL) else "no"
        told = f"{100 * mean['difference']:+.1f} | {interval} | {mean['p']:.2g} | {verdict}"
        lines.append(f"| {name} | {' | '.join(values)} | {told} |")
    environment = ", ".join(f"{key} {value}" for key, value in found["environment"].items())
    return "\n".join([*lines, "", f"{environment}; commit {', '.join(found['commits'])}.", ""])


def _percent(score: Mapping[str, float | None]) -> str:
    if score["miou"] is None:
        return "–"
    return f"{100 * score['miou']:.1f}" + ("" if score["deviation"] is None else f" ± {100 * score['deviation']:.1f}")


def rows_of(given: argparse.Namespace) -> list[Row]:
    """Return the rows that are asked for.

    Raises: ResultError for names that are given twice, or that no row has.
    """
    wanted = [(recipe.replace("/", "-"), recipe, ()) for recipe in given.recipes]
    for words in given.row:
        if len(words) < 2:
            raise ResultError(f"--row {' '.join(words)} names no recipe", "give it as: --row NAME RECIPE KEY=VALUE...")
        wanted.append((words[0], words[1], tuple(words[2:])))
    names = [name for name, *_ in wanted]
    missing = dict(given.missing)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ResultError(f"two rows are named {', '.join(twice)}", "name them apart: --row NAME RECIPE KEY=VALUE...")
    if unknown := sorted(missing.keys() - set(names)):
        raise ResultError(f"--missing names {', '.join(unknown)}", f"the rows are {', '.join(names) or 'none'}")
    return [Row(name, recipe, (*given.settings, *own), missing.get(name, "")) for name, recipe, own in wanted]


class _Parser(argparse.ArgumentParser):
    """A parser that reads files of arguments as a shell would."""

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """Return the arguments of one line."""
        return shlex.split(arg_line, comments=True)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = _Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, fromfile_prefix_chars="@", allow_abbrev=False
    )
    made.add_argument("out", type=Path, metavar="OUT", help="where board.md and board.json are written")
    made.add_argument("--runs", type=Path, help="where the runs are kept; default: OUT/runs")
    made.add_argument("--recipes", nargs="+", default=[], help="a row each; the first one is what the others are held against")
    made.add_argument(
        "--row", nargs="+", action="append", default=[], metavar="WORD", help="a further row: NAME RECIPE KEY=VALUE..."
    )
    made.add_argument(
        "--missing", nargs=2, action="append", default=[], metavar=("NAME", "TEXT"), help="what a row lacks of its paper's"
    )
    made.add_argument("--set", nargs="+", default=[], dest="settings", metavar="KEY=VALUE", help="of all rows, as dgbench train")
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    made.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    made.add_argument("--minutes", type=float, default=math.inf, help="begin no training after so long")
    made.add_argument("--device", help="as dgbench train")
    made.add_argument("--table", action="store_true", help="train nothing: write the board of what is there")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    begun = time.perf_counter()
    try:
        rows = rows_of(given)
        if not rows:
            raise ResultError("no row is given", "name recipes: --recipes streets/erm streets/shade")
        runs = given.runs or given.out / "runs"
        failed: list[str] = []
        if not given.table:
            # seed by seed, so that every row has one before any has two; all settings are read before any time is spent
            recipes = {(row.name, seed): row.of_seed(seed) for seed in given.seeds for row in rows}
            cells = [
                Cell(row, seed, recipes[row.name, seed], seed_run(runs / row.name, seed)) for seed in given.seeds for row in rows
            ]
            waiting = [cell for cell in cells if not cell.complete()]
            render_once(waiting)
            failed = train(waiting, given.jobs, given.device, begun + 60 * given.minutes)
        found = board(rows, runs) | {"failed": failed, "seconds": time.perf_counter() - begun, "jobs": given.jobs}
    except DgbenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    text = markdown(found)
    given.out.mkdir(parents=True, exist_ok=True)
    atomic.write(given.out / "board.md", text)
    atomic.write(given.out / "board.json", json.dumps(results.finite(found), indent=1) + "\n")
    print(text)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
