"""Options and arguments that mean the same in every command."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dgbench.cli import completion


def listed(values: list[str] | None) -> list[str] | None:
    """Take `a,b` for `a b`: names have no commas, only files may."""
    if values is None:
        return None
    parts = [[value] if Path(value).exists() else value.split(",") for value in values]
    return [name for names in parts for part in names if (name := part.strip())] or values


def _device(ctx: typer.Context, name: str | None) -> str | None:
    """Refuse a wrong name at once; whether this machine has the device is seen when torch is there."""
    if name is None or ctx.resilient_parsing:
        return name
    from dgbench.engine.device import check_device

    return check_device(name)


class Format(StrEnum):
    """Output format of a result, on stdout or in a file; `Command` accepts `--json` for `--format json`."""

    TEXT = "text"
    CSV = "csv"
    MARKDOWN = "markdown"
    LATEX = "latex"
    HTML = "html"
    JSON = "json"


ENDINGS = {".txt": "text", ".csv": "csv", ".md": "markdown", ".tex": "latex", ".html": "html", ".json": "json"}
FormatOpt = Annotated[Format, typer.Option("--format", metavar="NAME", help="text, csv, markdown, latex, html or json.")]
# `Command` makes the format of its ending, unless one is named
TableOpt = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="FILE", help=f"Write the result there: {', '.join(ENDINGS)}, or any with --format."),
]
QuietOpt = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
DeviceOpt = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="cpu, cuda, cuda:1; default: a GPU if there is one.",
        callback=_device,
        autocompletion=completion.devices,
    ),
]
GpusOpt = Annotated[
    int | None,
    typer.Option("--gpus", metavar="NUMBER", min=1, max=1024, help="GPUs of this machine to use; with --device cpu, processes."),
]
VlmOpt = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Vision-language tower: tiny, eva02, clip, siglip, siglip2.", autocompletion=completion.vlms
    ),
]
VfmOpt = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Vision foundation tower: tiny, dinov2_l, dinov3_l, timm:<model>.", autocompletion=completion.vfms
    ),
]
BackboneOpt = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Tower of a method with one: tiny, dinov2_b, clip_b, timm:<model>.",
        autocompletion=completion.vfms,
    ),
]
RootOpt = Annotated[Path | None, typer.Option(metavar="FOLDER", help="Data root; default: DGBENCH_DATA, else ./data.")]
RunsOpt = Annotated[Path, typer.Option("--runs", metavar="FOLDER", help="Where runs are kept.")]
TargetsOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--targets",
        metavar="NAME...",
        help="Domains to score on, one or more.",
        autocompletion=completion.domains,
        callback=listed,
    ),
]


class Mode(StrEnum):
    """How models are run: `dgbench.engine.modes`, repeated here because options are parsed before the engine is imported."""

    EXACT = "exact"
    FAST = "fast"


ModeOpt = Annotated[
    Mode | None,
    typer.Option("--mode", metavar="NAME", help="exact (fp32), or fast: bf16, compiled, CUDA graphs; default: the recipe's."),
]
NoCompileOpt = Annotated[bool, typer.Option("--no-compile", help="With --mode fast: without torch.compile.")]
ProtocolOpt = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="See `dgbench protocols`; default: the recipe's.", autocompletion=completion.protocols),
]
SplitOpt = Annotated[str | None, typer.Option(metavar="NAME", help="Default: val, else the first that the domain has.")]
LabelMapOpt = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Read labels by this map, not the domain's own.", autocompletion=completion.label_maps),
]
DomainArg = Annotated[
    str, typer.Argument(metavar="DOMAIN", help="See `dgbench data list`.", autocompletion=completion.every_domain)
]
