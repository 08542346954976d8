"""Compare in continuous integration: the fixed benchmark, its baseline and its reports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dgbench.cli import completion
from dgbench.cli.options import DeviceOpt, Format, FormatOpt, QuietOpt
from dgbench.cli.program import Command
from dgbench.errors import ResultError

panel = typer.Typer()


@panel.command(cls=Command, rich_help_panel="Compare", epilog="Example: dgbench ci --update-baseline")
def ci(
    ctx: typer.Context,
    recipes: Annotated[
        list[str] | None, typer.Argument(metavar="RECIPE...", help="Default: streets/ci.", autocompletion=completion.recipes)
    ] = None,
    baseline: Annotated[Path, typer.Option(metavar="FOLDER", help="The kept baseline.")] = Path("dgbench-baseline"),
    update: Annotated[bool, typer.Option("--update-baseline", help="Make these runs the baseline.")] = False,
    init: Annotated[bool, typer.Option("--init", help="Write a workflow for GitHub and a script for other systems.")] = False,
    max_drop: Annotated[
        float, typer.Option(metavar="POINTS", min=0, max=100, help="A significant drop up to this is no regression.")
    ] = 1.0,
    max_slowdown: Annotated[
        float | None, typer.Option(metavar="PERCENT", min=0, max=1000, help="Speed decides, too; default: it does not.")
    ] = None,
    seeds: Annotated[
        list[int] | None, typer.Option(metavar="NUMBER...", help="Training runs; default: 0, of a baseline 0 1 2.")
    ] = None,
    noise: Annotated[
        float | None,
        typer.Option(metavar="POINTS", min=0, max=100, help="Deviation between training runs; default: the baseline's."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Where runs and reports are written.")] = Path(
        "dgbench-ci"
    ),
    device: DeviceOpt = None,
    form: FormatOpt = Format.TEXT,
    quiet: QuietOpt = False,
) -> None:
    """Train and score a small benchmark, compare it with the kept baseline, write reports; exit 1 on a regression."""
    from dgbench import ci_files, render

    if init:
        for path in ci_files.write(Path()):
            render.note(f"written: {path}")
        render.note("next: dgbench ci --update-baseline, and commit the baseline with them")
        return
    from dgbench.recipe import load_recipe

    names = recipes or ["streets/ci"]
    chosen = seeds or ([0, 1, 2] if update else [0])
    for name in names:
        load_recipe(name, check_method="names")  # before torch is imported
    if not update and not baseline.is_dir():
        render.failure(
            f"there is no baseline {baseline}", f"make one and commit it: dgbench ci --update-baseline --baseline {baseline}"
        )
        raise typer.Exit(3)
    from dgbench import ci as benchmark

    folder = benchmark.train_and_score(names, chosen, out, progress=render.progress(quiet=quiet), device=device)
    if update:
        benchmark.keep(folder, baseline)
        render.note(f"the baseline is now that of {folder}: commit {baseline}")
        return
    try:
        found = benchmark.hold_against(baseline, folder, max_drop=max_drop, max_slowdown=max_slowdown, noise=noise)
    except ResultError as error:
        render.failure(error.message, error.hint)
        raise typer.Exit(3) from None
    files = benchmark.write_reports(found, out)
    render.show(found, form)
    render.note(f"reports: {', '.join(map(str, files))}")
    raise typer.Exit(found.exit_code)
