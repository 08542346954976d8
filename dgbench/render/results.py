"""Output of a typed result: as the tables of its class, as CSV, or as JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dgbench import atomic
from dgbench.render import (
    backbones,
    compare,
    data,
    doctor,
    downloads,
    expected,
    kernels,
    lab,
    leaderboard,
    machines,
    matrix,
    methods,
    predictions,
    profile,
    protocols,
    runs,
    severity,
    sweep,
)
from dgbench.render.flat import FlatRow, flat_rows
from dgbench.render.outside import visible_json
from dgbench.render.streams import writable
from dgbench.render.table import Table, draw_rich, plain
from dgbench.render.terminal import may_draw, note, open_console, write
from dgbench.render.texts import TEXTS, csv
from dgbench.results import finite


class Renderer(NamedTuple):
    """Functions that make tables, and rows of plain values, from a result or a list of results of one class."""

    tables: Callable[..., list[Table]]
    rows: Callable[[Any], list[FlatRow]] = flat_rows


# by module and name of the class, so that a look-up does not import the engine
RENDERERS: dict[str, Renderer] = {
    "dgbench.cost.backbones.BackboneTable": Renderer(backbones.backbone_tables, backbones.backbone_rows),
    "dgbench.cost.fusion.FusionProfile": Renderer(profile.fusion_tables, profile.profile_rows),
    "dgbench.cost.kernels.Bench": Renderer(kernels.bench_tables, kernels.bench_rows),
    "dgbench.cost.kernels.Built": Renderer(kernels.built_tables),
    "dgbench.cost.kernels.KernelList": Renderer(kernels.kernel_tables, kernels.kernel_rows),
    "dgbench.cost.profile.Profile": Renderer(profile.profile_tables, profile.profile_rows),
    "dgbench.data.export.Exported": Renderer(data.exported_tables),
    "dgbench.data.listing.ClassShare": Renderer(data.class_tables),
    "dgbench.data.listing.DomainState": Renderer(data.domain_tables),
    "dgbench.data.listing.Sheet": Renderer(data.sheet_tables),
    "dgbench.data.verify.Report": Renderer(data.report_tables, data.report_rows),
    "dgbench.doctor.Check": Renderer(doctor.check_tables),
    "dgbench.download.command.Stored": Renderer(downloads.downloaded_tables),
    "dgbench.download.orders.Plan": Renderer(downloads.plan_tables, downloads.plan_rows),
    "dgbench.engine.convert.Converted": Renderer(runs.converted_tables),
    "dgbench.engine.export.ExportedModel": Renderer(runs.exported_tables),
    "dgbench.engine.pictures.Picture": Renderer(predictions.picture_tables),
    "dgbench.engine.predict.Prediction": Renderer(predictions.prediction_tables),
    "dgbench.engine.submission.Submission": Renderer(predictions.submission_tables),
    "dgbench.engine.severity.Severity": Renderer(severity.severity_tables, severity.severity_rows),
    "dgbench.html_report.Written": Renderer(machines.written_tables),
    "dgbench.lab.copying.Copying": Renderer(lab.copying_tables, lab.copying_rows),
    "dgbench.lab.fusing.Fused": Renderer(lab.fused_tables, lab.fused_rows),
    "dgbench.lab.matrices.Convolved": Renderer(lab.convolved_tables, lab.convolved_rows),
    "dgbench.lab.matrices.Discretized": Renderer(lab.discretized_tables, lab.discretized_rows),
    "dgbench.lab.matrices.Hippo": Renderer(lab.hippo_tables, lab.hippo_rows),
    "dgbench.lab.scanning.Scans": Renderer(lab.scan_tables, lab.scan_rows),
    "dgbench.lab.speeds.Speeds": Renderer(lab.speed_tables, lab.speed_rows),
    "dgbench.methods.Method": Renderer(methods.method_tables),
    "dgbench.methods.MethodDetails": Renderer(methods.detail_tables, methods.detail_rows),
    "dgbench.protocol.Preset": Renderer(protocols.preset_tables),
    "dgbench.report.compare.Comparison": Renderer(compare.comparison_tables, compare.comparison_rows),
    "dgbench.report.expected.Expected": Renderer(expected.expected_tables, expected.expected_rows),
    "dgbench.report.matrix.Matrix": Renderer(matrix.matrix_tables, matrix.matrix_rows),
    "dgbench.report.rows.Leaderboard": Renderer(leaderboard.leaderboard_tables, leaderboard.leaderboard_rows),
    "dgbench.share.Push": Renderer(downloads.push_tables, downloads.push_rows),
    "dgbench.results.Record": Renderer(runs.record_tables, runs.record_rows),
    "dgbench.sweep.cells.Status": Renderer(sweep.sweep_tables),
    "mfuser.towers.hub.Fetched": Renderer(downloads.downloaded_tables),
    "mfuser.towers.hub.Model": Renderer(downloads.model_tables),
}


def show(result: Any, form: str = "text", file: Path | None = None, **how: Any) -> None:
    """Print a typed result, or a list of them, to stdout, or write it whole to a file.

    Args:
        form: "text", "csv", "markdown", "latex", "html" or "json".
        how: what the tables of this class take besides.
    """
    if file is not None:
        atomic.write(file, _written(result, form, **how) + "\n")
        note(f"written: {file}")
    elif form == "text":
        _show_text(_tables(result, **how))
    elif text := _written(result, form, ascii_only=not (sys.stdout.encoding or "utf-8").lower().startswith("utf"), **how):
        write(text)


def _written(result: Any, form: str, *, ascii_only: bool = False, **how: Any) -> str:
    if form == "json":
        return visible_json(json.dumps(plain_data(result), indent=1, ensure_ascii=ascii_only, allow_nan=False))
    if form == "csv":
        if rows := _renderer(result).rows(result) if result else []:
            return csv(rows)
        note("nothing to show")
        return ""
    if form == "text":
        return "\n\n".join(plain(table) for table in _tables(result, **how))
    return TEXTS[form](_tables(result, **how))


def _tables(result: Any, **how: Any) -> list[Table]:
    return _renderer(result).tables(result, **how) if result else [Table("nothing to show", (), ())]


def _show_text(tables: Sequence[Table]) -> None:
    # before they are laid out: a stand-in may be wider
    tables = [table.rewritten(lambda text: writable(text, sys.stdout)) for table in tables]
    console = open_console() if may_draw() else None
    for number, table in enumerate(tables):
        if number:
            write("")
        if console is not None and console.is_terminal:
            draw_rich(table, console)
        else:
            write(plain(table))


def tell(result: object) -> None:
    """Print a typed result as text on stderr, before a command does its work."""
    for table in _renderer(result).tables(result):
        note(plain(table))


def _renderer(result: Any) -> Renderer:
    first = result[0] if isinstance(result, Sequence) else result
    return RENDERERS[f"{type(first).__module__}.{type(first).__qualname__}"]


def plain_data(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain_data(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_data(item) for item in value]
    return finite(value)
