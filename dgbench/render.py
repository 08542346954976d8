"""The only file that draws. A result becomes a table: Rich on a terminal, aligned text elsewhere, or JSON.

Results go to stdout, everything else to stderr. Meaning never rests on colour: the best value carries a mark.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dgbench.progress import Bars, Progress, Silent
from dgbench.results import finite

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from dgbench.data.export import Exported
    from dgbench.data.listing import ClassShare, DomainState, Sheet
    from dgbench.data.orders import Plan
    from dgbench.data.verify import Report
    from dgbench.doctor import Check
    from dgbench.download import Stored
    from dgbench.engine.convert import Converted
    from dgbench.engine.predict import Prediction
    from dgbench.kernels import Bench, Built, KernelList, TimedCase
    from dgbench.protocol import Preset
    from dgbench.report.leaderboard import Group, Leaderboard, Row, Score
    from dgbench.results import Record
    from mfuser.hub import Fetched, Model

WIDTH = 100
ABSENT = "–"
_GAP = "  "


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell's text; `style` only underlines what the text already says."""

    text: str
    style: Literal["", "best", "dim", "good", "bad", "warn"] = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A table as a value. The first `keys` columns name a row; they are left-aligned and repeated when columns wrap."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    keys: int = 1
    left: bool = False  # the other columns hold text, not numbers
    legend: tuple[str, ...] = ()
    compact: Table | None = None  # says less in less width


_STYLES = {"": "", "best": "bold", "dim": "dim", "good": "green", "bad": "bold red", "warn": "yellow"}


def show(result: object, *, as_json: bool = False) -> None:
    """Print a typed result, or a list of them, to stdout."""
    if as_json:
        _write(json.dumps(_plain_data(result), indent=1, ensure_ascii=False, allow_nan=False))
        return
    first = result[0] if isinstance(result, Sequence) and result else result
    tables = _TABLES[type(first).__name__](result) if first else [Table("nothing to show", (), ())]
    console = _console()
    for number, table in enumerate(tables):
        if number:
            _write("")
        if console.is_terminal:
            _draw_rich(table, console)
        else:
            _write(plain(table))


def tell(result: object) -> None:
    """Print a typed result as text on stderr: what a command says before it does its work."""
    for table in _TABLES[type(result).__name__](result):
        note(plain(table))


def plain(table: Table, width: int = WIDTH) -> str:
    """Return the table as aligned text without glyphs, for pipes and files."""
    lines = [table.title] if table.title else []
    for part in _blocks(table, width):
        widths = [max(len(row[i].text) for row in part) for i in range(len(part[0]))]
        for row in part:
            cells = (_aligned(cell.text, widths[i], left=i < table.keys or table.left) for i, cell in enumerate(row))
            lines.append(_GAP.join(cells).rstrip())
    return "\n".join([*lines, *table.legend])


def _aligned(text: str, width: int, *, left: bool) -> str:
    return text.ljust(width) if left else text.rjust(width)


def _widths(table: Table) -> list[int]:
    return [max(map(len, (title, *(row[i].text for row in table.rows)))) for i, title in enumerate(table.header)]


def _fitting(table: Table, width: int) -> Table:
    """Return the compact form if only that fits."""
    needed = sum(_widths(table)) + len(_GAP) * (len(table.header) - 1)
    return table.compact if needed > width and table.compact is not None else table


def _blocks(table: Table, width: int) -> list[list[tuple[Cell, ...]]]:
    """Return header and rows, cut into several blocks of columns if they do not fit side by side."""
    if not table.rows:
        return []
    everything = [tuple(Cell(text) for text in table.header), *table.rows]
    widths = _widths(table)
    key_width = sum(w + len(_GAP) for w in widths[: table.keys])
    blocks: list[list[int]] = [[]]
    used = key_width
    for column in range(table.keys, len(widths)):
        if used + widths[column] > width and blocks[-1]:
            blocks.append([])
            used = key_width
        blocks[-1].append(column)
        used += widths[column] + len(_GAP)
    chosen = [[*range(table.keys), *block] for block in blocks]
    return [[tuple(row[i] for i in columns) for row in everything] for columns in chosen]


def _draw_rich(table: Table, console: Console) -> None:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    # one space of padding and one divider make the same gap as in plain text; the box frames each side by one
    width = console.width - 3
    table = _fitting(table, width)
    if table.title:
        console.print(Text(table.title, style="bold"))
    for part in _blocks(table, width):
        drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for i, cell in enumerate(part[0]):
            drawn.add_column(cell.text, justify="left" if i < table.keys or table.left else "right", overflow="fold")
        for row in part[1:]:
            drawn.add_row(*(Text(cell.text, style=_STYLES[cell.style]) for cell in row))
        console.print(drawn)
    for line in table.legend:
        console.print(Text(line, style="dim"), soft_wrap=False)


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False)
    if console.is_terminal:
        console.width = min(console.width, WIDTH)
    return console


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")


def _plain_data(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain_data(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_data(item) for item in value]
    return finite(value)


# ---- numbers


def percent(score: Score | None, digits: int = 1, mark: str = "", *, interval: bool = True) -> str:
    """Return a score as `43.1 ±1.2`, in percent."""
    if score is None:
        return ABSENT
    shown = interval and score.half is not None and math.isfinite(score.half)
    half = f" ±{100 * (score.half or 0):.{digits}f}" if shown else ""
    return f"{100 * score.miou:.{digits}f}{mark}{half}"


def duration(seconds: float) -> str:
    """Return seconds as `9s`, `1:05` or `2:03:00`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


# ---- leaderboard


def _leaderboard(board: Leaderboard) -> list[Table]:
    tables: list[Table] = []
    for group in board.groups:
        # what two groups of one title differ in is inside their protocol hashes
        alike = any((g.source, g.targets, g.protocol, g.protocol_digest)
                    == (group.source, group.targets, group.protocol, group.protocol_digest)
                    for g in board.groups[: len(tables)])  # fmt: skip
        tables.append(_own(group, "; at another image size or label map than the table above" if alike else ""))
    if not tables:
        tables = [Table("No results of your own yet: dgbench train streets/mfuser", (), ())]
    return tables + [_published(group) for group in board.published]


def _own(group: Group, remark: str = "") -> Table:
    ranked = [row for row in group.rows if row.rank is not None]
    columns = [_all_scores(row) for row in ranked]
    best = [_best(column) for column in zip(*columns, strict=True)]
    prefix = _shared_prefix(group.targets)
    targets = f", scored on {prefix}*" if prefix else ""
    header = ("#", "method", "source val", *(target.removeprefix(prefix) for target in group.targets), "mean", "images")
    wide, narrow = [], []
    for row, label in zip(group.rows, _labels(group.rows), strict=True):
        keys = (Cell("ref" if row.kind == "reference" else str(row.rank or ABSENT)), Cell(label))
        marked = best if row.rank is not None else [None] * len(header)
        n_images = sum(score.n_images or 0 for score in row.scores if score)
        scores = list(zip(_all_scores(row), marked, strict=False))
        cells = (*keys, *(_score_cell(*pair) for pair in scores), Cell(str(n_images) if n_images else ABSENT))
        short = (*keys, *(_score_cell(*pair, interval=False) for pair in scores))
        dim = row.kind == "reference"
        wide.append(tuple(dataclasses.replace(cell, style="dim") if dim else cell for cell in cells))
        narrow.append(tuple(dataclasses.replace(cell, style="dim") if dim else cell for cell in short))
    protocol = _protocol(group.protocol, group.protocol_digest)
    title = f"Trained on {group.source}{targets}, protocol {protocol}: mIoU in %{remark}"
    compact = Table(title, header[:-1], tuple(narrow), keys=2, legend=_own_legend(group, intervals=False))
    return Table(title, header, tuple(wide), keys=2, legend=_own_legend(group, intervals=True), compact=compact)


def _all_scores(row: Row) -> tuple[Score | None, ...]:
    return (row.source_score, *row.scores, row.mean)


def _labels(rows: Sequence[Row]) -> list[str]:
    """Return for each row the shortest name that no other row has."""
    forms: list[Callable[[Row], str]] = [
        _method,
        lambda row: row.recipe,
        lambda row: f"{row.recipe}#{row.recipe_hash[:4]}",
        lambda row: f"{row.recipe}#{row.recipe_hash[:4]} {row.created[5:16].replace('T', ' ')}",
    ]
    return [
        next((form(row) for form in forms if sum(form(other) == form(row) for other in rows) == 1), forms[-1](row))
        for row in rows
    ]


def _own_legend(group: Group, *, intervals: bool) -> tuple[str, ...]:
    lines = ["Higher is better; * best."]
    if not intervals:
        lines = ["Intervals and image counts: in a wider terminal or with --json. Higher is better; * best."]
    elif any(score.half is not None for row in group.rows for score in _all_scores(row) if score):
        lines = ["Higher is better; * best. ±: half the 95 % bootstrap interval over images (not over training runs)."]
    lines.append(f"source val: {group.source}, seen in training. mean: over the targets, only where all are complete.")
    if any(score.partial for row in group.rows for score in _all_scores(row) if score):
        lines.append("~ only some images of the split: not ranked, not averaged.")
    for row in group.rows:
        if row.kind == "reference":
            lines.append(f"ref: expected of recipe {row.recipe}, not run here. From: {row.origin}.")
    if group.other_targets:
        lines.append(f"Also scored: {', '.join(group.other_targets)} (dgbench leaderboard --targets ...).")
    return tuple(lines)


def _published(group: Group) -> Table:
    rows = tuple(
        (Cell("pub", "dim"), Cell(row.method + ("†" if row.note else ""), "dim"), Cell(row.variant, "dim"),
         *(Cell(percent(score, 2), "dim") for score in (*row.scores, row.mean)))
        for row in group.rows
    )  # fmt: skip
    # every row of a table has one citation
    legend = [f"From {group.rows[0].origin}.", "mean: of the values shown, unweighted."]
    legend += [f"† {row.method}, {row.variant}: {row.note}." for row in group.rows if row.note]
    title = f"Published, trained on {group.source}: mIoU in % as printed, protocols differ by row, not ranked"
    return Table(title, ("", "method", "backbone", *group.targets, "mean"), rows, keys=3, legend=tuple(legend))


def _best(scores: Iterable[Score | None]) -> float | None:
    values = [round(score.miou, 3) for score in scores if score and not score.partial]
    return max(values) if len(values) > 1 else None


def _score_cell(score: Score | None, best: float | None, *, interval: bool = True) -> Cell:
    if score is not None and score.partial:
        return Cell(percent(score, mark="~", interval=interval))
    if score is not None and best is not None and round(score.miou, 3) == best:
        return Cell(percent(score, mark="*", interval=interval), "best")
    return Cell(percent(score, interval=interval))


def _protocol(name: str, digest: str) -> str:
    return f"{name} ({digest})" if digest else name


def _method(row: Row) -> str:
    return f"{row.method} ({row.variant})" if row.variant else row.method


def _shared_prefix(targets: Sequence[str]) -> str:
    return "streets-" if targets and all(target.startswith("streets-") for target in targets) else ""


# ---- other results


def _records(records: Sequence[Record]) -> list[Table]:
    rows = []
    subsets = sorted({key for record in records for key in record.extra if key.startswith("miou")}, reverse=True)
    for record in records:
        low, high = record.interval
        interval = ABSENT if low is None or high is None or math.isnan(low) else f"[{100 * low:.1f}, {100 * high:.1f}]"
        miou = ABSENT if record.miou is None else f"{100 * record.miou:.1f}"
        total = record.seconds.get("total")
        count = str(record.n_images) if record.complete else f"{record.n_images} of {record.n_available}"
        seen = " (source)" if record.target == record.source else ""
        over = [record.extra.get(key) for key in subsets]
        rows.append((Cell(record.target + seen), Cell(miou),
                     *(Cell(f"{100 * value:.1f}" if isinstance(value, float) else ABSENT) for value in over),
                     Cell(interval), Cell(count),
                     Cell(ABSENT if total is None else duration(total)),
                     Cell(f"{record.n_images / total:.1f}" if total else ABSENT)))  # fmt: skip
    first = records[0]
    variant = f" ({first.variant})" if first.variant else ""
    protocol = _protocol(first.protocol, first.protocol_digest)
    title = f"{first.method}{variant}, recipe {first.recipe}, trained on {first.source}, protocol {protocol}"
    legend = ["mIoU in %, higher is better; 95 % bootstrap interval over images."]
    if subsets:
        legend.append("mIoU16, mIoU13: over the classes that SYNTHIA has, and those without wall, fence and pole.")
    if first.run is not None:
        legend.append(f"Records: {first.run}")
    header = ("domain", "mIoU", *(key.replace("miou", "mIoU") for key in subsets), "interval", "images", "time", "images/s")
    return [Table(title, header, tuple(rows), legend=tuple(legend))]


def _presets(found: Sequence[Preset]) -> list[Table]:
    rows = [(Cell(what), *(Cell(preset.rules[what]) for preset in found)) for what in found[0].rules]
    rows = [(Cell("hash"), *(Cell(preset.digest) for preset in found)), *rows]
    legend = [f"{preset.name}: {preset.follows}." for preset in found]
    legend.append("Sizes are W x H. Scores under two hashes are never ranked together; docs/protocol.md explains each line.")
    return [Table("", ("", *(preset.name for preset in found)), tuple(rows), left=True, legend=tuple(legend))]


def _checks(checks: Sequence[Check]) -> list[Table]:
    styles: dict[str, Literal["good", "warn", "bad", "dim"]] = {
        "ok": "good",
        "warn": "warn",
        "fail": "bad",
        "info": "dim",
    }
    rows = tuple((Cell(check.state, styles[check.state]), Cell(check.name), Cell(check.detail)) for check in checks)
    legend = tuple(f"hint ({check.name}): {check.hint}" for check in checks if check.hint)
    return [Table("", ("state", "check", "found"), rows, keys=2, left=True, legend=legend)]


def _predictions(predictions: Sequence[Prediction]) -> list[Table]:
    rows = []
    for prediction in predictions:
        top = list(prediction.shares.items())[:4]
        share = ", ".join(f"{name} {100 * value:.0f} %" for name, value in top)
        rows.append((Cell(str(prediction.photo)), Cell(str(prediction.overlay)), Cell(share)))
    return [Table("", ("photo", "overlay", "largest classes"), tuple(rows), left=True)]


def _domain_states(states: Sequence[DomainState]) -> list[Table]:
    rows = []
    for state in states:
        counts = " / ".join(str(state.splits.get(split) or ABSENT) for split in ("train", "val"))
        texts = (state.name, state.role, counts, state.size, state.access, state.licence or ABSENT)
        rows.append((*map(Cell, texts), _on_disk(state)))
    legend = [
        "rendered: procedural, needs no files; a severity in 0..1 can be added: streets-fog@0.6.",
        "Others are looked for in --root, else DGBENCH_DATA, else ./data; what is found is named by its layout.",
        "Further splits, folders, label maps and homepages: --json.",
    ]
    header = ("domain", "role", "train / val", "W x H", "access", "licence", "on this disk")
    return [Table("", header, tuple(rows), left=True, legend=tuple(legend))]


def _on_disk(state: DomainState) -> Cell:
    if state.where is None:
        return Cell("not here", "dim")
    if state.where == "rendered":
        return Cell("rendered")
    if not state.here:
        return Cell(f"{state.where}: no files of it", "warn")
    by_layout: dict[str, list[str]] = {}
    for split, found in state.here.items():
        some = "" if found.n_pairs == found.n_expected else f" {found.n_pairs} of {found.n_expected}"
        by_layout.setdefault(found.layout, []).append(split + some)
    complete = all(found.n_pairs == found.n_expected for found in state.here.values())
    return Cell(
        "; ".join(f"{', '.join(splits)}: {layout}" for layout, splits in by_layout.items()), "good" if complete else "warn"
    )


_LISTED = 20  # problems that are shown; JSON has all


def _reports(reports: Sequence[Report]) -> list[Table]:
    return [table for report in reports for table in (_verdict(report), _found_values(report)) if table.rows]


def _verdict(report: Report) -> Table:
    missing = f", {report.n_missing} missing" if report.n_missing else ""
    sizes = [f"{size} ({n})" for size, n in list(report.sizes.items())[:4]]
    more = [f"{len(report.sizes) - 4} more"] if len(report.sizes) > 4 else []
    facts = [
        ("folder", Cell(str(report.folder))),
        ("layout", Cell(report.layout + (f": {report.note}" if report.note else ""))),
        ("label map", Cell(report.label_map or "none is agreed on for these labels")),
        ("pairs", Cell(f"{report.n_pairs}{missing}", "warn" if missing else "")),
        ("sizes", Cell(", ".join([*sizes, *more]) or ABSENT)),
    ]
    if report.one_color:
        some = ", ".join(report.one_color[:4]) + (", ..." if len(report.one_color) > 4 else "")
        facts.append(("one colour", Cell(f"{len(report.one_color)}: {some}", "warn")))
    facts += [("known bad", Cell(f"{file}: {why}", "dim")) for file, why in report.known_bad.items()]
    shown = report.problems[:_LISTED]
    facts += [(problem.kind, Cell(f"{problem.file}: {problem.detail}", "bad")) for problem in shown]
    if rest := len(report.problems) - len(shown):
        facts.append(("", Cell(f"and {rest} more problems: --json lists all", "bad")))
    state = "no problems" if report.ok else f"{len(report.problems)} problems" if report.n_pairs else "no pairs"
    rows = tuple((Cell(name), cell) for name, cell in facts)
    return Table(f"{report.domain} {report.split}: {state}{missing}", ("", "found"), rows, left=True)


def _found_values(report: Report) -> Table:
    total = max(sum(value.pixels for value in report.values), 1)
    rows = []
    for value in report.values:
        style: Literal["bad", "dim", ""] = "bad" if value.meaning == "unknown" and report.label_map else (
            "dim" if value.meaning == "ignored" else "")  # fmt: skip
        texts = (str(value.value), value.meaning, f"{100 * value.pixels / total:.2f}", str(value.images))
        rows.append(tuple(Cell(text, style) for text in texts))
    legend = ["pixels: % of all pixels. images: in how many the value occurs."]
    if absent := [name for name, n in report.n_images.items() if not n]:
        legend.append(f"Classes that do not occur: {', '.join(absent)}.")
    return Table("", ("value", "meaning", "pixels", "images"), tuple(rows), keys=2, legend=tuple(legend))


def _class_shares(shares: Sequence[ClassShare]) -> list[Table]:
    rows = tuple((Cell(s.name), Cell(f"{100 * s.pixels:.2f}"), Cell(f"{100 * s.images:.0f}")) for s in shares)
    first = shares[0]
    title = f"{first.domain} {first.split}: classes over {first.n_images} images"
    legend = ("pixels: % of labelled pixels. images: % of images in which the class occurs.",)
    return [Table(title, ("class", "pixels", "images"), rows, legend=legend)]


def _sheet(sheet: Sheet) -> list[Table]:
    return [Table(f"{sheet.path}: {sheet.n_images} images of {sheet.domain} {sheet.split}", (), ())]


def _exported(splits: Sequence[Exported]) -> list[Table]:
    rows = [
        (*map(Cell, (s.split, str(s.n_images), f"{s.size[1]}x{s.size[0]}", s.layout, s.label_map)),
         Cell(", ".join(f"{name} {pixels}" for name, pixels in s.ignored.items()) or ABSENT, "warn" if s.ignored else ""))
        for s in splits
    ]  # fmt: skip
    legend = ("ignored: pixels of classes that these labels cannot express.",) if any(s.ignored for s in splits) else ()
    title = f"{splits[0].folder}: {splits[0].streets} as {splits[0].domain}"
    header = ("split", "images", "size", "layout", "label map", "ignored")
    return [Table(title, header, tuple(rows), left=True, legend=legend)]


def _models(models: Sequence[Model]) -> list[Table]:
    rows = []
    for model in models:
        if model.repo is None:
            rows.append(
                (*(Cell(text) for text in (model.name, model.role, ABSENT, ABSENT, ABSENT)), Cell("trained from scratch"))
            )
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


def _downloaded(rows: Sequence[Fetched | Stored]) -> list[Table]:
    """Towers and domains, a table each."""
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
        texts = (row.name, files, _size(row.bytes), {"here": "already here"}.get(row.state, row.state), row.checked or ABSENT)
        rows.append(tuple(map(Cell, texts)))
    legend = [f"{row.name}: {row.folder}{f' ({row.note})' if row.note else ''}" for row in stored]
    return [Table("", ("domain", "files", "size", "state", "checked"), tuple(rows), left=True, legend=tuple(legend))]


def _plan(plan: Plan) -> list[Table]:
    rows = []
    for need in plan.needs:
        what = {"here": "", "to link": ""}.get(need.state, f"{need.files:,}" if need.files else ABSENT)
        size = "" if need.state in ("here", "to link") else _size(need.bytes)
        state = Cell(need.state, "good" if need.state == "here" else "warn" if need.state == "by hand" else "")
        rows.append((Cell(need.name), state, Cell(what), Cell(size), Cell(need.licence or ABSENT)))
    legend = [
        f"{_size(plan.bytes)} to bring, at most {_size(plan.room)} of room needed, {_size(plan.free)} free in {plan.place}."
    ]
    legend += [f"{need.name}: {need.note}." for need in plan.needs if need.note]
    if by_hand := [need.name for need in plan.needs if need.state == "by hand"]:
        legend.append(f"By hand: download in a browser, then --from FOLDER; dgbench download {by_hand[0]} tells the steps.")
    return [Table("", ("name", "state", "files", "size", "licence"), tuple(rows), left=True, legend=tuple(legend))]


def _size(n: int | None) -> str:
    """Bytes as `5.7 GB`."""
    if n is None:
        return "unknown"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= scale:
            return f"{n / scale:,.1f} {unit}"
    return f"{n} B"


def _converted(done: Converted) -> list[Table]:
    legend = [f"{done.used} tensors used, {len(done.dead)} that the authors' model never reads left out."]
    legend += [f"next: dgbench eval {done.run} --targets cityscapes bdd100k mapillary"]
    return [
        Table(f"{done.source}: MFuser with {done.vlm}, now the run {done.run} of {done.recipe}", (), (), legend=tuple(legend))
    ]


def _kernel_list(found: KernelList) -> list[Table]:
    rows = []
    for row in found.backends:
        picked = ", ".join(row.auto) or ("named only" if row.named_only else ABSENT)
        state = Cell("runs", "good") if row.reason is None else Cell(row.reason, "dim")
        rows.append((Cell(row.op), Cell(row.backend), Cell(picked, "best" if row.auto else "dim"), state))
    legend = [f"Asked on {found.device} with fp32 tensors. default for: the dtypes for which `auto` takes this backend."]
    if named := os.environ.get("MFUSER_BACKEND"):
        legend.append(f"MFUSER_BACKEND={named} stands for `auto`.")
    library = found.library
    facts = (
        ("state", Cell("loads", "good") if library.reason is None else Cell(library.reason, "dim")),
        ("in use", Cell(library.path or ABSENT)),
        *(("built", Cell(path)) for path in library.built if path != library.path),
        ("folder", Cell(library.folder)),
        ("sources", Cell(", ".join(library.sources) or "none")),
        ("their hash", Cell(library.sources_hash)),
        ("this GPU", Cell(library.architecture or "none")),
        ("nvcc", Cell(library.nvcc or "not found")),
    )
    return [
        Table("", ("operator", "backend", "default for", "state"), tuple(rows), keys=2, left=True, legend=tuple(legend)),
        Table("", ("CUDA library", ""), tuple((Cell(name), cell) for name, cell in facts), left=True),
    ]


def _built(built: Built) -> list[Table]:
    size = f"{built.bytes / 1e6:.1f} MB for {', '.join(built.architectures)}"
    how = f"compiled in {built.seconds:.0f} s" if built.new else "there already"
    return [Table(f"{built.path}: {size}, {how}", (), ())]


def _bench(bench: Bench) -> list[Table]:
    return [_timed_case(case, bench.machine.name) for case in bench.cases]


def _timed_case(case: TimedCase, machine: str) -> Table:
    rows = []
    for row in case.timings:
        texts = (row.backend, *_milliseconds(row.forward_ms, row.both_ms), f"{row.forward_speed:.2f}", f"{row.both_speed:.2f}")
        rows.append(tuple(map(Cell, texts)))
    rows.append(tuple(Cell(text, "dim") for text in ("floor", *_milliseconds(*case.floor_ms), "", "")))
    legend = [f"floor: what {' and '.join(dict.fromkeys(case.floor_by))} alone would take."]
    if case.timings:
        legend.insert(0, f"speed: times as fast as {case.timings[0].backend}; higher is better.")
    legend += [f"{name}: {reason}" for name, reason in case.refused.items()]
    title = f"{case.op}, {case.shape}, {case.dtype} on {machine}: median ms, lower is better"
    header = ("backend", "forward", "+ backward", "forward speed", "+ backward speed")
    return Table(title, header, tuple(rows), legend=tuple(legend))


def _milliseconds(*values: float) -> tuple[str, ...]:
    return tuple(f"{value:.3f}" if value < 10 else f"{value:.1f}" for value in values)


# by name: looking up a class must not import the engine
_TABLES: dict[str, Callable[[Any], list[Table]]] = {
    "Leaderboard": _leaderboard,
    "Record": _records,
    "Preset": _presets,
    "Check": _checks,
    "Prediction": _predictions,
    "DomainState": _domain_states,
    "Report": _reports,
    "ClassShare": _class_shares,
    "Sheet": _sheet,
    "Exported": _exported,
    "Model": _models,
    "Fetched": _downloaded,
    "Stored": _downloaded,
    "Plan": _plan,
    "Converted": _converted,
    "KernelList": _kernel_list,
    "Built": _built,
    "Bench": _bench,
}


# ---- stderr


def note(text: str) -> None:
    """Say one line on stderr."""
    print(text, file=sys.stderr, flush=True)


def failure(message: str, hint: str | None = None) -> None:
    """Print `error: …`, an empty line and `hint: …` on stderr."""
    _labelled("error", "31", message)
    if hint:
        note("")
        _labelled("hint", "36", hint)


def warning(message: str) -> None:
    """Print `warning: …` on stderr."""
    _labelled("warning", "33", message)


def _labelled(label: str, colour: str, text: str) -> None:
    coloured = sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    note(f"\x1b[1;{colour}m{label}:\x1b[0m {text}" if coloured else f"{label}: {text}")


def progress(*, quiet: bool = False) -> Progress:
    """Return what tells the progress of long work on stderr: a bar on a terminal, plain lines elsewhere."""
    if quiet:
        return Silent()
    console = _console(stderr=True)
    return _Bar(console) if console.is_terminal and not console.is_dumb_terminal else _Lines()


@contextlib.contextmanager
def transfers(*, quiet: bool = False) -> Iterator[Bars]:
    """Within, downloads are told on stderr: on a terminal a bar each, elsewhere lines; --quiet silences other libraries, too."""
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    if not quiet:
        console = _console(stderr=True)
        bars = _Bars(console) if console.is_terminal and not console.is_dumb_terminal else _TransferLines()
        try:
            yield bars
        finally:
            bars.close()
        return
    disable_progress_bars()
    try:
        yield Silent()
    finally:
        enable_progress_bars()


class _Bars:
    """Transfers on a terminal, drawn while there are any."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._tasks: dict[str, TaskID] = {}
        self._drawn: RichProgress | None = None

    def begin(self, name: str, total: int | None, done: int = 0) -> None:
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as RichProgress

        with self._lock:
            if self._drawn is None:
                self._drawn = RichProgress(
                    TextColumn("{task.description}"), BarColumn(bar_width=16), DownloadColumn(), TransferSpeedColumn(),
                    TimeRemainingColumn(compact=True), console=self._console, transient=True,
                )  # fmt: skip
                self._drawn.start()
            self._tasks[name] = self._drawn.add_task(name, total=total, completed=done)

    def advance(self, name: str, n: int) -> None:
        if self._drawn is not None and name in self._tasks:
            self._drawn.advance(self._tasks[name], n)

    def end(self, name: str) -> None:
        with self._lock:
            if self._drawn is not None and name in self._tasks:
                self._drawn.remove_task(self._tasks.pop(name))
            if not self._tasks:
                self._stop()

    def note(self, text: str) -> None:
        if self._drawn is not None:
            self._drawn.console.print(text, markup=False)
        else:
            note(text)

    def close(self) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._drawn is not None:
            self._drawn.stop()
        self._drawn = None


class _TransferLines:
    """Transfers in a log: a line when one begins and ends, and how far all are every half minute."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done: dict[str, int] = {}
        self._totals: dict[str, int | None] = {}
        self._begun: dict[str, float] = {}
        self._told_at = time.monotonic()

    def begin(self, name: str, total: int | None, done: int = 0) -> None:
        with self._lock:
            self._done[name], self._totals[name], self._begun[name] = done, total, time.monotonic()
            kept = f", {_size(done)} of it are here" if done else ""
            note(f"{name}{f': {_size(total)}' if total is not None else ''}{kept}")

    def advance(self, name: str, n: int) -> None:
        with self._lock:
            self._done[name] = self._done.get(name, 0) + n
            if time.monotonic() - self._told_at >= 30:
                self._told_at = time.monotonic()
                for each, done in self._done.items():
                    total = self._totals.get(each)
                    note(f"{each}: {_size(done)}{f' of {_size(total)}' if total is not None else ''}")

    def end(self, name: str) -> None:
        with self._lock:
            done = self._done.pop(name, 0)
            note(f"{name}: {_size(done)} in {duration(time.monotonic() - self._begun.pop(name, 0.0))}")

    def note(self, text: str) -> None:
        note(text)

    def close(self) -> None:
        """Nothing is drawn that would have to end."""


def _fields(values: Mapping[str, float | str]) -> str:
    texts = []
    for name, value in values.items():
        if name == "images_per_second":
            texts.append(f"{value:.1f} images/s")
        elif name == "lr":
            texts.append(f"lr {value:.1e}")
        else:
            texts.append(f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(texts)


class _Bar:
    """Progress on a terminal."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        def make() -> RichProgress:
            return RichProgress(
                SpinnerColumn(), BarColumn(bar_width=16), TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}"),
                TextColumn("{task.fields[told]}"), TimeRemainingColumn(compact=True), TextColumn("left"),
                console=console,
            )  # fmt: skip

        self._make = make
        self._bar: RichProgress | None = None
        self._fields: dict[str, float | str] = {}

    def start(self, what: str, total: int, unit: str) -> None:
        self.stop()
        self._fields = {}
        self._bar = self._make()
        # on its own line: an 80-column terminal has no room for it beside the numbers
        note(what)
        self._bar.add_task("", total=total, unit=unit, told="")
        self._bar.start()

    def advance(self, n: int = 1, **fields: float | str) -> None:
        self._fields.update(fields)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], advance=n, told=_fields(self._fields))

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = None

    def note(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False)
        else:
            note(text)


class _Lines:
    """Progress in a log: a line at the start, at every tenth of the work or every half minute, and at the end."""

    def __init__(self) -> None:
        self._what, self._unit = "", ""
        self._done = self._total = 0
        self._fields: dict[str, float | str] = {}
        self._begun = self._told_at = 0.0
        self._told_done = 0

    def start(self, what: str, total: int, unit: str) -> None:
        self._what, self._unit, self._total, self._done, self._told_done = what, unit, total, 0, 0
        self._fields = {}
        self._begun = self._told_at = time.monotonic()
        note(f"{what}: {total} {unit}")

    def advance(self, n: int = 1, **fields: float | str) -> None:
        self._fields.update(fields)
        self._done += n
        now = time.monotonic()
        tenth = self._done - self._told_done >= max(1, self._total / 10) and now - self._told_at >= 1
        if n and (tenth or now - self._told_at >= 30):
            self._tell(now)

    def stop(self) -> None:
        if self._what and self._done > self._told_done:
            self._tell(time.monotonic())
        self._what = ""

    def note(self, text: str) -> None:
        note(text)

    def _tell(self, now: float) -> None:
        elapsed = now - self._begun
        left = self._total - self._done
        parts = [f"{self._done}/{self._total} {self._unit}"]
        if self._fields:
            parts.append(_fields(self._fields))
        parts.append(f"{duration(elapsed * left / self._done)} left" if left and self._done else f"{duration(elapsed)} in all")
        note(f"{self._what}: {', '.join(parts)}")
        self._told_at, self._told_done = now, self._done
