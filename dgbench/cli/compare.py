"""Commands of the panel Compare: results side by side, and the protocols that they were scored by."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dgbench.cli import completion
from dgbench.cli.options import Format, FormatOpt, RunsOpt, TableOpt, TargetsOpt, listed
from dgbench.cli.program import Command
from dgbench.errors import ResultError

panel = typer.Typer()
_SIDE = "A run, a record, a folder of runs, a stored baseline, or `latest`."


@panel.command(cls=Command, rich_help_panel="Compare", epilog="Example: dgbench leaderboard --targets streets-fog")
def leaderboard(
    targets: TargetsOpt = None,
    source: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME...", help="Only models trained on this.", autocompletion=completion.domains, callback=listed),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Only scores under this protocol.", autocompletion=completion.protocols),
    ] = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="Also the IoU of each class, by target.")] = False,
    per_condition: Annotated[
        bool, typer.Option("--per-condition", help="Also fog, night, rain and snow of targets that have them all.")
    ] = False,
    every: Annotated[
        bool, typer.Option("--all", help="Each run by itself, also one that a newer of the same recipe replaces.")
    ] = False,
    as_matrix: Annotated[
        bool, typer.Option("--matrix", help="Sources by targets: mean and deviation over seeds; --all: a row a run, too.")
    ] = False,
    no_published: Annotated[bool, typer.Option("--no-published", help="Leave the published tables out.")] = False,
    runs: RunsOpt = Path("runs"),
    form: FormatOpt = Format.TEXT,
    table: TableOpt = None,
) -> None:
    """Show own results by rank, reference results, and published numbers apart."""
    from dgbench import render, results
    from dgbench.data.catalog import joined, rows
    from dgbench.report.entries import Detail
    from dgbench.report.expected import references
    from dgbench.report.leaderboard import leaderboard as arrange

    columns = [row.name for row in rows(targets)] if targets else None
    only = joined(row.name for row in rows(source)) if source else None
    if as_matrix:
        from dgbench.report.matrix import matrices

        render.show(matrices(results.query(runs), targets=columns, source=only, each=every), form, table)
        return
    board = arrange(
        results.query(runs),
        references(),
        targets=columns,
        source=only,
        every=every,
        published=not no_published,
        protocol=protocol,
        detail=Detail(per_class, per_condition),
    )
    render.show(board, form, table)


@panel.command(cls=Command, rich_help_panel="Compare", epilog="Example: dgbench compare baseline latest --max-drop 1.0")
def compare(
    base: Annotated[str, typer.Argument(metavar="BASE", help=_SIDE, autocompletion=completion.runs)],
    head: Annotated[
        str, typer.Argument(metavar="HEAD", help="The same, after the change.", autocompletion=completion.runs)
    ] = "latest",
    max_drop: Annotated[
        float, typer.Option(metavar="POINTS", min=0, max=100, help="A significant drop up to this is no regression.")
    ] = 0.0,
    max_slowdown: Annotated[
        float | None, typer.Option(metavar="PERCENT", min=0, max=1000, help="Speed decides, too; default: it does not.")
    ] = None,
    noise: Annotated[
        float | None,
        typer.Option(metavar="POINTS", min=0, max=100, help="Deviation between training runs, for sides of one run."),
    ] = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="Also a table of classes for each target.")] = False,
    runs: RunsOpt = Path("runs"),
    form: FormatOpt = Format.TEXT,
    table: TableOpt = None,
) -> None:
    """Compare runs before and after a change; exit 1 on a regression, 3 if they cannot be compared."""
    from dgbench import render
    from dgbench.report import compare as comparing
    from dgbench.report import sides

    try:
        both = [sides.find(text, runs) for text in (base, head)]
    except ResultError as error:
        render.failure(error.message, error.hint)
        raise typer.Exit(3) from None
    found = comparing.compare(*both, max_drop=max_drop, max_slowdown=max_slowdown, noise=noise)
    render.show(found, form, table, per_class=per_class)
    raise typer.Exit(found.exit_code)


@panel.command(cls=Command, rich_help_panel="Compare", epilog="Example: dgbench protocols paper-half")
def protocols(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="One of them; default: all.", autocompletion=completion.protocols)
    ] = None,
    form: FormatOpt = Format.TEXT,
    table: TableOpt = None,
) -> None:
    """Show what the protocols say, field by field: sizes, windows, label maps, classes."""
    from dgbench import render
    from dgbench.protocol import presets

    render.show(presets(name), form, table)
