"""Several sources as one dataset: the concatenation of their images."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from dgbench.data.dataset import SegDataset
from dgbench.progress import Progress

if TYPE_CHECKING:
    from pathlib import Path

    from dgbench.recipe import DataSpec


class Union:
    """The images of several datasets, in their order.

    `available`, `extra` and the length sum up; `exported` is true if that of one of them is; `split` names theirs.
    """

    def __init__(self, parts: Sequence[SegDataset]) -> None:
        self.parts = tuple(parts)
        self.first = (0, *accumulate(len(part) for part in self.parts[:-1]))  # index of each one's first image
        self.split = "+".join(dict.fromkeys(part.split for part in self.parts))
        sizes = {part.size for part in self.parts}
        self.size = sizes.pop() if len(sizes) == 1 else None  # (H, W) to which all are resized

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def available(self) -> int:
        return sum(part.available for part in self.parts)

    @property
    def extra(self) -> int:
        return sum(part.extra for part in self.parts)

    @property
    def exported(self) -> bool:
        return any(part.exported for part in self.parts)

    def locate(self, index: int) -> tuple[SegDataset, int]:
        """Return the dataset of an image, and the image's index in it."""
        which = bisect.bisect_right(self.first, index) - 1
        return self.parts[which], index - self.first[which]

    def prepare(self, progress: Progress, workers: int | None = None) -> None:
        """Render images that are not in the cache, in parallel."""
        for part in self.parts:
            part.prepare(progress, workers)


def sources(data: DataSpec, root: Path | None = None) -> SegDataset | Union:
    """Return the training dataset of a recipe's `data`.

    Raises: DataError if files of a source are missing.
    """
    pairs = zip(data.rows(data.sources, root), data.source_splits, strict=True)
    parts = [SegDataset(row, split, root=root, size=data.size, limit=data.train_images) for row, split in pairs]
    return parts[0] if len(parts) == 1 else Union(parts)
