"""Tables of the published backbone comparisons beside our own counts and times, and the same rows for other programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dgbench.render.flat import FlatRow, flatten
from dgbench.render.profile import machine, milliseconds
from dgbench.render.table import ABSENT, Cell, Table

if TYPE_CHECKING:
    from dgbench.cost.backbones import BackboneRow, BackboneTable, Measured


def backbone_tables(found: BackboneTable) -> list[Table]:
    tables = [_counts(found)]
    if any(row.whole or row.problem for row in found.rows):
        tables.append(_times(found))
    return [*tables, _sweep(found)]


def _counts(found: BackboneTable) -> Table:
    table, segmentation = found.table, found.table.name == "ade20k"
    rows = []
    for row in found.rows:
        count, printed = row.count, row.printed
        cells = [Cell(printed.backbone), *(Cell(_score(printed.scores[name])) for name in table.scores)]
        cells += [Cell(str(printed.parameters)), Cell(_whole(printed.operations))]
        cells += [Cell(_millions(count.parameters))]
        cells += [Cell(_millions(count.parameters - count.auxiliary))] if segmentation else []
        cells += [Cell(_giga(count.operations)), Cell(ABSENT if row.off is None else f"{row.off:+.2f}")]
        cells += [Cell(_giga(count.operations + count.norms)), Cell(_giga(count.cost.scan)), Cell(_giga(_trunk(row)))]
        rows.append(tuple(cells))
    header = ["backbone", *(f"printed {name}" for name in table.scores), "printed M", "printed G"]
    header += ["params M", *(["without aux. M"] if segmentation else []), "GMAC", "off %"]
    header += ["with norms G", "scan G", "trunk GMAC"]
    size = f"{table.size[0]}x{table.size[1]}"
    reference, parameters, operations = table.calibration
    own = found.calibration
    legend = [
        f"printed: not measured here; {table.cite}, read {table.read}.",
        *table.training,
        f"GMAC: multiply-accumulates of one image of {size} (H x W), which the tables call FLOPs; a scan's operations "
        "(9 B L D N + B L D) are one each. off: from the printed G.",
        "with norms: also 5 operations an element of a layer norm and 2 of a batch norm, as fvcore counts, which printed the "
        "numbers of ResNet, DeiT and VMamba.",
        f"Calibrated on {reference}: {own.parameters / 1e6:.3f} M and {_giga(own.operations + own.norms)} G with norms here, "
        f"{parameters / 1e6:.3f} M and {operations:.2f} G by VMamba's counter.",
    ]
    if segmentation:
        legend.append("params: with the auxiliary head, which a forward pass does not run. without aux.: without it.")
    else:
        from dgbench.cost.detector import DETECTIONS, PROPOSALS

        legend.append(f"Counted with {PROPOSALS:,} boxes in the box head and {DETECTIONS} in the mask head, by that calibration.")
    legend += [f"{row.printed.backbone}: {row.printed.cause}." for row in found.rows if row.printed.cause]
    if found.counted_with:
        legend.append(f"Counted with {found.counted_with}, which are other versions than those here.")
    if found.unmeasured:
        legend.append(f"No times: {found.unmeasured}.")
    return Table(f"{table.title}, multiply-accumulates at {size}", tuple(header), tuple(rows), legend=tuple(legend))


def _times(found: BackboneTable) -> Table:
    rows = [
        (
            Cell(row.printed.backbone),
            Cell(_giga(row.count.operations)),
            Cell(_ms(row.whole)),
            Cell(_gib(row.whole)),
            Cell(_giga(_trunk(row))),
            Cell(_ms(row.trunk)),
            Cell(_gib(row.trunk)),
        )
        for row in found.rows
    ]
    legend = [
        "ms: one image, random weights; median of the calls, ± half of what 90 % of them lie between.",
        "GiB: peak, also of the trunk alone with the weights of the whole network.",
        *(f"{row.printed.backbone}: {row.problem}" for row in found.rows if row.problem),
    ]
    if found.hardware:
        legend.append(machine(found.hardware, found.environment, found.backends))
    if found.table.name == "maskrcnn":
        legend.append("Without non-maximum suppression: the boxes are given.")
    if any(row.printed.trunk.startswith("nat") for row in found.rows):
        legend.append("NAT: its windows are written out; kernels for neighbourhood attention are faster and need less memory.")
    header = ("backbone", "GMAC", "ms", "GiB", "trunk GMAC", "trunk ms", "trunk GiB")
    where = found.hardware.name if found.hardware else ""
    size = f"{found.table.size[0]}x{found.table.size[1]}"
    return Table(f"{found.table.title}: times at {size}, {found.dtype}, on {where}", header, tuple(rows), legend=tuple(legend))


def _sweep(found: BackboneTable) -> Table:
    sides = [point.side for point in found.sweep[0].points]
    timed = any(point.ms for line in found.sweep for point in line.points)
    rows = []
    for line in found.sweep:
        cells = [Cell(line.trunk), *(Cell(_giga(point.operations)) for point in line.points), Cell(f"{line.growth:.2f}")]
        if timed:
            cells += [Cell(milliseconds(point.ms)) for point in line.points]
        rows.append(tuple(cells))
    header = ["trunk", *(f"GMAC {side}²" for side in sides), "a pixel"]
    header += [f"ms {side}²" for side in sides] if timed else []
    legend = (f"a pixel: its cost at {sides[-1]}² by that at {sides[0]}²; 1.00 is linear in tokens.",)
    return Table("Trunks alone on square images", tuple(header), tuple(rows), legend=legend)


def backbone_rows(found: BackboneTable) -> list[FlatRow]:
    """Return a row for each backbone, with unrounded numbers and units in the names of columns."""
    rows: list[FlatRow] = []
    for row in found.rows:
        count, printed = row.count, row.printed
        values: dict[str, Any] = {
            "table": found.table.name,
            "backbone": printed.backbone,
            "trunk": printed.trunk,
            **{f"printed {name}": score for name, score in printed.scores.items()},
            "printed parameters M": printed.parameters,
            "printed G": printed.operations,
            "parameters": count.parameters,
            "auxiliary parameters": count.auxiliary,
            "mac": count.operations,
            "scan": count.cost.scan,
            "norms": count.norms,
            "trunk mac": _trunk(row),
            "off %": row.off,
            "cause": printed.cause,
        }
        for name, measured in (("whole", row.whole), ("trunk", row.trunk)):
            if measured is not None:
                flatten(name, measured, values)
        values |= {"dtype": found.dtype, "gpu": found.hardware.name if found.hardware else None}
        rows.append(values)
    return rows


def _trunk(row: BackboneRow) -> int:
    cost = row.count.trunk
    return cost.products + cost.sampling + cost.scan


def _score(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.1f}"


def _whole(value: int | None) -> str:
    return ABSENT if value is None else str(value)


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f}"


def _giga(count: int) -> str:
    return f"{count / 1e9:,.2f}" if count else "0"


def _ms(measured: Measured | None) -> str:
    return milliseconds(measured.ms) if measured else ABSENT


def _gib(measured: Measured | None) -> str:
    return f"{measured.gib:.2f}" if measured and measured.gib is not None else ABSENT
