"""What a model makes class scores of its class and mask logits by, as one layer: resizing, sigmoid and sum, in fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Score(nn.Module):
    """`scored` of a model: class logits (B, Q, K + 1) and mask logits (B, Q, h, w) to scores (B, K, H, W)."""

    def __init__(self, own: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.own = own

    def forward(self, class_logits: Tensor, mask_logits: Tensor) -> Tensor:
        """Apply it."""
        return self.own(class_logits, mask_logits)


def take(model: nn.Module) -> bool:
    """Make a layer of a model's `scored`, in place; False for a model without one."""
    m: Any = model
    if not hasattr(m, "scored"):
        return False
    m.score = Score(m.scored)
    vars(m)["scored"] = m.score
    return True
