"""Dimensions of one street, by which ground, blocks, traffic and people are placed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Plan:
    """Dimensions of one street: half width of the carriageway, lanes each way, side streets, strips by side."""

    bend: float
    hand: float  # +1: traffic keeps right
    lanes: int
    lane_width: float
    half: float  # half width of the carriageway, parking included
    parking: dict[float, bool]  # by side, -1 left and +1 right
    verge: dict[float, float]
    sidewalk: dict[float, float]
    crossings: list[tuple[float, float]]  # (z of the near edge, width) of side streets
    tram: bool

    def shift(self, z: float) -> float:
        """Return how far the street has bent to the right at z."""
        ahead = max(z, 0.0)
        return self.bend * ahead * ahead

    def edge(self, side: float) -> float:
        """Return x of the far edge of the sidewalk on a straight street."""
        return side * (self.half + self.verge[side] + self.sidewalk[side])
