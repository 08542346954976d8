"""The published tables: numbers as papers print them, where they were read, and at which size the images were tested."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dgbench.report.rows import Group, Row, Score

PUBLISHED = Path(__file__).parents[1] / "published.yaml"
PROTOCOL = "as published"  # stands for as many protocols as there are rows


def load_published(path: Path = PUBLISHED) -> tuple[Group, ...]:
    """Return the published tables, each of one source and one set of targets; rows by their means, those without one last."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's where PyYAML was built with it: ten times faster
    content = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    return tuple(_group(table, content["test_sizes"]) for table in content["tables"])


def _group(table: Mapping[str, Any], sizes: Mapping[str, str]) -> Group:
    rows = [_row({**table, **row}) for row in table["rows"]]
    rows.sort(key=lambda row: -(row.mean.miou if row.mean else 0))
    used = {row.test_size: sizes[row.test_size] for row in rows}
    title = table.get("title", "")
    return Group(table["source"], tuple(table["targets"]), PROTOCOL, (), tuple(rows), title=title, test_sizes=used)


def _row(row: Mapping[str, Any]) -> Row:
    scores = {
        target: None if percent is None else Score(percent / 100)
        for target, percent in zip(row["targets"], row["miou"], strict=True)
    }
    known = [score.miou for score in scores.values() if score is not None]
    if "mean" in row:
        mean = None if row["mean"] is None else Score(row["mean"] / 100)
    else:
        mean = Score(math.fsum(known) / len(known)) if len(known) == len(scores) else None
    return Row(
        "published",
        row["method"],
        row["backbone"],
        row.get("recipe", ""),
        "",
        f"{row['read_in']} (read {row['read']})",
        str(row["read"]),
        None,
        scores,
        mean,
        note=row.get("note", ""),
        test_size=row["tested"],
        reported_by=row["reported_by"],
        printed_mean="mean" in row,
        digits=row.get("digits", 2),
    )
