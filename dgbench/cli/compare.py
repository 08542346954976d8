"""Commands of the panel Compare: results side by side, and the protocols that they were scored by."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dgbench.cli import completion
from dgbench.cli.options import Format, FormatOpt, RunsOpt, TargetsOpt, listed
from dgbench.cli.program import Command

panel = typer.Typer()


@panel.command(cls=Command, rich_help_panel="Compare", epilog="Example: dgbench leaderboard --targets streets-fog")
def leaderboard(
    targets: TargetsOpt = None,
    source: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME...", help="Only models trained on this.", autocompletion=completion.domains, callback=listed),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Also runs that a newer one of the same recipe replaces.")] = False,
    no_published: Annotated[bool, typer.Option("--no-published", help="Leave the published tables out.")] = False,
    runs: RunsOpt = Path("runs"),
    form: FormatOpt = Format.TEXT,
) -> None:
    """Show own results by rank, reference results, and published numbers apart."""
    from dgbench import render, results
    from dgbench.data.catalog import joined, rows
    from dgbench.report.expected import references
    from dgbench.report.leaderboard import leaderboard as arrange

    columns = [row.name for row in rows(targets)] if targets else None
    only = joined(row.name for row in rows(source)) if source else None
    board = arrange(results.query(runs), references(), targets=columns, source=only, every=every, published=not no_published)
    render.show(board, form)


@panel.command(cls=Command, rich_help_panel="Compare", epilog="Example: dgbench protocols paper-half")
def protocols(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="One of them; default: all.", autocompletion=completion.protocols)
    ] = None,
    form: FormatOpt = Format.TEXT,
) -> None:
    """Show what the protocols say, field by field: sizes, windows, label maps, classes."""
    from dgbench import render
    from dgbench.protocol import presets

    render.show(presets(name), form)
