"""Shell completion of values; imports are light and inside the functions."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import typer

from dgbench.errors import DgbenchError


def domains(ctx: typer.Context, incomplete: str) -> list[str]:
    from dgbench.data.catalog import names
    from dgbench.data.domains import DOMAINS

    given = ctx.params.get("targets") or ()
    known: Sequence[str] = tuple(DOMAINS)
    with contextlib.suppress(DgbenchError, OSError):  # a wrong declaration is reported by the command
        known = names(ctx.params.get("root"))
    left_out = {*given, *(name for name, row in DOMAINS.items() if row.role == "pretrain")}
    return [name for name in known if name.startswith(incomplete) and name not in left_out]


def every_domain(ctx: typer.Context, incomplete: str) -> list[str]:
    """Complete domains, also those that are neither a source nor a target."""
    from dgbench.data.domains import DOMAINS

    others = [name for name, row in DOMAINS.items() if row.role == "pretrain" and name.startswith(incomplete)]
    return [*domains(ctx, incomplete), *others]


def downloads(ctx: typer.Context, incomplete: str) -> list[str]:
    from mfuser.towers.table import TOWERS

    fetched = [name for name, row in TOWERS.items() if row.files and name.startswith(incomplete)]
    return [*domains(ctx, incomplete), *fetched]


def rendered(incomplete: str) -> list[str]:
    from dgbench.data.domains import DOMAINS

    return [name for name, row in DOMAINS.items() if row.procedural and name.startswith(incomplete)]


def vlms(incomplete: str) -> list[str]:
    from dgbench.names import towers

    return [name for name in towers("vlm") if name.startswith(incomplete)]


def vfms(incomplete: str) -> list[str]:
    from dgbench.names import towers

    return [name for name in towers("vfm") if name.startswith(incomplete)]


def devices(incomplete: str) -> list[str]:
    # a folder for each GPU that the driver has found; importing torch would take seconds
    count = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    return [name for name in ("cpu", "cuda", *(f"cuda:{i}" for i in range(count))) if name.startswith(incomplete)]


def label_maps(incomplete: str) -> list[str]:
    from dgbench.data.labels import LABEL_MAPS

    return [name for name in LABEL_MAPS if name.startswith(incomplete)]


def corruptions(incomplete: str) -> list[str]:
    from dgbench.data.corruptions import CORRUPTIONS

    return [name for name in CORRUPTIONS if name.startswith(incomplete)]


def operators(incomplete: str) -> list[str]:
    from dgbench.names import backends as known

    return [name for name in known() if name.startswith(incomplete)]


def backends(incomplete: str) -> list[str]:
    from dgbench.names import backends as known

    every = dict.fromkeys(name for names in known().values() for name in names)
    return [name for name in every if name.startswith(incomplete)]


def protocols(incomplete: str) -> list[str]:
    from dgbench.protocol import PROTOCOLS

    return [name for name in PROTOCOLS if name.startswith(incomplete)]


def keys(incomplete: str) -> list[str]:
    from dgbench.recipe import key_paths

    return [f"{path}=" for path in key_paths() if path.startswith(incomplete)]


def methods(incomplete: str) -> list[str]:
    from dgbench.names import methods as known

    return [name for name in known() if name.startswith(incomplete)]


def recipes(incomplete: str) -> list[str]:
    from dgbench.names import methods
    from dgbench.resources import recipes_dir

    root = recipes_dir()
    names = [path.relative_to(root).with_suffix("").as_posix() for path in sorted(root.rglob("[!_]*.yaml"))]
    return [name for name in (*names, *methods()) if name.startswith(incomplete)]


def runs(incomplete: str) -> list[str]:
    from dgbench.runs import runs_in

    found = runs_in(Path("runs"))
    folders = {run.parent for run in found} - {Path("runs")}
    return [name for name in ("latest", *(path.as_posix() for path in sorted([*found, *folders]))) if name.startswith(incomplete)]


def trackers(incomplete: str) -> list[str]:
    # those of accelerate, whose import takes seconds
    known = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
    return [name for name in known if name.startswith(incomplete)]
