"""Lines and dots as convex polygons with whole-number corners.

OpenCV's own thick lines and small circles differ between versions 4 and 5; its convex fill does not.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from dgbench.streets.dice import turn

_RING = tuple(turn(30.0 * step + 15.0) for step in range(12))


def dot(canvas: NDArray[np.uint8], x: float, y: float, radius: float, value: int) -> None:
    """Fill a disc (a 12-gon) around (x, y), in pixels."""
    corners = [(math.floor((x + radius * c) * 16.0 + 0.5), math.floor((y + radius * s) * 16.0 + 0.5)) for c, s in _RING]
    cv2.fillConvexPoly(canvas, np.array(corners, np.int32), value, cv2.LINE_8, 4)


def line(canvas: NDArray[np.uint8], start: tuple[float, float], end: tuple[float, float], width: float, value: int) -> None:
    """Fill a straight stroke from `start` to `end`, in pixels; its fill covers every pixel it touches."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    scale = 0.5 * max(width - 1.0, 0.0) / max(math.sqrt(dx * dx + dy * dy), 1e-6)
    nx, ny = -dy * scale, dx * scale
    corners = [
        (math.floor((x + side * nx) * 16.0 + 0.5), math.floor((y + side * ny) * 16.0 + 0.5))
        for (x, y), side in ((start, 1.0), (end, 1.0), (end, -1.0), (start, -1.0))
    ]
    cv2.fillConvexPoly(canvas, np.array(corners, np.int32), value, cv2.LINE_8, 4)
