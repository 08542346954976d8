"""Commands of the panel Measure: the cost of models, and scores under a growing shift."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dgbench.cli import completion
from dgbench.cli.options import (
    DeviceOpt,
    Format,
    FormatOpt,
    ModeOpt,
    NoCompileOpt,
    ProtocolOpt,
    QuietOpt,
    RootOpt,
    RunsOpt,
    TableOpt,
    listed,
)
from dgbench.cli.program import Command
from dgbench.cli.trainings import stopped
from dgbench.errors import Terminated

panel = typer.Typer()
_PICTURES = (".png", ".svg", ".pdf")


class Rule(StrEnum):
    """The conventions of `dgbench.cost.conventions`, repeated here because options are parsed before the engine is imported."""

    MAC = "mac"
    FLOP = "flop"
    PAPER = "paper"


class PublishedTable(StrEnum):
    """The names of `dgbench.cost.backbone_tables`, repeated here for the same reason."""

    ADE20K = "ade20k"
    MASKRCNN = "maskrcnn"


@panel.command(cls=Command, rich_help_panel="Measure", epilog="Example: dgbench profile mfuser --vlm eva02 --by-module")
def profile(
    ctx: typer.Context,
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="METHOD|RECIPE...", help="Default: every method and backbone.", autocompletion=completion.recipes),
    ] = None,
    vlm: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only with this vision-language tower.", autocompletion=completion.vlms)
    ] = None,
    vfm: Annotated[
        str | None, typer.Option(metavar="NAME", help="With this vision foundation tower.", autocompletion=completion.vfms)
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(metavar="NAME", help="Methods with one tower, with this one.", autocompletion=completion.vfms)
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE...",
            help="Change recipe keys: method.fuser=selfattn_concat.",
            autocompletion=completion.keys,
        ),
    ] = None,
    size: Annotated[
        list[int] | None,
        typer.Option(metavar="H [W]", min=1, help="Of the crop, a square by one number; default: 512, or the recipe's."),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(metavar="COUNT...", min=1, help="Images at a time; default: 1, and as many as pass fastest."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="NAME", help="fp32, bf16 or fp16; default: bf16 on a GPU, fp32 on a CPU.")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Time through torch.compile, as a whole.")] = False,
    mode: ModeOpt = None,
    no_compile: NoCompileOpt = False,
    slide: Annotated[
        tuple[int, int] | None, typer.Option(metavar="H W", min=1, help="Cost of an image of this size by sliding windows.")
    ] = None,
    by_module: Annotated[bool, typer.Option("--by-module", help="A table for each model: its parts.")] = False,
    fusion: Annotated[bool, typer.Option("--fusion", help="Compare the fusion layers, also over token counts.")] = False,
    published: Annotated[
        PublishedTable | None,
        typer.Option("--table", metavar="NAME", help="A published table of backbones beside own counts: ade20k or maskrcnn."),
    ] = None,
    anew: Annotated[bool, typer.Option("--anew", help="With --table: count again, in two minutes.")] = False,
    convention: Annotated[Rule, typer.Option(metavar="NAME", help="How operations are counted: mac, flop or paper.")] = Rule.MAC,
    plot: Annotated[
        Path | None, typer.Option(metavar="PICTURE", help="Draw accuracy, or --fusion's tokens, against cost: .png, .svg, .pdf.")
    ] = None,
    count_only: Annotated[bool, typer.Option("--count-only", help="Time nothing.")] = False,
    passes: Annotated[int, typer.Option(metavar="COUNT", min=1, help="How often all is built and timed again on a GPU.")] = 3,
    device: DeviceOpt = None,
    runs: RunsOpt = Path("runs"),
    form: FormatOpt = Format.TEXT,
    table: TableOpt = None,
    quiet: QuietOpt = False,
) -> None:
    """Count parameters and operations without weights; on a GPU also time models and measure memory and energy."""
    from dgbench import render, results
    from dgbench.names import check_models

    progress = render.progress(quiet=quiet)
    _check_picture(plot, ctx)
    if size is not None and len(size) > 2:
        raise typer.BadParameter("takes height and width, or one number for both", ctx=ctx, param_hint="'--size'")
    crop = (size[0], size[-1]) if size else None
    check_models(names or (), vlm, vfm, backbone)
    if published is not None:
        fixed: dict[str, object] = {"NAME": names, "--vlm": vlm, "--vfm": vfm, "--backbone": backbone, "--set": settings}
        fixed |= {"--size": size, "--batch": batch, "--slide": slide, "--compile": compiled, "--by-module": by_module}
        fixed |= {"--fusion": fusion, "--convention": convention is not Rule.MAC, "--mode": mode, "--no-compile": no_compile}
        if given := [flag for flag, value in fixed.items() if value]:
            raise typer.BadParameter(
                f"has its own networks, sizes and convention: give it without {', '.join(given)}", ctx=ctx, param_hint="'--table'"
            )
        from dgbench.cost.backbones import backbone_table

        compared = backbone_table(
            published.value, progress, anew=anew, dtype=dtype, device=device, timed=not count_only, passes=passes
        )
        render.show(compared, form, table)
        if plot is not None:
            render.note(f"plot: {render.draw_backbones(compared, plot)}")
        return
    if anew:
        raise typer.BadParameter("is for --table alone; other counts follow their sources", ctx=ctx, param_hint="'--anew'")
    if fusion:
        others = {"NAME": names, "--backbone": backbone, "--set": settings, "--slide": slide, "--compile": compiled}
        others |= {"--mode": mode, "--no-compile": no_compile}
        if given := [flag for flag, value in {**others, "--by-module": by_module}.items() if value]:
            raise typer.BadParameter(
                f"compares layers, not models: give it without {', '.join(given)}", ctx=ctx, param_hint="'--fusion'"
            )
        if batch is not None and len(batch) > 1:
            raise typer.BadParameter("takes one number with --fusion", ctx=ctx, param_hint="'--batch'")
        from dgbench.cost.fusion import profile_fusion

        layers = profile_fusion(
            progress,
            vfm=vfm,
            vlm=vlm,
            size=crop,
            convention=convention,
            batch=batch[0] if batch else None,
            dtype=dtype,
            device=device,
            timed=not count_only,
            records=results.query(runs),
            passes=passes,
        )
        render.show(layers, form, table)
        if plot is not None:
            render.note(f"plot: {render.draw_fusion(layers, plot)}")
        return
    from dgbench.cost.profile import profile as measure
    from dgbench.cost.profile import subjects

    kept = results.query(runs) if plot is not None else []  # a wrong --runs is reported before anything is timed
    chosen = subjects(names or (), vlm=vlm, vfm=vfm, backbone=backbone, settings=settings or (), size=crop)
    found = measure(
        chosen,
        progress,
        convention=convention,
        batches=batch or (),
        dtype=dtype,
        compiled=compiled,
        mode=mode.value if mode else "exact",
        compiles=False if no_compile else None,
        device=device,
        slide=slide,
        timed=not count_only,
        by_module=by_module,
        passes=passes,
    )
    render.show(found, form, table)
    if plot is not None:
        from dgbench.cost.tradeoff import tradeoff

        points = tradeoff(kept, progress, convention=convention, size=crop)
        render.note(f"plot: {render.draw_tradeoff(points, plot)}")
        if missing := sorted({label.partition(" (")[0] for panel in points.panels for label in panel.left_out}, key=str.lower):
            render.note(f"not drawn, no model here to count: {', '.join(missing)}")


@panel.command(
    cls=Command, rich_help_panel="Measure", epilog="Example: dgbench severity latest --targets streets-fog --plot fog.png"
)
def severity(
    ctx: typer.Context,
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="Run folder, record or `latest`.", autocompletion=completion.runs)
    ] = "latest",
    targets: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME...",
            help="Streets with weather, or any domains to corrupt; default: streets-night, -rain, -fog, -snow.",
            autocompletion=completion.domains,
            callback=listed,
        ),
    ] = None,
    steps: Annotated[
        list[float] | None, typer.Option(metavar="NUMBER...", min=0, max=1, help="Of weather; default: 0 0.25 0.5 0.75 1.")
    ] = None,
    corruptions: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME...",
            help="fog, contrast, motion_blur and others; default: all 12.",
            autocompletion=completion.corruptions,
            callback=listed,
        ),
    ] = None,
    levels: Annotated[
        list[int] | None, typer.Option(metavar="NUMBER...", min=1, max=5, help="Of corruptions; default: 1 2 3 4 5.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="COUNT", min=1, help="First images of each domain only; no table ranks such scores.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="PICTURE", help="Draw the curves: .png, .svg, .pdf.")] = None,
    protocol: ProtocolOpt = None,
    device: DeviceOpt = None,
    root: RootOpt = None,
    runs: RunsOpt = Path("runs"),
    form: FormatOpt = Format.TEXT,
    table: TableOpt = None,
    quiet: QuietOpt = False,
) -> None:
    """Score a run as weather or corruptions grow stronger, with the area under the curve."""
    from dgbench import protocol as protocols
    from dgbench import render
    from dgbench.engine.severity import CONDITIONS, measure, sweeps
    from dgbench.needs import check_scoring
    from dgbench.recipe import load_recipe
    from dgbench.runs import scored_run

    _check_picture(plot, ctx)
    rules = protocols.lookup(protocol).name if protocol else None
    folder = scored_run(run, runs)
    recipe = load_recipe(folder / "recipe.yaml", check_method=False, root=root)
    rows = recipe.data.rows(targets or CONDITIONS, root)
    wanted = sweeps(rows, steps=steps, corruptions=corruptions, levels=levels)
    check_scoring([("target", row, "val") for row in rows], root)
    progress = render.progress(quiet=quiet)
    try:
        found = measure(folder, wanted, progress=progress, device=device, root=root, protocol_name=rules, limit=limit)
    except (KeyboardInterrupt, Terminated) as stop:
        raise stopped(stop, f"call it again to go on: dgbench severity {shlex.quote(str(folder))} and the same options") from None
    render.show(found, form, table)
    if plot is not None:
        render.note(f"plot: {render.draw_severity(found, plot)}")


def _check_picture(path: Path | None, ctx: typer.Context) -> None:
    if path is not None and path.suffix.lower() not in _PICTURES:
        raise typer.BadParameter(f"{path} must end in {', '.join(_PICTURES)}", ctx=ctx, param_hint="'--plot'")
