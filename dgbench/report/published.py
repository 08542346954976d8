"""The published tables: numbers as papers print them, with paper and table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dgbench.report.rows import Group, Row, Score

PUBLISHED = Path(__file__).parents[1] / "published.yaml"


def load_published(path: Path = PUBLISHED) -> tuple[Group, ...]:
    """Return the published tables, one group per paper, table and source."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's if available: ten times faster
    return tuple(_group(table) for table in yaml.load(path.read_text(encoding="utf-8"), Loader=loader))


def _group(table: Mapping[str, Any]) -> Group:
    cite = f"{table['paper']}, {table['table']} (read {table['read']})"
    rows = []
    for row in table["rows"]:
        scores = {target: Score(percent / 100) for target, percent in zip(table["targets"], row["miou"], strict=True)}
        printed = row["mean"] / 100 if "mean" in row else math.fsum(score.miou for score in scores.values()) / len(scores)
        rows.append(
            Row(
                "published",
                row["method"],
                row["backbone"],
                row.get("recipe", ""),
                "",
                cite,
                str(table["read"]),
                None,
                scores,
                Score(printed),
                note=row.get("note", ""),
            )
        )
    rows.sort(key=lambda row: -(row.mean.miou if row.mean else 0))
    return Group(table["source"], tuple(table["targets"]), table["protocol"], (), tuple(rows))
