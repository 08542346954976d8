"""The cells of a sweep: a run folder for each combination, made once, and what has become of each."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from dgbench import atomic, results, untrusted
from dgbench.errors import RecipeError, ResultError
from dgbench.recipe import Recipe, dump, load_recipe, recipe_hash
from dgbench.runs import runs_in, seed_run
from dgbench.slurm import Job

NOTE, LOG = "cell.json", "sweep.log"  # beside a run's files: the attempt under way or the last one, and what it said
ATTEMPT_LOCK = ".attempt.lock"  # held while a sweep has the cell trained and scored
State = Literal["waiting", "running", "done", "failed"]


@dataclass(frozen=True, slots=True)
class Cell:
    """A run folder of a sweep, and its recipe."""

    run: Path
    name: str
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class Attempt:
    """The last attempt at a cell, as its folder notes it."""

    began: float  # seconds since 1970
    step: int = 0  # at which it began
    job: str = ""  # of a cluster
    reason: str = ""  # why it failed


@dataclass(frozen=True, slots=True)
class Status:
    """What has become of a cell, for the table."""

    cell: str
    state: State
    step: int
    steps: int
    seconds_left: float | None  # of the training, from the speed of this attempt
    job: str
    reason: str  # why it failed, or waits
    run: Path


def planned(
    folder: Path,
    names: Sequence[str],
    *,
    settings: Sequence[str] = (),
    grid: Mapping[str, Sequence[str]] | None = None,
    seeds: Sequence[int] = (),
    root: Path | None = None,
) -> list[Cell]:
    """Make the run folders of all combinations that are not there, and return all of them.

    Raises: RecipeError; ResultError if a folder of that name holds another recipe.
    """
    wanted: list[tuple[Path, Recipe]] = []
    keys = list(grid or {})
    for name in names:
        for values in itertools.product(*(grid or {}).values()):
            own = [f"{key}={value}" for key, value in zip(keys, values, strict=True)]
            for seed in seeds or (None,):
                flags = [] if seed is None else [f"train.seed={seed}"]
                recipe = load_recipe(name, [*settings, *own], flags=flags, root=root)
                cell = folder / _name(recipe.name, keys, values)
                wanted.append((cell if seed is None else seed_run(cell, seed), recipe))
    if len({run for run, _ in wanted}) < len(wanted):
        raise RecipeError("two recipes of the sweep have the same name", "rename one of their files, or sweep them apart")
    for run, recipe in wanted:  # all are checked before any is made
        there = run / "recipe.yaml"
        if there.is_file() and recipe_hash(load_recipe(there, root=root)) != recipe_hash(recipe):
            raise ResultError(f"{run} holds another recipe than this sweep has there", "choose another folder for --out")
    for run, recipe in wanted:
        if not (run / "recipe.yaml").is_file():
            run.mkdir(parents=True, exist_ok=True)
            dump(recipe, run / "recipe.yaml")
    return [Cell(run, run.relative_to(folder).as_posix(), recipe) for run, recipe in wanted]


def found(folder: Path, root: Path | None = None) -> list[Cell]:
    """Return the cells of a sweep that was begun.

    Raises: ResultError if there is none.
    """
    runs = runs_in(folder) if folder.is_dir() else []
    if not runs:
        raise ResultError(f"{folder} holds no sweep", "name its recipes: dgbench sweep streets/mfuser --seeds 0 1 2")
    return [Cell(run, run.relative_to(folder).as_posix(), load_recipe(run / "recipe.yaml", root=root)) for run in runs]


def grid_of(texts: Sequence[str]) -> dict[str, list[str]]:
    """Return keys and values of texts such as `method.fuser=a,b`; a comma within brackets is part of a value.

    Raises: RecipeError.
    """
    grid: dict[str, list[str]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        parts = [part.strip() for part in re.split(r",(?![^\[({]*[\])}])", values)]
        if not equals or not key or not all(parts):
            raise RecipeError(
                f"--set-grid {text} is no key with values", "as in --set-grid method.fuser=a,b train.batch_size=4,8"
            )
        if key in grid or len(set(parts)) < len(parts):
            raise RecipeError(f"--set-grid {text} names `{key}` or one of its values twice", "name each once")
        grid[key] = parts
    return grid


def status(cell: Cell, *, scored: bool, job: Job | None = None) -> Status:
    """Return what has become of a cell.

    Args:
        scored: it is done only when its targets have been scored, too.
        job: what Slurm says of its job; None: it has none, or Slurm was not asked.
    """
    attempt, step = attempted(cell.run), _step(cell.run)
    left, why = None, ""
    failed = attempt.reason if attempt is not None else ""
    if done(cell, scored=scored):
        state: State = "done"
    elif _held(cell.run) or (job is not None and job.state in ("running", "ending")):
        state = "running"
        if attempt is not None and step > attempt.step:
            left = (time.time() - attempt.began) / (step - attempt.step) * (cell.recipe.train.steps - step)
    elif job is not None and job.state == "waiting":
        state, why = "waiting", job.reason
    elif failed or (job is not None and job.reason):
        state, why = "failed", failed or (job.reason if job is not None else "")
    elif job is not None and job.state == "gone" and attempt is not None and not done(cell, scored=False):
        state, why = "failed", f"Slurm no longer knows job {attempt.job}"
    else:
        state = "waiting"
    return Status(cell.name, state, step, cell.recipe.train.steps, left, attempt.job if attempt else "", why, cell.run)


def done(cell: Cell, *, scored: bool) -> bool:
    """Return whether a cell is trained, and scored on its targets if it is to be."""
    records = results.query(cell.run) if any(cell.run.glob("record-*.json")) else []
    trained = next((record for record in reversed(records) if record.kind == "train"), None)
    if trained is None or not scored:
        return trained is not None
    there = {record.target for record in records if record.kind == "eval" and record.checkpoint == trained.checkpoint}
    return all(target in there for target in cell.recipe.data.targets)


def attempted(run: Path) -> Attempt | None:
    """Return the last attempt at a cell; None if there was none, or its note cannot be read."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Attempt).validate_json(untrusted.read_bytes(run / NOTE, 100_000))
    except (OSError, ValueError, ValidationError):
        return None


def note(run: Path, *, job: str = "", reason: str = "", began: float | None = None) -> None:
    """Note an attempt that begins, or why it failed."""
    before = attempted(run)
    if reason and before is not None:
        attempt = Attempt(before.began, before.step, job or before.job, reason)
    else:
        attempt = Attempt(began if began is not None else time.time(), _saved(run), job or (before.job if before else ""), reason)
    atomic.write(run / NOTE, json.dumps(asdict(attempt)) + "\n")


def _step(run: Path) -> int:
    """Return the last step that a run's log has."""
    try:
        with (run / "log.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0


def _saved(run: Path) -> int:
    """Return the step from which a training goes on; its log may be further, as that of one that was killed."""
    names = [path.name.removeprefix("step-") for path in (run / "checkpoint").glob("step-*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _held(run: Path) -> bool:
    from dgbench import locks

    try:
        locks.check_free(run)
    except ResultError:
        return True
    if not (run / ATTEMPT_LOCK).exists():
        return False
    with locks.held(run / ATTEMPT_LOCK) as free:
        return not free


def _name(recipe: str, keys: Sequence[str], values: Sequence[str]) -> str:
    parts = [recipe, *(f"{key.rpartition('.')[2]}={value}" for key, value in zip(keys, values, strict=True))]
    return "-".join(re.sub(r"[^A-Za-z0-9._=-]+", "-", part).strip("-") for part in parts)
