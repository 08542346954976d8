"""Tables of towers and domains: which exist, what a download would need, and what it fetched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dgbench.render.flat import FlatRow, flat_row, flat_rows
from dgbench.render.numbers import byte_size
from dgbench.render.table import ABSENT, Cell, Table

if TYPE_CHECKING:
    from dgbench.download.command import Stored
    from dgbench.download.orders import Plan
    from dgbench.share import Push
    from mfuser.towers.hub import Fetched, Model


def model_tables(models: Sequence[Model]) -> list[Table]:
    rows = []
    for model in models:
        if model.repo is None:
            size = ABSENT if model.gigabytes is None else f"{1000 * model.gigabytes:.1f} MB"
            texts = (model.name, model.role, size, model.licence or ABSENT)
            last = (
                (Cell(ABSENT), Cell("trained from scratch")) if model.file is None else (Cell("here", "good"), Cell("in dgbench"))
            )
            rows.append((*map(Cell, texts), *last))
            continue
        if not model.missing:
            here = Cell("here", "good")
        else:
            here = Cell(f"all but {', '.join(model.missing)}", "warn") if model.path else Cell("not here", "dim")
        size = ABSENT if model.gigabytes is None else f"{model.gigabytes:g} GB"
        texts = (model.name, model.role, size, model.licence or ABSENT)
        rows.append((*map(Cell, texts), here, Cell(model.repo)))
    legend = (
        "vfm: vision foundation model, vlm: vision-language model. Fetch by name: dgbench download NAME...",
        "Licences are those of the weights, by their owners; --json has the paths.",
    )
    header = ("tower", "role", "size", "licence", "on disk", "Hub repository")
    return [Table("", header, tuple(rows), left=True, legend=legend)]


def downloaded_tables(rows: Sequence[Fetched | Stored]) -> list[Table]:
    """Return towers and domains, a table each."""
    towers = [row for row in rows if hasattr(row, "repo")]
    stored = [row for row in rows if not hasattr(row, "repo")]
    return [*(_fetched(towers) if towers else []), *(_stored(stored) if stored else [])]  # type: ignore[arg-type]


def _fetched(fetched: Sequence[Fetched]) -> list[Table]:
    rows = []
    for row in fetched:
        size = ABSENT if row.bytes is None else f"{row.bytes / 1e6:,.1f} MB"
        state = {"here": "already here"}.get(row.state, row.state)
        rows.append((Cell(row.name), Cell(row.file or ABSENT), Cell(size), Cell(state), Cell(row.checked or ABSENT)))
    places = tuple(f"{row.name}: {row.path}" for row in fetched if row.path)
    return [Table("", ("tower", "file", "size", "state", "checked"), tuple(rows), keys=2, left=True, legend=places)]


def _stored(stored: Sequence[Stored]) -> list[Table]:
    rows = []
    for row in stored:
        files = ABSENT if row.files is None else f"{row.files:,}"
        texts = (row.name, files, byte_size(row.bytes), {"here": "already here"}.get(row.state, row.state), row.checked or ABSENT)
        rows.append(tuple(map(Cell, texts)))
    legend = [f"{row.name}: {row.folder}{f' ({row.note})' if row.note else ''}" for row in stored]
    return [Table("", ("domain", "files", "size", "state", "checked"), tuple(rows), left=True, legend=tuple(legend))]


def plan_tables(plan: Plan) -> list[Table]:
    rows = []
    for need in plan.needs:
        what = {"here": "", "to link": ""}.get(need.state, f"{need.files:,}" if need.files else ABSENT)
        size = "" if need.state in ("here", "to link") else byte_size(need.bytes)
        state = Cell(need.state, "good" if need.state == "here" else "warn" if need.state == "by hand" else "")
        rows.append((Cell(need.name), state, Cell(what), Cell(size), Cell(need.licence or ABSENT)))
    legend = [
        f"{byte_size(plan.bytes)} to bring, at most {byte_size(plan.room)} of room needed, "
        f"{byte_size(plan.free)} free in {plan.place}."
    ]
    legend += [f"{need.name}: {need.note}." for need in plan.needs if need.note]
    if by_hand := [need.name for need in plan.needs if need.state == "by hand"]:
        legend.append(f"By hand: download in a browser, then --from FOLDER; dgbench download {by_hand[0]} tells the steps.")
    return [Table("", ("name", "state", "files", "size", "licence"), tuple(rows), left=True, legend=tuple(legend))]


def push_tables(found: Push) -> list[Table]:
    rows = tuple((Cell(file.file), Cell(byte_size(file.bytes))) for file in found.files)
    legend = [f"{byte_size(found.bytes)} in {len(found.files)} files, and a model card with the scores."]
    if found.left_out:
        legend.append(f"Left out, as they may show images that may not be redistributed: {', '.join(found.left_out)}.")
    kind = "private" if found.private else "PUBLIC"
    return [Table(f"{found.run} to the {kind} repository {found.repo}", ("file", "size"), rows, legend=tuple(legend))]


def push_rows(found: Push) -> list[FlatRow]:
    """Return a row for each file."""
    return [flat_row(file, repo=found.repo, private=found.private) for file in found.files]


def plan_rows(plan: Plan) -> list[FlatRow]:
    """Return a row for each domain and tower that was named."""
    return flat_rows(plan.needs)
