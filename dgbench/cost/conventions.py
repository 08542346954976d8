"""What a count is: operations by kind, and the conventions that make one number of them; needs no torch.

Units differ between papers, so a number is only ever given by a convention's name (`CONVENTIONS`). `count` says what each
operator costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one forward pass. `scan` and its part `skip` are floating-point operations, the others multiply-accumulates."""

    products: int = 0
    sampling: int = 0
    scan: int = 0
    skip: int = 0  # the scan's D u, one product per token and channel

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(self.parts, other.parts, strict=True)))

    def __mul__(self, times: int) -> Cost:
        return Cost(*(part * times for part in self.parts))

    @property
    def parts(self) -> tuple[int, int, int, int]:
        """In the order of the fields."""
        return self.products, self.sampling, self.scan, self.skip


@dataclass(frozen=True, slots=True)
class Convention:
    """How a cost becomes one number."""

    unit: str  # of 1e9
    total: Callable[[Cost], int]


CONVENTIONS: dict[str, Convention] = {
    # one a multiply-accumulate; the scan stands beside it
    "mac": Convention("GMAC", lambda cost: cost.products + cost.sampling),
    # two a multiply-accumulate, and the scan
    "flop": Convention("GFLOP", lambda cost: 2 * (cost.products + cost.sampling) + cost.scan),
    # as MFuser's ablation table prints: a batch of two, two a multiply-accumulate, of the scan only its skip
    "paper": Convention("G", lambda cost: 4 * (cost.products + cost.skip)),
}


@dataclass(frozen=True, slots=True)
class Counted:
    """The cost of a pass: in all, by module (its qualified name; what it calls is part of it) and by operator."""

    total: Cost
    by_module: Mapping[str, Cost]
    by_operator: Mapping[str, Cost]
