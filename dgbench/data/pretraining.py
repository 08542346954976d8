"""Many pretraining images with captions at once, rendered by several processes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from dgbench.data.processes import spread
from dgbench.progress import Progress, Silent
from dgbench.resources import usable_cores
from dgbench.streets.pairs import Pair, pair
from dgbench.streets.places import PRETRAIN

_CHUNK = 64  # images that a process is given at a time


@dataclass(frozen=True, slots=True)
class Pairs:
    """N images with sentences on each, and on K parts of each."""

    images: NDArray[np.uint8]  # (N, H, W, 3) RGB
    captions: list[list[str]]  # N lists of sentences
    boxes: NDArray[np.float32]  # (N, K, 4): top, left, height, width in fractions of the image
    crops: list[list[list[str]]]  # N lists of K lists of sentences


def render_many(
    indices: Sequence[int],
    size: tuple[int, int] = (128, 256),
    boxes: int = 4,
    workers: int | None = None,
    *,
    split: str = "train",
    progress: Progress | None = None,
) -> Pairs:
    """Render images of `streets-pretrain` with captions, in the order of `indices`; the result does not depend on `workers`.

    Args:
        indices: any numbers from 0; there is no last image.
        size: (H, W) in pixels.
        boxes: random parts of each image that get captions of their own.
        workers: processes; default: one for each core, up to 32. 1 renders in this process.
    Raises: ValueError for an unknown split, a negative index or a size below 32; DataError if a process is ended from outside.
    """
    count, progress = len(indices), progress or Silent()
    workers = min(workers or min(usable_cores(), 32), -(-count // _CHUNK))
    images, parts = np.empty((count, *size, 3), np.uint8), np.empty((count, boxes, 4), np.float32)
    captions: list[list[str]] = [[] for _ in range(count)]
    crops: list[list[list[str]]] = [[] for _ in range(count)]
    places = [range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
    chunks = [(place, [int(indices[at]) for at in place]) for place in places]
    work = partial(_some, split=split, size=size, boxes=boxes)
    hint = "ask for fewer workers or fewer images at a time"
    progress.start(f"rendering {PRETRAIN} {split}", count, "images")
    try:
        results = spread(work, chunks, workers, f"rendered {PRETRAIN}", hint) if workers > 1 else (work(one) for one in chunks)
        with closing(results) as made:
            for place, pairs in made:
                for at, one in zip(place, pairs, strict=True):
                    images[at], parts[at] = one.image, np.reshape(one.boxes, (boxes, 4))
                    captions[at], crops[at] = one.captions, one.crops
                progress.advance(len(pairs))
    finally:
        progress.stop()
    return Pairs(images, captions, parts, crops)


def _some(chunk: tuple[range, list[int]], split: str, size: tuple[int, int], boxes: int) -> tuple[range, list[Pair]]:
    place, indices = chunk
    return place, [pair(PRETRAIN, split, index, size, boxes) for index in indices]
