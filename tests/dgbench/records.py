"""Made-up records for tests."""

from __future__ import annotations

from typing import Any

from dgbench.results import Record


def record(target: str = "streets-city", miou: float | None = 0.4, **fields: Any) -> Record:
    """Return a complete evaluation record of a model trained on streets-game."""
    n = fields.pop("sequence", 0)
    half = fields.pop("half", 0.01)
    defaults: dict[str, Any] = {
        "id": f"20261124T02{n:04d}Z-{target}-{fields.get('method', 'mfuser')}",
        "kind": "eval",
        "created": f"2026-11-24T{n // 60:02d}:{n % 60:02d}:00.000Z",
        "method": "mfuser",
        "variant": "tiny + tiny",
        "recipe": "streets/mfuser",
        "recipe_hash": "aaaaaaaaaaaa",
        "source": "streets-game",
        "split": "val",
        "protocol": "unified",
        "protocol_hash": f"hash-{target}",
        "iou": (miou,) * 19,
        "interval": (None, None) if miou is None else (miou - half, miou + half),
        "n_images": 100,
        "n_available": 100,
        "checkpoint": "c1",
    }
    return Record(target=target, miou=miou, **{**defaults, **fields})


def model(*scores: float, targets: tuple[str, ...] = ("streets-city", "streets-world"), **fields: Any) -> list[Record]:
    """Return the records of one model: its source's validation split first, then the targets."""
    return [record(target, miou, **fields) for target, miou in zip(("streets-game", *targets), scores, strict=True)]
