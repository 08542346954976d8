"""`dgbench data`: domains on this disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dgbench.cli import completion
from dgbench.cli.options import DomainArg, Format, FormatOpt, LabelMapOpt, QuietOpt, RootOpt, SplitOpt, TableOpt, listed
from dgbench.cli.program import Command, Program

group = typer.Typer(
    cls=Program, help="List domains, look at them, verify their files, count their classes.", no_args_is_help=True
)


@group.command("list", cls=Command, epilog="Example: dgbench data list")
def data_list(root: RootOpt = None, form: FormatOpt = Format.TEXT, table: TableOpt = None) -> None:
    """List the domains and where each lies on this disk."""
    from dgbench import render
    from dgbench.data.listing import states

    render.show(states(root), form, table)


@group.command("show", cls=Command, epilog="Example: dgbench data show streets-night --n 6 --out sheet.png")
def data_show(
    domain: DomainArg,
    n: Annotated[int, typer.Option(min=1, metavar="COUNT", help="How many images.")] = 6,
    split: SplitOpt = None,
    label_map: LabelMapOpt = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The picture to write.")] = Path("sheet.png"),
    root: RootOpt = None,
    form: FormatOpt = Format.TEXT,
    quiet: QuietOpt = False,
) -> None:
    """Write a contact sheet: images, label overlays, legend."""
    from dgbench import render
    from dgbench.data.listing import sheet

    drawn = sheet(domain, split, out, images=n, root=root, label_map=label_map, progress=render.progress(quiet=quiet))
    render.show(drawn, form)


@group.command("stats", cls=Command, epilog="Example: dgbench data stats streets-game --n 200")
def data_stats(
    domain: DomainArg,
    n: Annotated[int | None, typer.Option(min=1, metavar="COUNT", help="Only the first images; default: all.")] = None,
    split: SplitOpt = None,
    label_map: LabelMapOpt = None,
    root: RootOpt = None,
    form: FormatOpt = Format.TEXT,
    table: TableOpt = None,
    quiet: QuietOpt = False,
) -> None:
    """Count how much of a domain each class makes up."""
    from dgbench import render
    from dgbench.data.listing import class_shares

    shares = class_shares(domain, split, images=n, root=root, label_map=label_map, progress=render.progress(quiet=quiet))
    render.show(shares, form, table)


@group.command("verify", cls=Command, epilog="Example: dgbench data verify cityscapes bdd100k")
def data_verify(
    names: Annotated[
        list[str],
        typer.Argument(metavar="DOMAIN...", help="See `dgbench data list`.", autocompletion=completion.domains, callback=listed),
    ],
    splits: Annotated[
        list[str] | None,
        typer.Option("--split", metavar="NAME...", help="Default: of train and val what is on this disk.", callback=listed),
    ] = None,
    label_map: LabelMapOpt = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="More or fewer images than the complete split are all right.")
    ] = False,
    root: RootOpt = None,
    form: FormatOpt = Format.TEXT,
    table: TableOpt = None,
    quiet: QuietOpt = False,
) -> None:
    """Read every file: pairs, sizes, label values against the map, classes; exit 1 if something is wrong."""
    from dgbench import render
    from dgbench.data.verify import splits_to_verify, verify

    progress = render.progress(quiet=quiet)
    wanted = [(name, split) for name in names for split in (splits or splits_to_verify(name, root))]
    reports = [verify(name, split, root, label_map=label_map, progress=progress) for name, split in wanted]
    render.show(reports, form, table)
    if not all(report.ok and (partial or not (report.n_missing or report.n_extra)) for report in reports):
        raise typer.Exit(1)


@group.command("export", cls=Command, epilog="Example: dgbench data export streets-city --as cityscapes --out data --n 20")
def data_export(
    streets: Annotated[str, typer.Argument(metavar="STREETS", help="A rendered domain.", autocompletion=completion.rendered)],
    as_: Annotated[str, typer.Option("--as", metavar="DOMAIN", help="Whose files to write.", autocompletion=completion.domains)],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="ROOT", help="Data root; the domain's folder in it must not exist.")
    ],
    n: Annotated[int | None, typer.Option(min=1, metavar="COUNT", help="At most so many images a split; default: all.")] = None,
    splits: Annotated[
        list[str] | None,
        typer.Option("--split", metavar="NAME...", help="Default: of train and val what DOMAIN has.", callback=listed),
    ] = None,
    size: Annotated[tuple[int, int] | None, typer.Option(metavar="H W", min=1, help="Default: 256 512.")] = None,
    layout: Annotated[str | None, typer.Option(metavar="NAME", help="One of DOMAIN's layouts; default: as published.")] = None,
    label_map: Annotated[str | None, typer.Option(metavar="NAME", help="Of DOMAIN's label maps, not its own.")] = None,
    form: FormatOpt = Format.TEXT,
    quiet: QuietOpt = False,
) -> None:
    """Write rendered scenes as the files of a published set: its folders, names and label encoding."""
    from dgbench import render
    from dgbench.data.export import export

    done = export(
        streets,
        as_,
        out,
        n=n,
        splits=splits or (),
        size=size,
        layout=layout,
        label_map=label_map,
        progress=render.progress(quiet=quiet),
    )
    render.show(done, form)
