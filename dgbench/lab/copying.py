"""All trainings of a call of `lab copying`: one after the other in a run folder, in a given time, and what they gave."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError

from dgbench import atomic, locks, untrusted
from dgbench.errors import ResultError
from dgbench.lab.settings import ROWS, Row, Settings, row_of
from dgbench.lab.training import Trained, result_in, train
from dgbench.progress import Progress
from mfuser import ops

SETTINGS = "copying.json"  # by which a folder is known as a run of this kind
_COMMON = ("s4", "glu", "length", "total", "vocab", "memorize", "depth", "batch", "lr", "sequences")  # of settings and results


@dataclass(frozen=True, slots=True)
class Copying:
    """The trainings of a run so far, in the order of the paper's table and by seed."""

    run: str
    settings: Settings
    as_published: bool  # whether figures of this run and of the paper are of the same task and number of steps
    chance: float
    trained: tuple[Trained, ...]
    published: tuple[Row, ...]


def begin(settings: Settings, run: Path) -> None:
    """Make an empty folder a run, which can be resumed from then on."""
    atomic.write(run / SETTINGS, json.dumps(asdict(settings), indent=1) + "\n")


def run_named(text: str, runs: Path) -> Path:
    """Return the run meant by a folder, a name below `runs`, or `latest`.

    Raises: ResultError if there is none.
    """
    if text == "latest":
        there = sorted(runs.glob(f"*/{SETTINGS}"))
        if not there:
            raise ResultError(f"no run of selective copying in {runs}", "begin one: dgbench lab copying")
        return there[-1].parent
    return next((path for path in (Path(text), runs / text) if path.is_dir()), Path(text))


def settings_in(run: Path) -> Settings:
    """Return the settings of a run.

    Raises: ResultError if it has none or they are damaged; DgbenchError for values that no task has.
    """
    path = run / SETTINGS
    try:
        content = untrusted.read_bytes(path, 100_000)
        found = TypeAdapter(Settings).validate_json(content)
        # a setting that was lost would get the default, and the training go on as another one
        lost = {one.name for one in dataclasses.fields(Settings)} - (untrusted.read_object(content) or {}).keys()
    except FileNotFoundError:
        raise ResultError(
            f"{run} is no run of selective copying: it has no {SETTINGS}", "begin one: dgbench lab copying"
        ) from None
    except ValidationError as error:
        problem = untrusted.in_words(error.errors(include_url=False)[0])
        raise ResultError(f"{path} has no settings of selective copying: {problem}", "begin a new run") from None
    except ValueError as error:
        raise ResultError(f"{path} {error}", "begin a new run") from None
    if lost:
        raise ResultError(f"{path} has no settings of selective copying: {', '.join(sorted(lost))} missing", "begin a new run")
    found.check()
    return found


def check_scan(backend: str) -> None:
    """Refuse a backend of the selective scan that does not exist, or that cannot run here.

    Raises: BackendError.
    """
    ops.resolve("selective_scan", backend)


def carry_out(
    run: Path,
    *,
    device: torch.device,
    progress: Progress,
    minutes: float | None = None,
    backend: str = "auto",
    graphs: bool = True,
) -> Copying:
    """Do the trainings of a run that are not complete, and return all.

    Args:
        minutes: at most so many in all; what is left is shared equally by the trainings that are still to come.

    Raises: ResultError, CheckpointError, DgbenchError; KeyboardInterrupt, Terminated.
    """
    begun, settings = time.perf_counter(), settings_in(run)
    with locks.training(run):
        # by seeds: a run that ends early has one of every row first
        pending = [(row_of(name), seed) for seed in settings.seeds for name in settings.rows]
        pending = [one for one in pending if not _complete(_result(run, *one, settings))]
        for number, (row, seed) in enumerate(pending):
            share = None
            if minutes is not None:
                share = (60 * minutes - (time.perf_counter() - begun)) / (len(pending) - number)
            train(
                settings,
                row,
                seed,
                _folder(run, row, seed),
                device=device,
                progress=progress,
                seconds=share,
                backend=backend,
                graphs=graphs,
            )
    return found(run)


def found(run: Path) -> Copying:
    """Return the results of a run.

    Raises: ResultError if a file in it is damaged.
    """
    settings = settings_in(run)
    results = [_result(run, row, seed, settings) for row in ROWS if row.name in settings.rows for seed in settings.seeds]
    trained = tuple(one for one in results if one is not None)
    full = settings.as_published and all(one is not None and one.complete for one in results)
    return Copying(str(run), settings, full, settings.chance, trained, ROWS)


def _folder(run: Path, row: Row, seed: int) -> Path:
    return run / f"{row.name}-seed-{seed}"


def _result(run: Path, row: Row, seed: int, settings: Settings) -> Trained | None:
    """Return the result of a training, None if it has none yet; ResultError if it is that of another training."""
    done = result_in(folder := _folder(run, row, seed))
    if done is not None:
        asked = {name: getattr(settings, name) for name in _COMMON}
        asked |= {"architecture": row.architecture, "layer": row.layer, "seed": seed, "planned": settings.steps}
        for name, wanted in asked.items():
            if (given := getattr(done, name)) != wanted:
                raise ResultError(
                    f"{folder} was trained with {name} {given}, but the run has {wanted}",
                    f"a run keeps its settings: begin a new one, or undo the change of {run / SETTINGS}",
                )
    return done


def _complete(done: Trained | None) -> bool:
    return done is not None and done.complete
