"""Operation counts by kind, and the conventions that turn them into one number; needs no torch.

Units differ between papers, so a number is always given with a convention's name (`CONVENTIONS`). `count` defines what each
operator costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of one forward pass. `scan` and its part `skip` are floating-point operations, the others multiply-accumulates."""

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
        """The numbers, in the order of the fields."""
        return self.products, self.sampling, self.scan, self.skip


@dataclass(frozen=True, slots=True)
class Convention:
    """A rule by which a cost becomes one number."""

    unit: str  # of 1e9
    total: Callable[[Cost], int]


CONVENTIONS: dict[str, Convention] = {
    # a multiply-accumulate is one; the scan is given separately
    "mac": Convention("GMAC", lambda cost: cost.products + cost.sampling),
    # a multiply-accumulate is two; the scan is included
    "flop": Convention("GFLOP", lambda cost: 2 * (cost.products + cost.sampling) + cost.scan),
    # as in MFuser's ablation table: a batch of two, a multiply-accumulate is two, of the scan only its skip
    "paper": Convention("G", lambda cost: 4 * (cost.products + cost.skip)),
}


@dataclass(frozen=True, slots=True)
class Counted:
    """The cost of a pass: total, by module (its qualified name, including what it calls) and by operator."""

    total: Cost
    by_module: Mapping[str, Cost]
    by_operator: Mapping[str, Cost]
