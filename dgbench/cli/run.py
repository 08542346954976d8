"""Commands of the panel Run: train, score checkpoints."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dgbench.cli import completion, trainings
from dgbench.cli.launcher import joined
from dgbench.cli.options import (
    BackboneOpt,
    DeviceOpt,
    Format,
    FormatOpt,
    GpusOpt,
    ModeOpt,
    NoCompileOpt,
    ProtocolOpt,
    QuietOpt,
    RootOpt,
    RunsOpt,
    TableOpt,
    TargetsOpt,
    VfmOpt,
    VlmOpt,
    listed,
)
from dgbench.cli.program import Command
from dgbench.errors import DgbenchError, RecipeError, ResultError, Terminated

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
    seeds: Annotated[
        list[int] | None, typer.Option("--seeds", metavar="NUMBER...", help="Train with each of them, one after the other.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FOLDER", help="Run folder, with --seeds that of all runs; default: a new one in --runs."
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="RUN", help="Go on with a stopped run, a folder of --seeds, or `latest`.", autocompletion=completion.runs
        ),
    ] = None,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Do not score the checkpoint afterwards.")] = False,
    track: Annotated[
        list[str] | None,
        typer.Option(
            "--track",
            metavar="NAME...",
            help="Tell these trackers losses and scores: tensorboard, or another that accelerate knows.",
            autocompletion=completion.trackers,
            callback=listed,
        ),
    ] = None,
    gpus: GpusOpt = None,
    local_batchnorm: Annotated[
        bool,
        typer.Option("--local-batchnorm", help="Of processes on CPUs, or train.accumulate: BatchNorm by each part of a batch."),
    ] = False,
    device: DeviceOpt = None,
    root: RootOpt = None,
    runs: RunsOpt = Path("runs"),
    form: FormatOpt = Format.TEXT,
    quiet: QuietOpt = False,
) -> None:
    """Train on one domain, score on others, show the leaderboard."""
    from dgbench import render
    from dgbench.needs import check_training
    from dgbench.recipe import load_recipe, resolve
    from dgbench.runs import claim_run, new_run

    if seeds and seed is not None:
        raise typer.BadParameter("is given with --seed: give one of them", ctx=ctx, param_hint="'--seeds'")
    if seeds and len(set(seeds)) < len(seeds):
        raise typer.BadParameter("names a seed twice", ctx=ctx, param_hint="'--seeds'")
    if seeds and (gpus or 1) > 1:
        raise typer.BadParameter(
            f"--gpus {gpus} trains one seed at a time: dgbench sweep has --seeds and --gpus", ctx=ctx, param_hint="'--seeds'"
        )
    if seeds:
        trainings.check_one_process("--seeds")
    team = joined(gpus, device)
    options = trainings.Options(not no_eval, device, root, track or (), team, local_batchnorm)
    recipe_name = ""
    if resume is not None:
        if any((vlm, vfm, backbone, source, targets, settings, out, seeds)) or seed is not None or name != "mfuser":
            problem = "goes on with the recorded recipe: only --device, --root, --track and output options may be given with it"
            raise typer.BadParameter(problem, ctx=ctx, param_hint="'--resume'")
        if not team.main:
            resume = team.from_main("run")
        planned = trainings.begun(resume, runs, options)
        recipe_name = planned[0].recipe.name
        _check_trackers(track)
    else:
        _refuse_late_name(ctx, {"--source": source, "--targets": targets, "--set": settings}, root)
        recipes: list[Recipe] = []
        for number in seeds or (seed,):
            recipe_name, flags = resolve(
                name, vlm=vlm, vfm=vfm, backbone=backbone, source=source, targets=targets, seed=number, root=root
            )
            if not recipes:  # first what can be told without importing torch
                light = load_recipe(recipe_name, settings or (), flags=flags, check_method="names", root=root)
                check_training(light, root, scored=not no_eval)
            recipes.append(load_recipe(recipe_name, settings or (), flags=flags, root=root))
        _check_trackers(track)
        if seeds:
            planned = trainings.of_seeds(recipes, runs, out)
        else:
            if not team.main:
                run = Path(team.from_main("run"))
            else:
                run = claim_run(out) if out is not None else new_run(runs, recipes[0].name)
            planned = [trainings.Training(recipes[0], run, chosen=out is not None)]
    progress = render.progress(quiet=quiet or not team.main)
    if team.main:
        team.from_main("run", str(planned[0].run))
    if planned[0].together is not None:
        _show_seeds(trainings.one_by_one(planned, options, progress, new=resume is None), planned[0].together, form)
        return
    run = planned[0].run
    where = shlex.quote(str(run))
    advice = (
        f"go on with: dgbench train --resume {where}{options.again()}",
        f"training is complete, score it with: dgbench eval {where}",
    )
    done = trainings.carry_out(planned[0], options, progress, advice)
    team.leave()
    if team.main:
        _show_training(planned[0], done, recipe_name, options, runs, form)


def _check_trackers(names: list[str] | None) -> None:
    if names:
        from dgbench.engine.tracking import check_trackers

        check_trackers(names)


def _show_training(
    training: trainings.Training, done: trainings.Done, recipe_name: str, options: trainings.Options, runs: Path, form: Format
) -> None:
    from dgbench import render, results

    run, results_ = training.run, [done.trained, *done.scores]
    if not options.scored:
        render.note(f"trained: {run}")
        if form != Format.TEXT:
            render.show([done.trained], form)
        return
    if form in (Format.JSON, Format.CSV):
        render.show(results_, form)
        return
    from dgbench.report.expected import held_against, references
    from dgbench.report.leaderboard import leaderboard, of_run

    # with --out the run may lie elsewhere, and --runs nowhere yet
    others = results.query(runs) if runs.exists() else []
    known = {record.id: record for record in (*others, *results_)}
    render.show(of_run(leaderboard(known.values(), references(), published=False, beside=True), run), form)
    if (expected := held_against(training.recipe, _as_shipped(recipe_name, options.root), results_)) is not None:
        render.write("")
        render.show(expected, form)
    if other := done.trained.extra.get("settings_of"):
        render.note(f"trained with the settings of {other}, which are for other towers: no recipe has these")
    render.note(f"run: {run}")


def _show_seeds(done: list[trainings.Done], folder: Path, form: Format) -> None:
    from dgbench import render
    from dgbench.report.matrix import matrices

    if scores := [record for one in done for record in one.scores]:
        render.show(matrices(scores, each=True), form)
    elif form != Format.TEXT:
        render.show([one.trained for one in done], form)
    render.note(f"runs: {folder}")


@panel.command("eval", cls=Command, rich_help_panel="Run", epilog="Example: dgbench eval --targets streets-city streets-fog@0.6")
def eval_(
    ctx: typer.Context,
    run: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN...", help="Run folders, folders of runs, records or `latest`.", autocompletion=completion.runs
        ),
    ] = None,
    targets: TargetsOpt = None,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="RUN", help="The same as the argument RUN.", autocompletion=completion.runs)
    ] = None,
    protocol: ProtocolOpt = None,
    mode: ModeOpt = None,
    no_compile: NoCompileOpt = False,
    gpus: GpusOpt = None,
    device: DeviceOpt = None,
    root: RootOpt = None,
    runs: RunsOpt = Path("runs"),
    form: FormatOpt = Format.TEXT,
    table: TableOpt = None,
    quiet: QuietOpt = False,
) -> None:
    """Score checkpoints of runs; without --targets, on their recipes' targets and source."""
    from dgbench import protocol as protocols
    from dgbench import render
    from dgbench.data.catalog import rows
    from dgbench.needs import check_scoring, scoring
    from dgbench.recipe import load_recipe

    if run and checkpoint is not None:
        raise typer.BadParameter("names the run a second time", ctx=ctx, param_hint="'--checkpoint'")
    rules = protocols.lookup(protocol).name if protocol else None
    team = joined(gpus, device)
    try:
        found = [folder for text in run or [checkpoint or "latest"] for folder in _runs_with_checkpoint(text, runs)]
    except ResultError as error:
        check_scoring([("target", row, "val") for row in rows(targets or (), root)], root, error)
        raise
    # `latest` is the first process's
    folders = [Path(text) for text in team.from_main("runs", "\n".join(map(str, dict.fromkeys(found)))).split("\n")]
    asked = []  # everything is checked before any time is spent
    for folder in folders:
        recipe = load_recipe(folder / "recipe.yaml", check_method=False, root=root)
        asked.append(recipe.data.rows(targets, root) if targets else None)
        check_scoring([("target", row, "val") for row in asked[-1]] if asked[-1] else scoring(recipe, root), root)
    if not run and checkpoint is None and team.main:
        render.note(f"run: {', '.join(map(str, folders))}")
    from dgbench.engine.evaluate import evaluate

    progress = render.progress(quiet=quiet or not team.main)
    progress.note(f"scoring by {team}") if team.world > 1 else None
    records = []
    for number, (folder, domains) in enumerate(zip(folders, asked, strict=True)):
        given = {"--targets": targets, "--protocol": [rules], "--mode": [mode.value if mode else None]}
        given |= {"--device": [device], "--root": [str(root) if root else None]}
        words = [str(left) for left in folders[number:]]
        for option, values in given.items():
            words += [option, *(v for v in values if v)] if values and any(values) else []
        words += ["--no-compile"] if no_compile else []
        scored = f"{number} of {len(folders)} runs are scored; " if len(folders) > 1 else ""
        advice = f"{scored}go on with: dgbench eval {shlex.join(words)}"
        if scored:
            progress.note(f"run {number + 1} of {len(folders)}: {folder}")
        try:
            records += evaluate(
                folder,
                domains,
                progress=progress,
                device=device,
                include_source=domains is None,
                root=root,
                protocol_name=rules,
                mode=mode and mode.value,
                compiles=False if no_compile else None,
                team=team,
            )
        except (KeyboardInterrupt, Terminated) as stop:
            raise trainings.stopped(stop, advice) from None
        except DgbenchError:
            if scored and team.main:
                render.note(f"{folder} cannot be scored; {advice}")
            raise
    team.leave()
    if not team.main:
        return
    if len(folders) == 1:
        render.show(records, form, table)
        return
    from dgbench.report.matrix import matrices

    render.show(matrices(records, each=True), form, table)


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


def _as_shipped(name: str, root: Path | None) -> Recipe | None:
    from dgbench.recipe import load_recipe

    with contextlib.suppress(RecipeError):  # the recipe file of a resumed run may be anywhere
        return load_recipe(name, root=root)
    return None


def _runs_with_checkpoint(text: str, runs: Path) -> list[Path]:
    from dgbench.runs import find_runs

    # as above; in a folder of runs, those are meant that can be scored
    return find_runs(text, runs, needs="checkpoint")
