"""Tables of domains: files on this disk, results of verification, class frequencies, and exports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from dgbench.render.flat import FlatRow, flat_row, flatten
from dgbench.render.numbers import counted
from dgbench.render.table import ABSENT, Cell, Table

if TYPE_CHECKING:
    from dgbench.data.export import Exported
    from dgbench.data.listing import ClassShare, DomainState, Sheet
    from dgbench.data.verify import Report


def domain_tables(states: Sequence[DomainState]) -> list[Table]:
    rows = []
    for state in states:
        counts = " / ".join(str(state.splits.get(split) or ABSENT) for split in ("train", "val"))
        texts = (state.name, state.role, counts, state.size, state.access, state.licence or ABSENT)
        rows.append((*map(Cell, texts), _on_disk(state)))
    legend = [
        "rendered: procedural, needs no files; a severity in 0..1 can be added: streets-fog@0.6.",
        "pretrain: for the pretraining of towers only, neither a source nor a target.",
        "Others are looked for in --root, else DGBENCH_DATA, else ./data; what is found is named by its layout.",
        "Further splits, folders, label maps and homepages: --json.",
    ]
    header = ("domain", "role", "train / val", "H x W", "access", "licence", "on disk")
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
        if found.n_pairs > found.n_expected:
            some = f" {found.n_pairs}, {found.n_pairs - found.n_expected} more than published"
        by_layout.setdefault(found.layout + (", rendered" if found.rendered else ""), []).append(split + some)
    complete = all(found.n_pairs == found.n_expected and not found.rendered for found in state.here.values())
    return Cell(
        "; ".join(f"{', '.join(splits)}: {layout}" for layout, splits in by_layout.items()), "good" if complete else "warn"
    )


_LISTED = 20  # problems that are shown; JSON has all


def report_tables(reports: Sequence[Report]) -> list[Table]:
    return [table for report in reports for table in (_verdict(report), _found_values(report)) if table.rows]


def _verdict(report: Report) -> Table:
    missing = f", {report.n_missing} missing" if report.n_missing else ""
    missing += f", {report.n_extra} more than published" if report.n_extra else ""
    sizes = [f"{size} ({n})" for size, n in list(report.sizes.items())[:4]]
    more = [f"{len(report.sizes) - 4} more"] if len(report.sizes) > 4 else []
    facts = [
        ("folder", Cell(str(report.folder))),
        ("layout", Cell(report.layout + (f": {report.note}" if report.note else ""))),
        *(
            [("rendered", Cell("scenes written by `dgbench data export`, not the published set", "warn"))]
            if report.rendered
            else ()
        ),
        ("label map", Cell(report.label_map or "none is agreed on for these labels")),
        ("pairs", Cell(f"{report.n_pairs}{missing}", "warn" if missing else "")),
        ("sizes", Cell(", ".join([*sizes, *more]) or ABSENT)),
    ]
    if report.one_color:
        some = ", ".join(report.one_color[:4]) + (", ..." if len(report.one_color) > 4 else "")
        facts.append(("one colour", Cell(f"{len(report.one_color)}: {some}", "warn")))
    if report.turned:
        some = ", ".join(report.turned[:4]) + (", ..." if len(report.turned) > 4 else "")
        facts.append(("turned by EXIF", Cell(f"{len(report.turned)}: {some}", "warn")))
    facts += [("known bad", Cell(f"{file}: {why}", "dim")) for file, why in report.known_bad.items()]
    shown = report.problems[:_LISTED]
    facts += [(problem.kind, Cell(f"{problem.file}: {problem.detail}", "bad")) for problem in shown]
    if rest := len(report.problems) - len(shown):
        facts.append(("", Cell(f"and {rest} more problems: --json lists all", "bad")))
    state = "no problems" if report.ok else counted(len(report.problems), "problems") if report.n_pairs else "no pairs"
    rows = tuple((Cell(name), cell) for name, cell in facts)
    return Table(f"{report.domain} {report.split}: {state}{missing}", ("", "found"), rows, left=True)


def _found_values(report: Report) -> Table:
    total = max(sum(value.pixels for value in report.values), 1)
    rows = []
    for value in report.values:
        style: Literal["bad", "dim", ""] = (
            "bad" if value.meaning == "unknown" and report.label_map else ("dim" if value.meaning == "ignored" else "")
        )
        texts = (str(value.value), value.meaning, f"{100 * value.pixels / total:.2f}", str(value.images))
        rows.append(tuple(Cell(text, style) for text in texts))
    legend = ["pixels: % of all pixels. images: in how many the value occurs."]
    if absent := [name for name, n in report.n_images.items() if not n]:
        legend.append(f"Classes that do not occur: {', '.join(absent)}.")
    return Table("", ("value", "meaning", "pixels", "images"), tuple(rows), keys=2, legend=tuple(legend))


def class_tables(shares: Sequence[ClassShare]) -> list[Table]:
    rows = tuple((Cell(s.name), Cell(f"{100 * s.pixels:.2f}"), Cell(f"{100 * s.images:.0f}")) for s in shares)
    first = shares[0]
    title = f"{first.domain} {first.split}: classes over {counted(first.n_images, 'images')}"
    legend = ("pixels: % of labelled pixels. images: % of images in which the class occurs.",)
    return [Table(title, ("class", "pixels", "images"), rows, legend=legend)]


def sheet_tables(sheet: Sheet) -> list[Table]:
    return [Table(f"{sheet.path}: {counted(sheet.n_images, 'images')} of {sheet.domain} {sheet.split}", (), ())]


def exported_tables(splits: Sequence[Exported]) -> list[Table]:
    rows = [
        (
            *map(Cell, (s.split, str(s.n_images), f"{s.size[0]}x{s.size[1]}", s.layout, s.label_map)),
            Cell(", ".join(f"{name} {pixels}" for name, pixels in s.ignored.items()) or ABSENT, "warn" if s.ignored else ""),
        )
        for s in splits
    ]
    legend = ("ignored: pixels of classes that these labels cannot express.",) if any(s.ignored for s in splits) else ()
    title = f"{splits[0].folder}: {splits[0].streets} as {splits[0].domain}"
    header = ("split", "images", "H x W", "layout", "label map", "ignored")
    return [Table(title, header, tuple(rows), left=True, legend=legend)]


def report_rows(reports: Sequence[Report]) -> list[FlatRow]:
    """Return a row for each domain and split: its counts, the pixels of each meaning, and the problems in words."""
    rows = []
    for report in reports:
        pixels: dict[str, int] = {}
        for value in report.values:
            pixels[value.meaning] = pixels.get(value.meaning, 0) + value.pixels
        problems = tuple(f"{problem.kind}: {problem.file}: {problem.detail}" for problem in report.problems)
        row = flat_row(report, without=("problems", "values")) | {"ok": report.ok, "n_problems": len(problems)}
        flatten("problems", problems, row)
        flatten("pixels", pixels, row)
        rows.append(row)
    return rows
