"""A report as one file of HTML that needs no other: tables, plots and pictures are all inside of it."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from dgbench.data.labels import CLASSES
from dgbench.render.compare import class_changes, comparison_tables
from dgbench.render.confusion import Heat, heat
from dgbench.render.curves import draw_losses, draw_rate
from dgbench.render.leaderboard import group_tables
from dgbench.render.machines import cost_table, machine_tables
from dgbench.render.numbers import duration, percent
from dgbench.render.pages import page
from dgbench.render.pictures import draw_panel, draw_severity_panel, severity_panels
from dgbench.render.plots import Plots
from dgbench.render.protocols import preset_tables, with_hash
from dgbench.render.severity import severity_tables
from dgbench.render.table import ABSENT, Table
from dgbench.report.rows import Score

if TYPE_CHECKING:
    from markupsafe import Markup

    from dgbench.report.page import Example, Page, Run, Target

_MARKS = {"best": "bold", "second": "underlined"}
_PANEL, _TALL = (
    {"width": 4.8, "height": 3.3},
    {"width": 4.8, "height": 4.2},
)  # inches: on a narrow page its letters are as large as they are drawn
_KINDS = ("image", "truth", "prediction", "error")


class _Link(NamedTuple):
    to: str  # the id of an element of the page
    text: str


class _Bar(NamedTuple):
    name: str
    share: float  # of the full width, in percent
    text: str


class _Picture(NamedTuple):
    kind: str
    address: str  # a data: URI


class _Shown(NamedTuple):
    title: str
    pictures: tuple[_Picture, ...]


class _Score(NamedTuple):
    title: str
    text: str
    note: str
    bars: tuple[_Bar, ...]
    heat: Heat | None
    examples: tuple[_Shown, ...]


class _Section(NamedTuple):
    id: str
    title: str
    facts: tuple[tuple[str, str], ...]
    rows: tuple[_Link, ...]
    notes: tuple[str, ...]
    plots: tuple[Markup, ...]
    scores: tuple[_Score, ...]


class _Board(NamedTuple):
    table: Table
    details: tuple[Table, ...]


def report_page(found: Page) -> str:
    """Return the whole document."""
    plots = Plots()
    ids = {str(run.folder): f"run-{number}" for number, run in enumerate(found.runs)}
    boards, rows = _boards(found, ids)
    names = {run.folder: _Link(ids[str(run.folder)], run.name) for run in found.runs}
    severities = [one for run in found.runs for one in run.severities]
    # not of the present moment: the same runs make the same file
    newest = max(record.created for run in found.runs for record in run.records)
    return page(
        "report.html",
        marks=_MARKS,
        title=f"dgbench: {found.runs[0].name}" if len(found.runs) == 1 else f"dgbench: {len(found.runs)} runs",
        newest=newest[:16].replace("T", " "),
        notes=found.notes,
        comparison=comparison_tables(found.comparison) if found.comparison else [],
        changed_classes=class_changes(found.comparison) if found.comparison else [],
        boards=boards,
        costs=_linked_rows(cost_table(found.runs), [names[run.folder].to for run in found.runs], 0),
        tradeoff=_tradeoff(found, plots),
        severities=[
            (names[one.run], plots.plot(_name(domain), partial(draw_severity_panel, domain, curves), width=5.8, height=3.4))
            for one in severities
            for domain, curves in severity_panels(one).items()
        ],
        severity_tables=[_without_folder(table) for one in severities for table in severity_tables(one)],
        sections=[_section(run, ids, rows, plots) for run in found.runs],
        classes=[(one.name, "#{:02x}{:02x}{:02x}".format(*one.color)) for one in CLASSES],
        pictured=any(example.pictures for run in found.runs for target in run.targets for example in target.examples),
        presets=preset_tables(found.presets) if found.presets else [],
        machines=machine_tables(found.runs),
    )


def _name(domain: str) -> str:
    return f"mIoU over the level of corruptions of {domain}" if domain else "mIoU over the severity of weather"


def _boards(found: Page, ids: Mapping[str, str]) -> tuple[list[_Board], dict[str, list[_Link]]]:
    """Return the leaderboard's tables, whose rows lead to runs, and the rows in which each run stands."""
    boards: list[_Board] = []
    rows: dict[str, list[_Link]] = {}
    for number, (group, (own, *details)) in enumerate(group_tables(found.board)):
        linked = []
        for place, (row, cells) in enumerate(zip(group.rows, own.rows, strict=True)):
            anchor = f"row-{number}-{place}"
            runs = [ids[folder] for folder in row.runs or (row.origin,) if folder in ids]
            name = dataclasses.replace(cells[1], anchor=anchor, link=runs[0] if runs else "")
            linked.append((cells[0], name, *cells[2:]))
            for run in runs:
                text = "not ranked" if row.rank is None else f"rank {row.rank}"
                rows.setdefault(run, []).append(_Link(anchor, f"{text} on {', '.join(group.targets)}"))
        boards.append(_Board(dataclasses.replace(own, rows=tuple(linked), compact=None), tuple(details)))
    return boards, rows


def _linked_rows(table: Table, links: Sequence[str], column: int) -> Table:
    rows = []
    for cells, link in zip(table.rows, links, strict=True):
        named = dataclasses.replace(cells[column], link=link)
        rows.append((*cells[:column], named, *cells[column + 1 :]))
    return dataclasses.replace(table, rows=tuple(rows))


def _without_folder(table: Table) -> Table:
    return dataclasses.replace(table, legend=tuple(line for line in table.legend if not line.startswith("Records: ")))


def _tradeoff(found: Page, plots: Plots) -> list[Markup]:
    if (tradeoff := found.tradeoff) is None:
        return []
    return [
        plots.plot(f"mIoU against {tradeoff.unit}: {panel.title}", partial(draw_panel, panel, tradeoff), **_PANEL)
        for panel in tradeoff.panels
    ]


def _section(run: Run, ids: Mapping[str, str], rows: Mapping[str, Sequence[_Link]], plots: Plots) -> _Section:
    curves = []
    if run.curves is not None:
        curves = [
            plots.plot(f"losses of {run.name}", partial(draw_losses, run.curves), **_TALL),
            plots.plot(f"learning rate of {run.name}", partial(draw_rate, run.curves), **_TALL),
        ]
    own = ids[str(run.folder)]
    return _Section(
        own, run.name, tuple(_facts(run)), tuple(rows.get(own, ())), run.notes, tuple(curves), tuple(map(_score, run.targets))
    )


def _facts(run: Run) -> list[tuple[str, str]]:
    newest, trained = run.newest, run.trained
    source = newest.source + " (rendered)" * newest.source_rendered
    if newest.source_complete is False:
        source += f", {newest.source_images} of {newest.source_available} images"
    facts = [
        ("method", f"{newest.method} ({newest.variant})" if newest.variant else newest.method),
        ("recipe", f"{newest.recipe} #{newest.recipe_hash}"),
        ("trained on", source),
        ("steps, seed", f"{newest.steps or (trained.steps if trained else 0) or ABSENT}, {newest.seed}"),
        ("weights", f"sha256 {newest.checkpoint[:12]}"),
    ]
    if trained is not None and (seconds := trained.seconds.get("train")):
        facts.append(("training", duration(seconds)))
    return facts


def _score(target: Target) -> _Score:
    record = target.record
    seen = " (source)" if record.target in record.source.split("+") else ""
    seen += " (rendered)" if record.rendered else ""
    count = f"{record.n_images}" if record.complete else f"{record.n_images} of {record.n_available}"
    score = Score(record.miou, *record.interval) if record.miou is not None else None
    return _Score(
        f"{record.target}{seen}",
        f"mIoU {percent(score)} %, {count} images, {record.split}, protocol {with_hash(record.protocol, record.protocol_digest)}",
        target.note,
        tuple(map(_bar, CLASSES, record.iou)) if len(record.iou) == len(CLASSES) else (),
        heat(target.confusion) if target.confusion is not None and len(target.confusion) == len(CLASSES) else None,
        tuple(map(_shown, (example for example in target.examples if example.pictures))),
    )


def _bar(one: Any, iou: float | None) -> _Bar:
    return _Bar(one.name, 0.0 if iou is None else round(100 * iou, 1), ABSENT if iou is None else f"{100 * iou:.1f}")


def _shown(example: Example) -> _Shown:
    pictures = zip(_KINDS, example.pictures, strict=True)
    return _Shown(
        f"{example.place}: {example.id}, mIoU {100 * example.miou:.1f} %",
        tuple(_Picture(kind, _address(content)) for kind, content in pictures),
    )


def _address(picture: bytes) -> str:
    kind = "png" if picture.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
