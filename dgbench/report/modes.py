"""How far scores in another mode than `exact` are from the exact ones of the same checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dgbench.report.models import Model


def difference(members: Sequence[Model], others: Sequence[Model]) -> str:
    """Return what is said of a row: "" where its models were run exactly.

    Args:
        members: of the row.    others: of its group, those of the row as well.
    """
    mode = members[0].newest.environment.get("mode")
    if mode is None:
        return ""
    exact = {one.newest.checkpoint: one for one in others if "mode" not in one.newest.environment}
    pairs = [(one, exact[one.newest.checkpoint]) for one in members if one.newest.checkpoint in exact]
    found = [
        100 * (record.miou - other.miou)
        for one, same in pairs
        for column, record in one.records.items()
        if (other := same.records.get(column)) is not None
        and record.miou is not None
        and other.miou is not None
        and (record.protocol_hash, record.n_images) == (other.protocol_hash, other.n_images)
    ]
    if not found:
        return f"mode {mode}, and no exact score of the same checkpoint to compare it with"
    mean, most = math.fsum(found) / len(found), max(found, key=abs)
    scores = f"{len(found)} scores" if len(found) > 1 else "1 score"
    return f"mode {mode}: {mean:+.2f} points of mIoU from exact mode, at most {most:+.2f} ({scores} of the same checkpoints)"
