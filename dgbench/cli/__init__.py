"""The command line: each command parses, calls one function and shows its typed result.

There is a file for each panel of `dgbench --help` and for each group of commands. Heavy imports are inside the commands,
so that `--help` and completion need nothing beyond Typer.
"""

from __future__ import annotations

import atexit
import gc
import os
from typing import Annotated

import typer

from dgbench.cli import ci, compare, data, get, help, kernels, lab, measure, predict, report, run, share, sweep
from dgbench.cli.options import TargetsOpt
from dgbench.cli.program import Command, Program

__all__ = ["Command", "Program", "TargetsOpt", "app", "main"]

app = typer.Typer(
    cls=Program,
    name="dgbench",
    help="Train on one domain, score on domains never seen.",
    epilog="First: dgbench train streets/mfuser",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data.group, name="data", rich_help_panel="Get")
app.add_typer(kernels.group, name="kernels", rich_help_panel="Get")
app.add_typer(lab.group, name="lab", rich_help_panel="Measure")
# typers without a name add a panel's commands to the program, in this order
for part in (get, share, run, sweep, predict, measure, compare, report, ci, help):
    app.add_typer(part.panel)


def _version(wanted: bool) -> None:
    if wanted:
        from dgbench import __version__

        typer.echo(f"dgbench {__version__}")
        raise typer.Exit


@app.callback()
def _dgbench(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Train on one domain, score on domains never seen."""


def main() -> None:
    """Run the command line."""
    from dgbench.render import streams

    streams.prepare()
    # without this, garbage collection at exit takes a fifth of a second for the million objects of torch's import
    atexit.register(gc.freeze)
    try:
        app(prog_name="dgbench")
    except SystemExit as end:
        from dgbench import launch

        if end.code and launch.several():
            # an exchange with processes that are gone, or hang, would go on when the interpreter ends
            os._exit(end.code if isinstance(end.code, int) else 1)
        raise
