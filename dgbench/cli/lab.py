"""`dgbench lab`: the state-space models that Mamba rests on, shown, measured and trained (docs/ssm.md)."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from dgbench.cli.options import DeviceOpt, Format, FormatOpt, QuietOpt, RunsOpt, TableOpt, listed
from dgbench.cli.program import Command, Program
from dgbench.cli.refusals import refusal
from dgbench.cli.trainings import stopped
from dgbench.errors import DgbenchError, Terminated

group = typer.Typer(cls=Program, help="Show and measure the state-space models that Mamba rests on.", no_args_is_help=True)
_PICTURES = (".png", ".svg", ".pdf")
PlotOpt = Annotated[Path | None, typer.Option("--plot", metavar="PICTURE", help="Draw it: .png, .svg, .pdf.")]
StatesOpt = Annotated[int, typer.Option("--n", metavar="COUNT", min=1, max=256, help="States N.")]
StepOpt = Annotated[float, typer.Option("--step", metavar="SECONDS", min=1e-6, max=100, help="Time step.")]
BackendOpt = Annotated[str, typer.Option("--backend", metavar="NAME", help="Of the selective scan; see `dgbench kernels list`.")]


class Preset(StrEnum):
    """Those of `dgbench.lab.settings`, repeated here because options are parsed before it is imported."""

    CPU = "cpu"
    GPU = "gpu"
    PAPER = "paper"


class State(StrEnum):
    """Forms of S4."""

    DIAGONAL = "s4d"
    LOW_RANK = "s4"


@group.command(cls=Command, epilog="Example: dgbench lab hippo --n 3 --plot memory.png")
def hippo(
    ctx: typer.Context, states: StatesOpt = 3, plot: PlotOpt = None, form: FormatOpt = Format.TEXT, table: TableOpt = None
) -> None:
    """Show the matrix by which a state remembers a signal (HiPPO-LegS), its eigenvalues, and how well it remembers."""
    _check_picture(plot, ctx)
    from dgbench import render
    from dgbench.lab.matrices import hippo_view

    found = hippo_view(states)
    render.show(found, form, table)
    if plot is not None:
        render.note(f"plot: {render.draw_memory(found, plot)}")


@group.command(cls=Command, epilog="Example: dgbench lab discretize --n 3 --step 0.1")
def discretize(
    ctx: typer.Context,
    states: StatesOpt = 3,
    step: StepOpt = 0.1,
    plot: PlotOpt = None,
    form: FormatOpt = Format.TEXT,
    table: TableOpt = None,
) -> None:
    """Turn the equation into a recurrence by four rules, and compare their errors over the step."""
    _check_picture(plot, ctx)
    from dgbench import render
    from dgbench.lab.matrices import discretized_view

    found = discretized_view(states, step)
    render.show(found, form, table)
    if plot is not None:
        render.note(f"plot: {render.draw_step_errors(found, plot)}")


@group.command(cls=Command, epilog="Example: dgbench lab conv --length 12")
def conv(
    ctx: typer.Context,
    states: StatesOpt = 3,
    length: Annotated[int, typer.Option(metavar="COUNT", min=1, max=10_000, help="Steps L.")] = 12,
    step: StepOpt = 0.1,
    plot: PlotOpt = None,
    form: FormatOpt = Format.TEXT,
    table: TableOpt = None,
) -> None:
    """Run one system as a recurrence and as a convolution with its kernel C B, C A B, C A A B, ..., side by side."""
    _check_picture(plot, ctx)
    from dgbench import render
    from dgbench.lab.matrices import convolved_view

    found = convolved_view(states, length, step)
    render.show(found, form, table)
    if plot is not None:
        render.note(f"plot: {render.draw_convolution(found, plot)}")


@group.command(cls=Command, epilog="Example: dgbench lab scan --length 256 1024 4096")
def scan(
    ctx: typer.Context,
    lengths: Annotated[
        list[int] | None, typer.Option("--length", metavar="COUNT...", min=1, help="Default: 64 256 1024.")
    ] = None,
    elements: Annotated[int, typer.Option(metavar="COUNT", min=2, max=16, help="Elements that are shown step by step.")] = 4,
    chunk: Annotated[int, typer.Option(metavar="COUNT", min=1, help="Steps of a chunk.")] = 64,
    device: DeviceOpt = None,
    plot: PlotOpt = None,
    form: FormatOpt = Format.TEXT,
    table: TableOpt = None,
) -> None:
    """Scan a recurrence in order, as a tree and in chunks: step by step, work and depth, and milliseconds."""
    _check_picture(plot, ctx)
    from dgbench import render
    from dgbench.engine.device import pick_device
    from dgbench.lab.scanning import scans_view

    with _fitting("give a smaller --length"):
        found = scans_view(lengths or (64, 256, 1024), elements=elements, chunk=chunk, device=pick_device(device))
    render.show(found, form, table)
    if plot is not None:
        render.note(f"plot: {render.draw_scans(found, plot)}")


@group.command(cls=Command, epilog="Example: dgbench lab fusion --shape 2 2594 512 16")
def fusion(
    shape: Annotated[tuple[int, int, int, int], typer.Option(metavar="B L D N", min=1, help="Of the selective scan.")] = (
        1,
        1024,
        128,
        16,
    ),
    backend: BackendOpt = "auto",
    device: DeviceOpt = None,
    form: FormatOpt = Format.TEXT,
    table: TableOpt = None,
) -> None:
    """Compare the selective scan with all states in memory and fused into one kernel: bytes, milliseconds, memory."""
    from dgbench import render
    from dgbench.engine.device import pick_device
    from dgbench.lab.fusing import fusion_view

    with _fitting("give a smaller --shape"):
        found = fusion_view(shape, device=pick_device(device), backend=backend)
    render.show(found, form, table)


@group.command(cls=Command, epilog="Example: dgbench lab copying --preset cpu")
def copying(
    ctx: typer.Context,
    preset: Annotated[
        Preset | None,
        typer.Option(
            metavar="NAME",
            help="cpu: minutes, short sequences; gpu: length 4096, 15 minutes; paper: 400,000 steps. Default: cpu without a GPU, "
            "else gpu.",
        ),
    ] = None,
    rows: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME...", help="nogate-s4, h3-hyena, mamba-s6, ...; default: all.", callback=listed),
    ] = None,
    length: Annotated[int | None, typer.Option(metavar="COUNT", help="Symbols of noise.")] = None,
    total: Annotated[bool, typer.Option("--total", help="--length is that of the whole sequence.")] = False,
    vocab: Annotated[int | None, typer.Option(metavar="COUNT", help="Symbols, with noise and marker.")] = None,
    memorize: Annotated[int | None, typer.Option(metavar="COUNT", help="Tokens to give back.")] = None,
    steps: Annotated[int | None, typer.Option(metavar="COUNT", help="Of each training.")] = None,
    seeds: Annotated[list[int] | None, typer.Option(metavar="NUMBER...", min=0, help="A training of each row for each.")] = None,
    depth: Annotated[int | None, typer.Option(metavar="COUNT", help="Blocks; 2 in the paper.")] = None,
    batch: Annotated[int | None, typer.Option(metavar="COUNT", help="Sequences of a step.")] = None,
    lr: Annotated[float | None, typer.Option(metavar="RATE", help="Of Adam, constant.")] = None,
    s4: Annotated[State | None, typer.Option(metavar="NAME", help="s4d: diagonal; s4: diagonal plus low rank.")] = None,
    no_glu: Annotated[bool, typer.Option("--no-glu", help="Behind S4 without a gate, a plain projection.")] = False,
    minutes: Annotated[
        float | None, typer.Option(metavar="COUNT", min=0.01, help="At most so many in all; what is left can be resumed.")
    ] = None,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Go on with a run folder, or `latest`.")] = None,
    backend: BackendOpt = "auto",
    graphs: Annotated[bool, typer.Option(help="On a GPU, record a step once and replay it.")] = True,
    plot: PlotOpt = None,
    device: DeviceOpt = None,
    runs: RunsOpt = Path("runs"),
    form: FormatOpt = Format.TEXT,
    table: TableOpt = None,
    quiet: QuietOpt = False,
) -> None:
    """Train the rows of selective copying (Mamba, table 1): token and sequence accuracy, curves, beside the published figures."""
    _check_picture(plot, ctx)
    given: dict[str, Any] = {
        "length": length,
        "total": total or None,
        "vocab": vocab,
        "memorize": memorize,
        "steps": steps,
        "depth": depth,
        "batch": batch,
        "lr": lr,
        "s4": None if s4 is None else s4.value,
        "glu": False if no_glu else None,
        "rows": tuple(dict.fromkeys(rows)) if rows else None,
        "seeds": tuple(dict.fromkeys(seeds)) if seeds else None,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if resume is not None and (given or preset):
        flags = ", ".join(f"--{name}" for name in (*given, *(("preset",) if preset else ())))
        raise typer.BadParameter(f"a run keeps its settings: give it without {flags}", ctx=ctx, param_hint="'--resume'")
    from dgbench import render
    from dgbench.lab.settings import chosen

    if preset is None and resume is None:
        from dgbench.engine.device import pick_device

        preset = Preset.GPU if pick_device(device).type == "cuda" else Preset.CPU
    settings, limit = (None, minutes) if preset is None else chosen(preset.value, given, minutes)
    from dgbench.engine.device import pick_device
    from dgbench.lab.copying import begin, carry_out, check_scan, run_named
    from dgbench.runs import new_run

    where = pick_device(device)
    check_scan(backend)  # before there is a run, and before rows that have no scan are trained
    progress = render.progress(quiet=quiet)
    if settings is None:
        run = run_named(resume or "latest", runs)
    else:
        run = new_run(runs, "lab-copying")
        begin(settings, run)
    try:
        with _fitting("give a smaller --length or --batch"):
            found = carry_out(run, device=where, progress=progress, minutes=limit, backend=backend, graphs=graphs)
    except (KeyboardInterrupt, Terminated) as stop:
        raise stopped(stop, f"go on with: dgbench lab copying --resume {shlex.quote(str(run))}") from None
    render.show(found, form, table)
    if plot is not None:
        render.note(f"plot: {render.draw_copying(found, plot)}")


@group.command(cls=Command, epilog="Example: dgbench lab speed --plot speed.png")
def speed(
    ctx: typer.Context,
    lengths: Annotated[
        list[int] | None,
        typer.Option("--length", metavar="COUNT...", min=1, help="Of training; default: 512 to 32768, 64 to 1024 on a CPU."),
    ] = None,
    generated: Annotated[
        list[int] | None,
        typer.Option(
            "--behind",
            metavar="COUNT...",
            min=1,
            help="Tokens behind which one is generated; default: 1024 to 65536, 64 to 1024 on a CPU.",
        ),
    ] = None,
    dim: Annotated[int | None, typer.Option(metavar="COUNT", help="Width, a multiple of 64; default: 1024, 64 on a CPU.")] = None,
    depth: Annotated[
        int | None, typer.Option(metavar="COUNT", help="Mamba blocks that generate, even; default: 24, 4 on a CPU.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(metavar="COUNT", min=1, help="Of a training step; default: 65536, 1024 on a CPU.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(metavar="COUNT", min=1, help="Sequences that generate at once; default: 16, 2 on a CPU.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="NAME", help="fp32 or bf16; default: bf16 on a GPU, fp32 on a CPU.")
    ] = None,
    seconds: Annotated[float, typer.Option(metavar="COUNT", min=0.001, help="For each timing.")] = 0.3,
    plot: PlotOpt = None,
    device: DeviceOpt = None,
    form: FormatOpt = Format.TEXT,
    table: TableOpt = None,
    quiet: QuietOpt = False,
) -> None:
    """Time training of four layers over the length, and generation by Mamba and by a Transformer with a cache."""
    _check_picture(plot, ctx)
    from dgbench import render
    from dgbench.engine.device import pick_device
    from dgbench.lab.speeds import sized, speeds

    where = pick_device(device)
    asked = {
        "lengths": lengths,
        "generated": generated,
        "dim": dim,
        "depth": depth,
        "tokens": tokens,
        "batch": batch,
        "dtype": dtype,
    }
    size = sized(where, {name: value for name, value in asked.items() if value is not None})
    with _fitting("give a smaller --length, --behind, --dim or --batch"):
        found = speeds(size, device=where, progress=render.progress(quiet=quiet), seconds=seconds)
    render.show(found, form, table)
    if plot is not None:
        render.note(f"plot: {render.draw_speeds(found, plot)}")


@contextlib.contextmanager
def _fitting(advice: str) -> Iterator[None]:
    """Say what makes less when the memory does not suffice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        told = refusal(error)
        if told is None or not told[0].startswith("out of memory"):
            raise
        raise DgbenchError(told[0], advice) from error


def _check_picture(path: Path | None, ctx: typer.Context) -> None:
    if path is not None and path.suffix.lower() not in _PICTURES:
        raise typer.BadParameter(f"{path} must end in {', '.join(_PICTURES)}", ctx=ctx, param_hint="'--plot'")
