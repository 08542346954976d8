"""Commands of the panel Share: checkpoints of other authors, runs with all their weights, and runs on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dgbench.cli import completion
from dgbench.cli.options import Format, FormatOpt, RunsOpt
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


@panel.command(cls=Command, rich_help_panel="Share", epilog="Example: dgbench export latest runs/whole --dtype bf16")
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder or `latest`.", autocompletion=completion.runs)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The run folder to make.")],
    dtype: Annotated[
        str | None, typer.Option(metavar="NAME", help="fp32, bf16 or fp16 for the weights; default: as they are.")
    ] = None,
    runs: RunsOpt = Path("runs"),
    form: FormatOpt = Format.TEXT,
) -> None:
    """Write a run with all its weights, for machines that do not have the files of its frozen towers."""
    from dgbench import render
    from dgbench.engine import export as exporting
    from dgbench.runs import scored_run

    render.show(exporting.export(scored_run(run, runs), out, dtype=dtype), form)


@panel.command(cls=Command, rich_help_panel="Share", epilog="Example: dgbench push latest me/mfuser-tiny")
def push(
    ctx: typer.Context,
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder or `latest`.", autocompletion=completion.runs)],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the Hugging Face Hub; made if need be.")],
    public: Annotated[bool, typer.Option("--public", help="Everybody may see it; default: private.")] = False,
    images: Annotated[bool, typer.Option("--with-images", help="Pictures, too; mind the licences of what they show.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry: Annotated[bool, typer.Option("--dry-run", help="Only say what would be uploaded.")] = False,
    runs: RunsOpt = Path("runs"),
    form: FormatOpt = Format.TEXT,
) -> None:
    """Upload a finished run to the Hugging Face Hub, private unless --public."""
    import sys

    from dgbench import render, share
    from dgbench.runs import find_run

    planned = share.plan(find_run(run, runs, needs="checkpoint"), repo, public=public, images=images)
    if dry:
        render.show(planned, form)
        return
    render.tell(planned)
    if not yes:
        if not sys.stdin.isatty():
            raise typer.BadParameter("is needed where nobody can be asked", ctx=ctx, param_hint="'--yes'")
        typer.confirm("upload this?", abort=True, err=True)
    done = share.push(planned)
    render.note(f"uploaded: {done.url}")
    if form != Format.TEXT:
        render.show(done, form)


@panel.command(cls=Command, rich_help_panel="Share", epilog="Example: dgbench pull me/mfuser-tiny")
def pull(
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the Hugging Face Hub.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FOLDER", help="Run folder to make; default: NAME in --runs.")
    ] = None,
    revision: Annotated[str | None, typer.Option(metavar="NAME", help="Branch, tag or commit.")] = None,
    runs: RunsOpt = Path("runs"),
    form: FormatOpt = Format.TEXT,
) -> None:
    """Fetch a run that was pushed, check every file of it, and show its scores."""
    from dgbench import render, results, share

    folder = share.pull(repo, out or runs / repo.rpartition("/")[2], revision=revision)
    render.show([record for record in results.query(folder) if record.kind == "eval"], form)
    render.note(f"run: {folder}")
    if towers := share.towers_needed(folder):
        render.note(f"its frozen towers are not part of it; get their files: dgbench download {' '.join(towers)}")
