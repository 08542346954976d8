"""Get: what training needs from elsewhere, domains and towers, and the methods that use them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from dgbench.cli import completion
from dgbench.cli.options import Format, FormatOpt, QuietOpt, RootOpt, TableOpt, listed
from dgbench.cli.program import Command

panel = typer.Typer()


@panel.command(cls=Command, rich_help_panel="Get", epilog="Example: dgbench download cityscapes gta5 bdd acdc --dry-run")
def download(
    ctx: typer.Context,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME...",
            help="Domains and towers, see `data list` and `models`.",
            autocompletion=completion.downloads,
            callback=listed,
        ),
    ] = None,
    from_paths: Annotated[
        list[Path] | None,
        typer.Option(
            "--from", metavar="PATH...", help="What you have: archives, folders of them, an unpacked tree, a tower's weights."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what is needed and what is here.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Accept the terms of the data sets, which are shown.")] = False,
    mirror: Annotated[
        str | None, typer.Option(metavar="URL", help="Take archives from URL/<domain>/<archive> instead of the sites.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, max=32, metavar="COUNT", help="Archives at a time.")] = 4,
    hub: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="A dataset of the Hub as a domain of your own.")] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(metavar="PART=COLUMN...", help="With --hub: image=COLUMN label=COLUMN, or globs of loose files."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="COMMIT", help="Of a Hub repository; default: main as it is now.")
    ] = None,
    name_as: Annotated[str | None, typer.Option("--as", metavar="NAME", help="With --hub: the domain's name.")] = None,
    encoding: Annotated[str, typer.Option(metavar="NAME", help="With --hub: how label files store their values.")] = "ids",
    label_map: Annotated[str, typer.Option(metavar="NAME", help="With --hub: what the labels' values mean.")] = "train-ids",
    split: Annotated[str, typer.Option(metavar="NAME", help="With --hub: what to call a set of loose files.")] = "val",
    root: RootOpt = None,
    form: FormatOpt = Format.TEXT,
    table: TableOpt = None,
    quiet: QuietOpt = False,
) -> None:
    """Fetch domains and towers: show what is needed, then transfer, check and unpack it; again to go on after a stop."""
    from dgbench import render
    from dgbench.download import command as downloads
    from dgbench.download.hub_rows import wish_of

    if hub is None and (columns or name_as):
        raise typer.BadParameter("describes a repository: give it with --hub", ctx=ctx, param_hint="'--columns', '--as'")
    if not names and hub is None:
        raise typer.BadParameter("name a domain or a tower, or give --hub OWNER/NAME", ctx=ctx, param_hint="'NAME...'")
    wish = wish_of(hub, columns or (), revision, name_as, encoding=encoding, label_map=label_map, split=split) if hub else None
    given = {
        "--from": from_paths,
        "--mirror": mirror,
        "--root": root,
        "--hub": hub,
        "--columns": columns,
        "--revision": revision,
        "--as": name_as,
    }
    with render.transfers(quiet=quiet) as bars:
        options = downloads.Options(
            root,
            tuple(from_paths or ()),
            mirror,
            revision,
            jobs,
            accept=yes,
            bars=bars,
            ask=_accepts if sys.stdin.isatty() else None,
            command=_retyped("download", names or (), given),
            show=render.tell if not quiet else lambda _plan: None,
        )
        if dry_run:
            render.show(downloads.plan(names or (), options, wish), form, table)
            return
        outcome = downloads.download(names or (), options, wish)
    if outcome.rows:
        render.show(list(outcome.rows), form, table)
    for problem in outcome.problems:
        render.failure(problem.message, problem.hint)
    if outcome.problems:
        raise typer.Exit(1)


def _accepts(terms: str) -> bool:
    from dgbench import render

    render.note(f"The owners ask of those who use these sets:\n{terms}")
    return typer.confirm("Do you accept?", err=True)


def _retyped(command: str, names: Sequence[str], options: Mapping[str, object]) -> str:
    """The command for its user to type again."""
    import shlex

    from dgbench.download.addresses import without_secrets

    words = ["dgbench", command, *names]
    for flag, value in options.items():
        if value:
            words += [flag, *(without_secrets(str(one)) for one in (value if isinstance(value, list) else [value]))]
    return shlex.join(words)


@panel.command(cls=Command, rich_help_panel="Get", epilog="Example: dgbench models --json")
def models(form: FormatOpt = Format.TEXT, table: TableOpt = None) -> None:
    """List the towers: role, weights, licence, and whether they are on this disk."""
    from dgbench import render
    from mfuser.towers.hub import models as towers

    render.show(towers(), form, table)


@panel.command(cls=Command, rich_help_panel="Get", epilog="Example: dgbench methods mfuser")
def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="One of them, with its options.", autocompletion=completion.methods)
    ] = None,
    form: FormatOpt = Format.TEXT,
    table: TableOpt = None,
) -> None:
    """List the methods: paper, towers, licence of the weights, whether the authors' code is followed, recipes."""
    from dgbench import render
    from dgbench.methods import details, listing

    render.show(listing() if name is None else details(name), form, table)
