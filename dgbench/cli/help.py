"""Commands of the panel Help: checks of this machine."""

from __future__ import annotations

import typer

from dgbench.cli.options import Format, FormatOpt, RootOpt, TableOpt
from dgbench.cli.program import Command

panel = typer.Typer()


@panel.command(cls=Command, rich_help_panel="Help", epilog="Example: dgbench doctor --json")
def doctor(root: RootOpt = None, form: FormatOpt = Format.TEXT, table: TableOpt = None) -> None:
    """Check what this machine offers: GPU, kernels, disk, data, recipes."""
    from dgbench import render
    from dgbench.doctor import doctor as examine

    checks = examine(root)
    render.show(checks, form, table)
    if any(check.state == "fail" for check in checks):
        raise typer.Exit(1)
