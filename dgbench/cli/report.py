"""Compare: one page of HTML about runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dgbench.cli import completion
from dgbench.cli.options import DeviceOpt, Format, FormatOpt, QuietOpt, RootOpt, RunsOpt
from dgbench.cli.program import Command

panel = typer.Typer()
_ENDINGS = (".html", ".htm")


@panel.command(cls=Command, rich_help_panel="Compare", epilog="Example: dgbench report latest --out report.html")
def report(
    ctx: typer.Context,
    given: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN...", help="Runs, records or folders of runs; default: `latest`.", autocompletion=completion.runs
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Where the page is written: .html.")] = Path(
        "report.html"
    ),
    with_images: Annotated[
        bool, typer.Option("--with-images", help="Pictures of domains that may not be redistributed, too.")
    ] = False,
    no_gallery: Annotated[bool, typer.Option("--no-gallery", help="No pictures: nothing is segmented.")] = False,
    device: DeviceOpt = None,
    root: RootOpt = None,
    runs: RunsOpt = Path("runs"),
    form: FormatOpt = Format.TEXT,
    quiet: QuietOpt = False,
) -> None:
    """Write one HTML file: leaderboard, classes, confusion, examples, severities, cost, curves, protocol, environment."""
    from dgbench import html_report, render

    if out.suffix.lower() not in _ENDINGS:
        raise typer.BadParameter(f"{out} must end in {', '.join(_ENDINGS)}", ctx=ctx, param_hint="'--out'")
    if out.is_dir():
        raise typer.BadParameter(f"{out} is a folder", ctx=ctx, param_hint="'--out'")
    if with_images and no_gallery:
        raise typer.BadParameter("says nothing with --no-gallery: give one of the two", ctx=ctx, param_hint="'--with-images'")
    records = html_report.records_of(given or ["latest"], runs)
    page = html_report.build(
        records, progress=render.progress(quiet=quiet), gallery=not no_gallery, with_images=with_images, device=device, root=root
    )
    render.show(html_report.write(page, out), form)
