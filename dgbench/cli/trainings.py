"""The trainings of one call of `train`: one, or one for each seed; and what is said when they are stopped."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dgbench.errors import ResultError, StoppedError, Terminated

if TYPE_CHECKING:
    from dgbench.engine.team import Team
    from dgbench.progress import Progress
    from dgbench.recipe import Recipe
    from dgbench.results import Record


@dataclass(frozen=True, slots=True)
class Training:
    """A run folder and the recipe that is trained in it."""

    recipe: Recipe
    run: Path
    goes_on: bool = False  # there may be a checkpoint
    chosen: bool = False  # the folder was named by --out
    together: Path | None = None  # the folder of runs that it is one of


@dataclass(frozen=True, slots=True)
class Done:
    """What a training gave."""

    trained: Record
    scores: list[Record]


@dataclass(frozen=True, slots=True)
class Options:
    """How `train` was called, beside the recipe."""

    scored: bool
    device: str | None
    root: Path | None
    track: Sequence[str] = ()
    team: Team | None = None  # the processes that train together; None: one
    local_norms: bool = False

    def again(self) -> str:
        """Return what has to be said once more when a training goes on."""
        from dgbench.launch import ASKED

        words = ["--track", *self.track] if self.track else []
        if ASKED in os.environ:
            words += ["--gpus", os.environ[ASKED]]
        if self.local_norms:
            words += ["--local-batchnorm"]
        return "".join(f" {word}" for word in (*map(shlex.quote, words), *(() if self.scored else ("--no-eval",))))


def begun(text: str, runs: Path, options: Options) -> list[Training]:
    """Return the training that `--resume` names, or those of the folder of runs that it names.

    Raises: ResultError, DataError, RecipeError for what cannot go on.
    """
    from dgbench import locks
    from dgbench.needs import check_training
    from dgbench.recipe import load_recipe
    from dgbench.runs import find_runs, of_one_call

    found = find_runs(text, runs)
    several = len(found) > 1
    if several and not of_one_call(found):
        raise ResultError(f"{text} holds {len(found)} runs, not the seeds of one call of train", "name a run in it, or `latest`")
    if several:
        check_one_process(f"--resume {text}")
    for run in found:
        locks.check_free(run)  # at once, before torch is imported
        light = load_recipe(run / "recipe.yaml", check_method=False, root=options.root)
        check_training(light, options.root, scored=options.scored, from_scratch=not _has_checkpoint(run))
    return [
        Training(
            load_recipe(run / "recipe.yaml", root=options.root),
            run,
            goes_on=True,
            together=run.parent if several else None,
        )
        for run in found
    ]


def of_seeds(recipes: Sequence[Recipe], runs: Path, out: Path | None) -> list[Training]:
    """Make a folder of runs, one for each recipe, which differ in their seeds, and return their trainings.

    Each run has its recipe from now on: by it a folder is known as one that can be gone on with.
    """
    from dgbench.recipe import dump
    from dgbench.runs import claim_run, new_run, seed_run

    folder = claim_run(out) if out is not None else new_run(runs, recipes[0].name)
    trainings = []
    for recipe in recipes:
        run = seed_run(folder, recipe.train.seed)
        run.mkdir()
        dump(recipe, run / "recipe.yaml")
        trainings.append(Training(recipe, run, goes_on=True, together=folder))
    return trainings


def check_one_process(what: str) -> None:
    """Refuse a distributed training.

    Raises: ResultError in a process of a distributed training.
    """
    from dgbench import launch

    if launch.several():
        raise ResultError(f"{what} trains in one process, and a launcher has started several", "launch each seed by itself")


def one_by_one(trainings: Sequence[Training], options: Options, progress: Progress, *, new: bool) -> list[Done]:
    """Carry out trainings that differ in their seeds, one after the other; what is there already is not made again.

    Args:
        new: their folders were made for this: if nothing begins, nothing is left.

    Raises: StoppedError saying which seeds are done, and how to go on.
    """
    import gc

    done: list[Done] = []
    for number, training in enumerate(trainings, 1):
        if (there := _there(training, options)) is not None:
            progress.note(f"seed {training.recipe.train.seed} is done: {training.run}")
            done.append(there)
            continue
        progress.note(f"seed {training.recipe.train.seed}, {number} of {len(trainings)}: {training.run}")
        seeds = ", ".join(f"seed {one.trained.seed}" for one in done) or "no seed yet"
        advice = f"done: {seeds}; go on with: dgbench train --resume {shlex.quote(str(training.together))}{options.again()}"
        try:
            done.append(carry_out(training, options, progress, (advice, advice)))
        except StoppedError:
            raise
        except Exception:
            if new and not any((one.run / "log.jsonl").exists() for one in trainings):
                _forget(trainings)  # nothing has begun
            else:
                from dgbench import render

                left = [f"; or without it: dgbench train --resume {shlex.quote(str(one.run))}" for one in trainings[number:][:1]]
                render.note(f"seed {training.recipe.train.seed} ended with an error; {advice}{''.join(left)}")
            raise
        gc.collect()  # models hang in reference cycles: the next one needs the memory
    return done


def carry_out(training: Training, options: Options, progress: Progress, advice: tuple[str, str]) -> Done:
    """Train, score, and draw the curves of both.

    Args:
        advice: how to go on, told when it is stopped: while it trains, and while it is scored.

    Raises: StoppedError, DgbenchError.
    """
    from dgbench import launch, locks
    from dgbench.runs import claim_run

    run = training.run
    from dgbench.engine.tracking import Trackers

    with Trackers(options.track) as trackers:
        try:
            with locks.training(run) as first:
                if first and training.chosen:  # once more: a run of somebody else may have begun and ended here since
                    claim_run(run, locked=True)
                from dgbench.engine.evaluate import evaluate
                from dgbench.engine.train import train as fit

                trained = fit(
                    training.recipe,
                    run,
                    progress=progress,
                    resume=training.goes_on,
                    device=options.device,
                    root=options.root,
                    trackers=trackers,
                    team=options.team,
                    local_norms=options.local_norms,
                )
        except (KeyboardInterrupt, Terminated) as stop:
            if not (run / "recipe.yaml").is_file():
                raise
            raise stopped(stop, advice[0]) from None
        finally:
            # a run that failed before its first file is no run
            with contextlib.suppress(OSError):
                run.rmdir() if launch.first() else None
        _draw_curves(run, []) if first else None
        if not options.scored:
            return Done(trained, [])
        try:
            scores = evaluate(
                run,
                None,
                progress=progress,
                device=options.device,
                include_source=True,
                root=options.root,
                team=options.team,
            )
        except (KeyboardInterrupt, Terminated) as stop:
            raise stopped(stop, advice[1]) from None
        trackers.scores(scores, training.recipe.train.steps)
        _draw_curves(run, scores) if first else None
    return Done(trained, scores)


def stopped(stop: BaseException, advice: str) -> StoppedError:
    """Return what to say about a command that was stopped, with the exit status that shells give it."""
    if isinstance(stop, Terminated):
        import signal

        return StoppedError(f"stopped by {signal.Signals(stop.signum).name}; {advice}", code=128 + stop.signum)
    return StoppedError(f"interrupted; {advice}")


def _draw_curves(run: Path, scores: Sequence[Record]) -> None:
    """Draw `curves.png` in the run's folder. No training fails because it cannot be drawn."""
    from dgbench import render
    from dgbench.report.curves import curves

    path = run / "curves.png"
    try:
        if (found := curves(run, scores)) is not None:
            render.draw_curves(found, path)
    except Exception as error:
        render.warning(f"{path} was not drawn: {error}")


def _there(training: Training, options: Options) -> Done | None:
    """Return what a run has already, if it is trained and scored as it would be now."""
    from dgbench import results

    recipe, records = training.recipe, results.query(training.run)
    trained = next((record for record in reversed(records) if record.kind == "train"), None)
    if trained is None or not options.scored:
        return Done(trained, []) if trained is not None else None
    wanted = list(recipe.data.rows(recipe.data.sources, options.root))
    wanted = [row for row in wanted if "val" in row.splits]
    wanted += [row for row in recipe.data.rows(recipe.data.targets, options.root) if row not in wanted]
    scores = {
        record.target: record
        for record in records
        if record.kind == "eval" and record.checkpoint == trained.checkpoint and record.protocol == recipe.eval.protocol
    }
    if any(row.name not in scores for row in wanted):
        return None
    return Done(trained, [scores[row.name] for row in wanted])


def _forget(trainings: Sequence[Training]) -> None:
    """Remove folders of runs that hold their recipe alone, and the folder of those."""
    from dgbench import locks

    for training in trainings:
        for name in ("recipe.yaml", *locks.OURS):
            (training.run / name).unlink(missing_ok=True)
    for folder in (*(training.run for training in trainings), trainings[0].run.parent):
        with contextlib.suppress(OSError):
            folder.rmdir()


def _has_checkpoint(run: Path) -> bool:
    # the names that mfuser.checkpoints writes, told without torch
    return any(path.name.removeprefix("step-").isdecimal() for path in (run / "checkpoint").glob("step-*"))
