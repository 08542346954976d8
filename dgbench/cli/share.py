"""Commands of the panel Share: checkpoints of other authors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dgbench.cli.options import Format, FormatOpt
from dgbench.cli.program import Command

panel = typer.Typer()


@panel.command(cls=Command, rich_help_panel="Share", epilog="Example: dgbench convert mfuser_eva02.pth runs/authors-eva02")
def convert(
    checkpoint: Annotated[Path, typer.Argument(metavar="AUTHORS.pth", help="A checkpoint of the authors' release.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The run folder to make.")],
    recipe: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="What it was trained by; default: as the method says.")
    ] = None,
    token_ids: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON with the 19x5 token ids, where there is no tokenizer.")
    ] = None,
    form: FormatOpt = Format.TEXT,
) -> None:
    """Make a run of a checkpoint that a method's authors published; no code of it is run."""
    from dgbench import render
    from dgbench.engine import convert as conversion

    ids = conversion.read_token_ids(token_ids) if token_ids else None
    render.show(conversion.convert(checkpoint, out, recipe=recipe, token_ids=ids), form)
