"""Commands of the panel Run: train, score a checkpoint, segment photographs."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dgbench.cli import completion
from dgbench.cli.options import (
    BackboneOpt,
    DeviceOpt,
    Format,
    FormatOpt,
    ProtocolOpt,
    QuietOpt,
    RootOpt,
    RunsOpt,
    TargetsOpt,
    VfmOpt,
    VlmOpt,
    listed,
)
from dgbench.cli.program import Command
from dgbench.errors import RecipeError, ResultError, StoppedError, Terminated

if TYPE_CHECKING:
    from dgbench.recipe import Recipe

panel = typer.Typer()


@panel.command(cls=Command, rich_help_panel="Run", epilog="Example: dgbench train mfuser --vlm tiny --set train.steps=200")
def train(
    ctx: typer.Context,
    name: Annotated[
        str, typer.Argument(metavar="METHOD|RECIPE", help="A method, a recipe or a YAML file.", autocompletion=completion.recipes)
    ] = "mfuser",
    vlm: VlmOpt = None,
    vfm: VfmOpt = None,
    backbone: BackboneOpt = None,
    source: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME...", help="Domains to train on.", autocompletion=completion.domains, callback=listed),
    ] = None,
    targets: TargetsOpt = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE...", help="Change recipe keys: train.steps=200.", autocompletion=completion.keys
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="NUMBER", help="Same as --set train.seed=NUMBER.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FOLDER", help="Run folder; default: a new one in --runs.")
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Go on with a stopped run, or `latest`.", autocompletion=completion.runs)
    ] = None,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Do not score the checkpoint afterwards.")] = False,
    device: DeviceOpt = None,
    root: RootOpt = None,
    runs: RunsOpt = Path("runs"),
    form: FormatOpt = Format.TEXT,
    quiet: QuietOpt = False,
) -> None:
    """Train on one domain, score on others, show the leaderboard."""
    from dgbench import locks, render, results
    from dgbench.needs import check_training
    from dgbench.recipe import load_recipe, resolve
    from dgbench.runs import claim_run, find_run, new_run

    if resume is not None:
        if any((vlm, vfm, backbone, source, targets, settings, out)) or seed is not None or name != "mfuser":
            problem = "goes on with the recorded recipe: only --device, --root and output options may be given with it"
            raise typer.BadParameter(problem, ctx=ctx, param_hint="'--resume'")
        run = find_run(resume, runs)
        locks.check_free(run)  # at once, before torch is imported
        begun = load_recipe(run / "recipe.yaml", check_method=False, root=root)
        check_training(begun, root, scored=not no_eval, from_scratch=not _has_checkpoint(run))
        recipe = load_recipe(run / "recipe.yaml", root=root)
        recipe_name = recipe.name
    else:
        _refuse_late_name(ctx, {"--source": source, "--targets": targets, "--set": settings}, root)
        recipe_name, flags = resolve(
            name, vlm=vlm, vfm=vfm, backbone=backbone, source=source, targets=targets, seed=seed, root=root
        )
        # first the checks that do not need torch
        light = load_recipe(recipe_name, settings or (), flags=flags, check_method="names", root=root)
        check_training(light, root, scored=not no_eval)
        recipe = load_recipe(recipe_name, settings or (), flags=flags, root=root)
        run = claim_run(out) if out is not None else new_run(runs, recipe.name)
    progress = render.progress(quiet=quiet)
    try:
        with locks.training(run) as first:
            if first and out is not None:  # checked again: another process may have trained here since
                claim_run(out, locked=True)
            from dgbench.engine.evaluate import evaluate
            from dgbench.engine.train import train as fit

            trained = fit(recipe, run, progress=progress, resume=resume is not None, device=device, root=root)
    except (KeyboardInterrupt, Terminated) as stop:
        if not (run / "recipe.yaml").is_file():
            raise
        raise _stopped(stop, f"go on with: dgbench train --resume {shlex.quote(str(run))}") from None
    finally:
        # a folder without any file is not a run
        with contextlib.suppress(OSError):
            run.rmdir()
    if no_eval:
        render.note(f"trained: {run}")
        if form != Format.TEXT:
            render.show([trained], form)
        return
    try:
        records = evaluate(run, None, progress=progress, device=device, include_source=True, root=root)
    except (KeyboardInterrupt, Terminated) as stop:
        raise _stopped(stop, f"training is complete, score it with: dgbench eval {shlex.quote(str(run))}") from None
    if form in (Format.JSON, Format.CSV):
        render.show([trained, *records], form)
        return
    from dgbench.report.expected import held_against, references
    from dgbench.report.leaderboard import leaderboard, of_run

    # with --out the run may lie elsewhere, and --runs nowhere yet
    others = results.query(runs) if runs.exists() else []
    known = {record.id: record for record in (*others, trained, *records)}
    render.show(of_run(leaderboard(known.values(), references(), published=False, beside=True), run), form)
    if (expected := held_against(recipe, _as_shipped(recipe_name, root), [trained, *records])) is not None:
        render.write("")
        render.show(expected, form)
    if other := trained.extra.get("settings_of"):
        render.note(f"trained with the settings of {other}, which are for other towers: no recipe has these")
    render.note(f"run: {run}")


@panel.command("eval", cls=Command, rich_help_panel="Run", epilog="Example: dgbench eval --targets streets-city streets-fog@0.6")
def eval_(
    ctx: typer.Context,
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="Run folder, record or `latest`.", autocompletion=completion.runs)
    ] = None,
    targets: TargetsOpt = None,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="RUN", help="The same as the argument RUN.", autocompletion=completion.runs)
    ] = None,
    protocol: ProtocolOpt = None,
    device: DeviceOpt = None,
    root: RootOpt = None,
    runs: RunsOpt = Path("runs"),
    form: FormatOpt = Format.TEXT,
    quiet: QuietOpt = False,
) -> None:
    """Score a run's checkpoint; without --targets, on its recipe's targets and source."""
    from dgbench import protocol as protocols
    from dgbench import render
    from dgbench.data.catalog import rows
    from dgbench.needs import check_scoring, scoring
    from dgbench.recipe import load_recipe

    if run is not None and checkpoint is not None:
        raise typer.BadParameter("names the run a second time", ctx=ctx, param_hint="'--checkpoint'")
    rules = protocols.lookup(protocol).name if protocol else None
    try:
        folder = _run_with_checkpoint(run or checkpoint or "latest", runs)
    except ResultError as error:
        check_scoring([("target", row, "val") for row in rows(targets or (), root)], root, error)
        raise
    recipe = load_recipe(folder / "recipe.yaml", check_method=False, root=root)
    asked = recipe.data.rows(targets, root) if targets else None
    check_scoring([("target", row, "val") for row in asked] if asked else scoring(recipe, root), root)
    if run is None and checkpoint is None:
        render.note(f"run: {folder}")
    from dgbench.engine.evaluate import evaluate

    progress = render.progress(quiet=quiet)
    try:
        records = evaluate(
            folder, asked, progress=progress, device=device, include_source=asked is None, root=root, protocol_name=rules
        )
    except (KeyboardInterrupt, Terminated) as stop:
        given = {"--targets": targets, "--protocol": [rules], "--device": [device], "--root": [root and str(root)]}
        words = [str(folder)]
        for option, values in given.items():
            words += [option, *(v for v in values if v)] if values and any(values) else []
        raise _stopped(stop, f"go on with: dgbench eval {shlex.join(words)}") from None
    render.show(records, form)


@panel.command(cls=Command, rich_help_panel="Run", epilog="Example: dgbench predict photo.jpg --out overlay.png")
def predict(
    photos: Annotated[list[Path], typer.Argument(metavar="PHOTO...", help="Image files of any size, or folders of them.")],
    checkpoint: Annotated[
        str, typer.Option(metavar="RUN", help="Run folder, saved model or `latest`.", autocompletion=completion.runs)
    ] = "latest",
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="PATH", help="Picture to write, or a folder; default: PHOTO-overlay.png here.")
    ] = Path(),
    device: DeviceOpt = None,
    runs: RunsOpt = Path("runs"),
    form: FormatOpt = Format.TEXT,
) -> None:
    """Segment photographs and draw the classes over them."""
    from dgbench import render

    saved = Path(checkpoint)
    folder = saved if (saved / "model.json").is_file() else _run_with_checkpoint(checkpoint, runs)
    from dgbench.engine.predict import predict as segment

    render.show(segment(photos, folder, out, device=device), form)


def _refuse_late_name(ctx: typer.Context, given: Mapping[str, Sequence[str] | None], root: Path | None) -> None:
    """Refuse a method or recipe behind an option that takes all words up to the next one: it was meant as the argument."""
    from dgbench.data.catalog import names
    from dgbench.names import methods
    from dgbench.recipe import recipe_names

    for option, values in given.items():
        last = values[-1] if values else ""
        kind = "method" if last in methods() else "recipe" if last in recipe_names() else None
        if kind is not None and last not in names(root):
            typed = shlex.join([*ctx.command_path.split(), last, option, *((values or ())[:-1] or ["..."])])
            problem = f"`{last}` is a {kind}, but was read as a value of {option}: put the {kind} first, as in `{typed}`"
            raise typer.BadParameter(problem, ctx=ctx, param_hint=f"'{option}'")


def _has_checkpoint(run: Path) -> bool:
    # the names that mfuser.checkpoints writes, checked without torch
    return any(path.name.removeprefix("step-").isdecimal() for path in (run / "checkpoint").glob("step-*"))


def _as_shipped(name: str, root: Path | None) -> Recipe | None:
    from dgbench.recipe import load_recipe

    with contextlib.suppress(RecipeError):  # the recipe file of a resumed run may be anywhere
        return load_recipe(name, root=root)
    return None


def _stopped(stop: BaseException, advice: str) -> StoppedError:
    """Return the error for a command that was stopped, with the exit status that shells give it."""
    if isinstance(stop, Terminated):
        import signal

        return StoppedError(f"stopped by {signal.Signals(stop.signum).name}; {advice}", code=128 + stop.signum)
    return StoppedError(f"interrupted; {advice}")


def _run_with_checkpoint(text: str, runs: Path) -> Path:
    from dgbench.runs import find_run

    # `latest` skips a run without a checkpoint; by its own name it is refused with what to do about it
    return find_run(text, runs, needs="checkpoint" if text == "latest" else "recipe.yaml")
