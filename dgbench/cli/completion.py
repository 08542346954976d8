"""What a shell is offered for a begun value; light imports only, and those in the functions."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import typer

from dgbench.errors import DgbenchError


def domains(ctx: typer.Context, incomplete: str) -> list[str]:
    from dgbench.data.domains import DOMAINS, names

    given = ctx.params.get("targets") or ()
    known: Sequence[str] = tuple(DOMAINS)
    with contextlib.suppress(DgbenchError, OSError):  # a declaration that is wrong is the command's to tell
        known = names()
    return [name for name in known if name.startswith(incomplete) and name not in given]


def protocols(incomplete: str) -> list[str]:
    from dgbench.protocol import PROTOCOLS

    return [name for name in PROTOCOLS if name.startswith(incomplete)]


def keys(incomplete: str) -> list[str]:
    from dgbench.recipe import key_paths

    return [f"{path}=" for path in key_paths() if path.startswith(incomplete)]


def recipes(incomplete: str) -> list[str]:
    from dgbench.resources import recipes_dir

    root = recipes_dir()
    names = [path.relative_to(root).with_suffix("").as_posix() for path in sorted(root.rglob("[!_]*.yaml"))]
    methods = Path(__file__).parents[2] / "mfuser" / "methods"
    names += [path.stem.replace("_", "-") for path in sorted(methods.glob("[!_]*.py"))]
    return [name for name in names if name.startswith(incomplete)]


def runs(incomplete: str) -> list[str]:
    found = [path.parent.as_posix() for path in sorted(Path("runs").glob("*/recipe.yaml"))]
    return [name for name in ("latest", *found) if name.startswith(incomplete)]
