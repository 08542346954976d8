"""Sweeps: trainings of several recipes, settings and seeds, here or on a cluster."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dgbench.cli import completion
from dgbench.cli.options import DeviceOpt, Format, FormatOpt, GpusOpt, QuietOpt, RootOpt, RunsOpt
from dgbench.cli.program import Command
from dgbench.errors import DgbenchError, StoppedError, Terminated

panel = typer.Typer()


@panel.command(
    cls=Command, rich_help_panel="Run", epilog="Example: dgbench sweep streets/mfuser streets/erm --seeds 0 1 2 --local 2"
)
def sweep(
    ctx: typer.Context,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE...", help="Recipes or YAML files; default: those of --out.", autocompletion=completion.recipes
        ),
    ] = None,
    seeds: Annotated[list[int] | None, typer.Option("--seeds", metavar="NUMBER...", help="A run with each of them.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE...", help="Change recipe keys in all cells.", autocompletion=completion.keys),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option("--set-grid", metavar="KEY=A,B...", help="A cell for each value; several keys: for each combination."),
    ] = None,
    local: Annotated[
        int | None, typer.Option("--local", metavar="NUMBER", min=1, help="Train on this machine, so many cells at a time.")
    ] = None,
    slurm: Annotated[
        list[str] | None,
        typer.Option("--slurm", metavar="KEY=VALUE...", help="Submit a job for each cell: partition=gpu,time=4:00:00."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FOLDER", help="Folder of the sweep; default: sweep-RECIPE in --runs.")
    ] = None,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Do not score the checkpoints.")] = False,
    gpus: GpusOpt = None,
    device: DeviceOpt = None,
    root: RootOpt = None,
    runs: RunsOpt = Path("runs"),
    form: FormatOpt = Format.TEXT,
    quiet: QuietOpt = False,
) -> None:
    """Train every combination of recipes, settings and seeds; without --local and --slurm, show what has become of them.

    The same call again goes on with what is not done, and tries again what failed.
    """
    from dgbench import render
    from dgbench.sweep import cells as all_
    from dgbench.sweep import cluster

    if local is not None and slurm:
        raise typer.BadParameter("is given with --local: give one of them", ctx=ctx, param_hint="'--slurm'")
    if not names and (seeds or settings or grid):
        raise typer.BadParameter("--seeds, --set and --set-grid change recipes: name them", ctx=ctx, param_hint="'RECIPE...'")
    if not names and out is None:
        raise typer.BadParameter("name recipes, or a sweep that was begun by --out", ctx=ctx, param_hint="'RECIPE...'")
    options = cluster.settings_of(slurm or ())
    folder = out if out is not None else runs / f"sweep-{Path((names or [''])[0]).stem}"
    if names:
        cells = all_.planned(folder, names, settings=settings or (), grid=all_.grid_of(grid or ()), seeds=seeds or (), root=root)
    else:
        cells = all_.found(folder, root)
    words = [] if not no_eval else ["--no-eval"]
    for option, value in (("--gpus", gpus), ("--device", device), ("--root", root)):
        words += [option, str(value)] if value is not None else []

    def look(*, sure: bool = False) -> list[tuple[all_.Cell, bool, all_.Status]]:
        try:
            jobs = cluster.jobs_of(cells)
        except DgbenchError as error:
            if sure:
                raise
            render.warning(f"{error.message}: the table shows what the folders say")
            jobs = {}
        found = []
        for cell in cells:
            job = jobs.get(cell.run)
            queued = job is not None and job.state in ("waiting", "running", "ending")
            found.append((cell, queued, all_.status(cell, scored=not no_eval, job=job)))
        return found

    if local is not None or slurm:
        # sure: what may be in the queue is not submitted once more
        left = [cell for cell, queued, now in look(sure=bool(slurm)) if not queued and now.state in ("failed", "waiting")]
        if local is not None:
            from dgbench.sweep.local import carry_out

            try:
                carry_out(left, local, _program(), words, render.progress(quiet=quiet), gpus=gpus or 1, cpu=device == "cpu")
            except (KeyboardInterrupt, Terminated) as stop:
                code = 128 + stop.signum if isinstance(stop, Terminated) else 130
                raise StoppedError("stopped; the same call goes on with what is not done", code=code) from None
        else:
            cluster.submit(left, folder, _program(), words, options, 0 if device == "cpu" else gpus or 1)
            render.note(f"{len(left)} of {len(cells)} cells submitted; dgbench sweep --out {folder} shows what becomes of them")
    states = [now for _, _, now in look()]
    render.show(states, form)
    if any(state.state == "failed" for state in states):
        raise typer.Exit(1)


def _program() -> list[str]:
    """Return the words that start this program: all before the command's name."""
    words = list(sys.orig_argv)
    return words[: words.index("sweep")] if "sweep" in words else [sys.executable, "-m", "dgbench"]
