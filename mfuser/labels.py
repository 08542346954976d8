"""Checks of labels for all losses: integers of any type, each a class or "ignore"."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE = 255
_TYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def train_ids(labels: Tensor, classes: int) -> Tensor:
    """Return labels (B, H, W) of any integer type as int64.

    Args:
        labels: train ids 0..classes-1, and IGNORE.

    Raises: TypeError for another type, ValueError for another rank or value. Values on a GPU are not checked, which would
        delay each step (by a hundredth on an H200): there cross entropy's own assertion stops invalid train ids.
    """
    if not isinstance(labels, Tensor) or labels.dtype not in _TYPES:
        given = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be integers, got {given}; allowed are {', '.join(map(str, _TYPES))}")
    if labels.dim() != 3:
        raise ValueError(f"labels are {tuple(labels.shape)}, expected (B, H, W)")
    ids = labels.long()
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        strange = (ids < 0) | ((ids >= classes) & (ids != IGNORE))
        if strange.any():
            found = sorted(set(ids[strange].tolist()))
            listed = ", ".join(map(str, found[:5])) + (", ..." if len(found) > 5 else "")
            raise ValueError(
                f"labels hold {listed}; allowed are train ids 0..{classes - 1}, and {IGNORE} for what is to be ignored: "
                "map other ids to these first"
            )
    return ids
