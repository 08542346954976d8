"""What a run gives: its scores; a run made of the authors' checkpoint; and one with all its weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dgbench.render.flat import FlatRow, flat_row
from dgbench.render.numbers import byte_size, duration
from dgbench.render.protocols import with_hash
from dgbench.render.table import ABSENT, Cell, Table

if TYPE_CHECKING:
    from dgbench.engine.convert import Converted
    from dgbench.engine.export import ExportedModel
    from dgbench.results import Record


def record_tables(records: Sequence[Record]) -> list[Table]:
    rows = []
    subsets = sorted({key for record in records for key in record.extra if key.startswith("miou")}, reverse=True)
    for record in records:
        low, high = record.interval
        interval = ABSENT if low is None or high is None or math.isnan(low) else f"[{100 * low:.1f}, {100 * high:.1f}]"
        miou = ABSENT if record.miou is None else f"{100 * record.miou:.1f}"
        total = record.seconds.get("total")
        count = str(record.n_images) if record.complete else f"{record.n_images} of {record.n_available}"
        count += f" (+{record.n_extra} unknown)" if record.n_extra else ""
        seen = " (source)" if record.target in record.source.split("+") else ""
        seen += " (rendered)" if record.rendered else ""
        over = [record.extra.get(key) for key in subsets]
        rows.append(
            (
                Cell(record.target + seen),
                Cell(miou),
                *(Cell(f"{100 * value:.1f}" if isinstance(value, float) else ABSENT) for value in over),
                Cell(interval),
                Cell(count),
                Cell(ABSENT if total is None else duration(total)),
                Cell(f"{record.n_images / total:.1f}" if total else ABSENT),
            )
        )
    first = records[0]
    variant = f" ({first.variant})" if first.variant else ""
    protocol = with_hash(first.protocol, first.protocol_digest)
    source = f"{first.source} (rendered)" if first.source_rendered else first.source
    title = f"{first.method}{variant}, recipe {first.recipe}, trained on {source}, protocol {protocol}"
    legend = ["mIoU in %, higher is better; 95 % interval over images."]
    if subsets:
        legend.append("mIoU16, mIoU13: over the classes that SYNTHIA has, and those without wall, fence and pole.")
    if any(record.rendered for record in records):
        legend.append("rendered: an export of rendered scenes stands in the published set's place.")
    if any(record.n_extra for record in records):
        legend.append("unknown: images in the folder beyond the published ones, scored with them; such a score is partial.")
    if first.source_complete is False:
        legend.append(f"Trained on {first.source_images} of {first.source_available} source images.")
    if first.run is not None:
        legend.append(f"Records: {first.run}")
    header = ("domain", "mIoU", *(key.replace("miou", "mIoU") for key in subsets), "interval", "images", "time", "images/s")
    return [Table(title, header, tuple(rows), legend=tuple(legend))]


def converted_tables(done: Converted) -> list[Table]:
    legend = [f"{done.used} tensors used, {len(done.dead)} that the authors' model never reads left out."]
    legend += [f"next: dgbench eval {done.run} --targets cityscapes bdd100k mapillary"]
    title = f"{done.source}: {done.method} with {done.towers}, now the run {done.run} of {done.recipe}"
    return [Table(title, (), (), legend=tuple(legend))]


def exported_tables(done: ExportedModel) -> list[Table]:
    kind = f" in {done.dtype}" if done.dtype else ""
    legend = (f"{done.values_m:.1f} million numbers{kind}, {byte_size(done.bytes)}.", f"next: dgbench eval {done.run}")
    return [Table(f"{done.source} with all its weights, now the run {done.run}", (), (), legend=legend)]


def record_rows(records: Sequence[Record]) -> list[FlatRow]:
    """Return a row for each record, with whether its split and its source were complete."""
    from dgbench.data.labels import NAMES

    rows = []
    for record in records:
        names = NAMES if len(record.iou) == len(NAMES) else tuple(map(str, range(len(record.iou))))
        row = flat_row(record, without=("iou", "interval", "confusion_sha256", "digest"))
        row |= {"complete": record.complete, "source_complete": record.source_complete}
        row |= {"interval_low": record.interval[0], "interval_high": record.interval[1]}
        rows.append(row | {f"iou_{name}": value for name, value in zip(names, record.iou, strict=True)})
    return rows
