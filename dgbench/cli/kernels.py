"""`dgbench kernels`: the operators' backends on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from dgbench.cli import completion
from dgbench.cli.options import DeviceOpt, Format, FormatOpt, QuietOpt, TableOpt, listed
from dgbench.cli.program import Command, Program

group = typer.Typer(cls=Program, help="List the operators' backends, build the CUDA kernels, time them.", no_args_is_help=True)


@group.command("list", cls=Command, epilog="Example: dgbench kernels list")
def kernels_list(form: FormatOpt = Format.TEXT, table: TableOpt = None) -> None:
    """List each operator's backends: whether they run here, which one runs by default, where the kernels' library lies."""
    from dgbench import render
    from dgbench.cost.kernels import listing

    render.show(listing(), form, table)


@group.command("build", cls=Command, epilog="Example: dgbench kernels build --arch sm_80 sm_90")
def kernels_build(
    ctx: typer.Context,
    architectures: Annotated[
        list[str] | None,
        typer.Option(
            "--arch",
            metavar="SM...",
            help="GPUs to build for: sm_80, sm_90, sm_100; default: those of this machine.",
            callback=listed,
        ),
    ] = None,
    form: FormatOpt = Format.TEXT,
    table: TableOpt = None,
    quiet: QuietOpt = False,
) -> None:
    """Compile the CUDA kernels ahead of time; needs nvcc, but no GPU when --arch names one."""
    from dgbench import render
    from dgbench.cost.kernels import build

    try:
        built = build(architectures or (), render.progress(quiet=quiet))
    except ValueError as error:
        raise typer.BadParameter(str(error), ctx=ctx, param_hint="'--arch'") from None
    render.show(built, form, table)


@group.command("bench", cls=Command, epilog="Example: dgbench kernels bench --op selective_scan --shape 2 2594 512 16")
def kernels_bench(
    ctx: typer.Context,
    ops: Annotated[
        list[str] | None,
        typer.Option(
            "--op", metavar="NAME...", help="Operators; default: all.", autocompletion=completion.operators, callback=listed
        ),
    ] = None,
    backends: Annotated[
        list[str] | None,
        typer.Option(
            "--backend",
            metavar="NAME...",
            help="Backends, the first to compare with; default: those that run here.",
            autocompletion=completion.backends,
            callback=listed,
        ),
    ] = None,
    shape: Annotated[
        tuple[int, int, int, int] | None, typer.Option(metavar="B L D N", min=1, help="Of the selective scan, timed alone then.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="NAME", help="fp32, bf16, fp16 or fp64; default: bf16 on a GPU, fp32 on a CPU.")
    ] = None,
    device: DeviceOpt = None,
    form: FormatOpt = Format.TEXT,
    table: TableOpt = None,
    quiet: QuietOpt = False,
) -> None:
    """Time the operators' backends on this machine, forward and forward + backward, beside what bounds them."""
    from dgbench import render
    from dgbench.names import check_backends

    check_backends(ops or (), backends or ())
    from dgbench.cost.kernels import bench

    if shape is not None and set(ops or ()) - {"selective_scan"}:
        raise typer.BadParameter("is the selective scan's: give it without --op", ctx=ctx, param_hint="'--shape'")
    timed = bench(ops or (), backends or (), render.progress(quiet=quiet), shape=shape, dtype=dtype, device=device)
    render.show(timed, form, table)
