"""A small fixed benchmark for continuous integration: train, score, compare with the kept baseline, write reports.

A baseline is a folder of records, matrices, logs and recipes as `dgbench compare` reads them, without weights: a few hundred
kilobytes to commit. The same code, machine, threads, versions and seed give the same mIoU to the last digit; where the machine or
the versions differ, the spread between the baseline's seeds widens the intervals.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dgbench import atomic, temporaries
from dgbench.errors import DgbenchError, ResultError
from dgbench.progress import Progress
from dgbench.report import sides
from dgbench.report.compare import Comparison, compare
from dgbench.report.sides import Model, Side
from dgbench.runs import new_run

_log = logging.getLogger(__name__)

KEPT = ("record-*.json", "confusion-*.npz", "log.jsonl", "recipe.yaml")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run of the benchmark gave.

    Attributes:
        folder: where its runs are.
        comparison: with the baseline; None where a baseline was made.
        baseline: the folder of the baseline.
        files: the reports that were written.
    """

    folder: Path
    baseline: Path
    comparison: Comparison | None
    files: tuple[Path, ...] = ()


def train_and_score(
    recipes: Sequence[str], seeds: Sequence[int], out: Path, *, progress: Progress, device: str | None = None
) -> Path:
    """Train each recipe with each seed, score it on its targets and its source, and return the folder of the runs."""
    from dgbench.engine.evaluate import evaluate
    from dgbench.engine.train import train
    from dgbench.recipe import load_recipe

    loaded = [load_recipe(name, [f"train.seed={seed}"]) for name in recipes for seed in seeds]
    folder = new_run(out, "ci")
    for recipe in loaded:
        run = folder / f"{recipe.name.replace('/', '-')}-seed-{recipe.train.seed}"
        progress.note(f"{recipe.name}, seed {recipe.train.seed}")
        train(recipe, run, progress=progress, device=device)
        evaluate(run, None, progress=progress, device=device, include_source=True)
    return folder


def keep(runs: Path, baseline: Path) -> Path:
    """Replace the baseline by what a comparison reads of these runs.

    Raises: ResultError if the folder holds anything else than a baseline.
    """
    if baseline.exists() and not is_baseline(baseline):
        raise ResultError(f"{baseline} is not a baseline: it holds other files", "name another folder with --baseline")
    made = temporaries.beside(baseline)
    shutil.rmtree(made, ignore_errors=True)
    for run in sorted(path.parent for path in runs.glob("*/recipe.yaml")):
        for pattern in KEPT:
            for file in sorted(run.glob(pattern)):
                atomic.write(made / run.name / file.name, file.read_bytes())
    old = temporaries.beside(baseline.with_name(f"{baseline.name}.old"))
    # between the two renames there is no baseline, which is never taken for a pass
    if baseline.exists():
        os.replace(baseline, old)
    os.replace(made, baseline)
    atomic.sync_folder(baseline.parent)
    shutil.rmtree(old, ignore_errors=True)
    return baseline


def is_baseline(folder: Path) -> bool:
    """Whether a folder holds nothing but runs without weights."""
    return folder.is_dir() and all(
        run.is_dir() and all(any(file.match(pattern) for pattern in KEPT) for file in run.iterdir()) for run in folder.iterdir()
    )


def hold_against(
    baseline: Path, runs: Path, *, max_drop: float, max_slowdown: float | None = None, noise: float | None = None
) -> Comparison:
    """Compare runs with the baseline, seed by seed where both have the same ones.

    Args:
        noise: standard deviation of the mIoU between training runs, in points; None: that of the baseline's seeds where the
            machine or the versions differ, and nothing where they do not.

    Raises: ResultError if there is no baseline.
    """
    if not baseline.is_dir():
        raise ResultError(
            f"there is no baseline {baseline}", f"make one and commit it: dgbench ci --update-baseline --baseline {baseline}"
        )
    base, head = sides.read(baseline), sides.read(runs, "this change")
    if noise is None:
        pairs, _, _ = sides.pairs(base, head)
        spreads = [spread for a, b in pairs if not same_machine(a, b) and (spread := spread_of_seeds(a)) is not None]
        noise = max(spreads, default=None)
    return compare(_with_seeds_of(base, head), head, max_drop=max_drop, max_slowdown=max_slowdown, noise=noise)


def same_machine(a: Model, b: Model) -> bool:
    """Whether two models were trained where the same seed gives the same mIoU to the last digit."""
    told = [
        {tuple(run.trained.environment.get(key) for key in sides.ENVIRONMENT) if run.trained else None for run in model.runs}
        for model in (a, b)
    ]
    return told[0] == told[1] and len(told[0]) == 1 and None not in told[0]


def spread_of_seeds(model: Model) -> float | None:
    """Return the standard deviation of the mIoU between training runs, in points, pooled over targets; None with one run."""
    keys = set.intersection(*(set(run.scores) for run in model.runs))
    scores = [[run.scores[key].miou for run in model.runs] for key in keys]
    known = [np.array(values, dtype=float) for values in scores if None not in values]
    if len(model.runs) < 2 or not known:
        return None
    return 100 * math.sqrt(float(np.mean([values.var(ddof=1) for values in known])))


def _with_seeds_of(base: Side, head: Side) -> Side:
    """Leave out the seeds of the baseline that the head does not have, where some are shared."""
    seeds = {run.seed for model in head.models for run in model.runs}

    def shared(model: Model) -> Model:
        runs = tuple(run for run in model.runs if run.seed in seeds)
        return dataclasses.replace(model, runs=runs) if runs else model

    return dataclasses.replace(base, models=tuple(map(shared, base.models)))


def write_page(found: Comparison, runs: Path, out: Path, *, progress: Progress, device: str | None = None) -> tuple[Path, ...]:
    """Write the comparison and these runs as one file of HTML, and return its path; none, with a warning, if that fails.

    The verdict stands whether there is a page or not.
    """
    from dgbench import html_report, results

    try:
        page = html_report.build(results.query(runs), progress=progress, comparison=found, device=device)
    except DgbenchError as error:
        _log.warning("no report.html: %s", error.message)
        return ()
    return (html_report.write(page, out / "report.html").file,)


def write_reports(found: Comparison, out: Path) -> tuple[Path, ...]:
    """Write Markdown for a step summary and for a comment, JUnit XML and JSON; append to a step summary of GitHub."""
    from dgbench.render.ci import COMMENT_BYTES, SUMMARY_BYTES, as_json, as_markdown
    from dgbench.render.junit import junit

    files = [
        atomic.write(out / "summary.md", as_markdown(found, SUMMARY_BYTES)),
        atomic.write(out / "comment.md", as_markdown(found, COMMENT_BYTES)),
        atomic.write(out / "junit.xml", junit(found)),
        atomic.write(out / "comparison.json", as_json(found)),
    ]
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        place = Path(summary)
        try:
            taken = place.stat().st_size if place.exists() else 0
            with place.open("a", encoding="utf-8") as file:
                file.write(as_markdown(found, SUMMARY_BYTES - taken))
        except OSError as error:
            raise DgbenchError(f"GITHUB_STEP_SUMMARY {summary} cannot be written: {error.strerror}", "unset it") from None
    return tuple(files)
