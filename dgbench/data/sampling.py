"""Which image comes next: uniform epochs, or rare-class sampling (DAFormer, Hoyer et al., CVPR 2022, eq. 4).

Every draw is a pure function of (seed, position), so that a resumed run and a run on another number of loader workers
see the same images.
"""

from __future__ import annotations

import hashlib
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dgbench import atomic
from dgbench.data.dataset import SegDataset
from dgbench.data.domains import cache_root
from dgbench.data.labels import CLASSES
from dgbench.progress import Progress
from dgbench.resources import usable_cores

# DAFormer keeps images with at least 3000 of GTA5's 1914 x 1052 pixels of the drawn class
MIN_SHARE = 3000 / (1914 * 1052)


class UniformSampler:
    """Shuffled epochs without replacement."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def draw(self, position: int) -> tuple[int, int | None]:
        """The image of the `position`-th draw, and no class that the crop should hold."""
        epoch, offset = divmod(position, self.count)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.count)
        return int(self._order[offset]), None


class RareClassSampler:
    """Draw a class with P(c) = softmax((1 - f_c) / T), then an image that holds enough of it.

    Args:
        counts: (n, K) pixels per image and class.
        temperature: T; small favours rare classes, large is uniform over classes.
    """

    def __init__(self, counts: NDArray[np.int64], temperature: float, seed: int) -> None:
        self.seed = seed
        share = counts / counts.sum(1, keepdims=True).clip(1)
        frequency = counts.sum(0) / max(counts.sum(), 1)
        self.classes = np.flatnonzero(frequency > 0)
        logits = (1 - frequency[self.classes]) / temperature
        weights = np.exp(logits - logits.max())
        self.probability = weights / weights.sum()
        self._images = {}
        for c in self.classes:
            enough = np.flatnonzero(share[:, c] >= MIN_SHARE)
            self._images[int(c)] = enough if len(enough) else np.flatnonzero(counts[:, c] > 0)

    def draw(self, position: int) -> tuple[int, int | None]:
        """The image of the `position`-th draw, and the class that its crop should hold."""
        rng = np.random.default_rng([self.seed, 1, position])
        c = int(rng.choice(self.classes, p=self.probability))
        return int(rng.choice(self._images[c])), c


def class_counts(dataset: SegDataset, progress: Progress) -> NDArray[np.int64]:
    """(n, 19) pixels of each class in each image, counted once and kept in the cache folder."""
    path = _cache_file(dataset)
    if path.exists():
        counts: NDArray[np.int64] = np.load(path, allow_pickle=False)
        if counts.shape == (len(dataset), len(CLASSES)):
            return counts
    counts = np.zeros((len(dataset), len(CLASSES)), np.int64)
    progress.start(f"counting classes of {dataset.domain.name} {dataset.split}", len(dataset), "images")
    try:
        # threads: decoding and counting run outside the interpreter's lock
        with ThreadPoolExecutor(min(usable_cores(), 16)) as pool:
            for i, row in enumerate(pool.map(lambda i: _count(dataset.label(i)), range(len(dataset)))):
                counts[i] = row
                progress.advance()
    finally:
        progress.stop()
    buffer = io.BytesIO()
    np.save(buffer, counts, allow_pickle=False)
    atomic.write(path, buffer.getvalue())
    return counts


def _count(label: NDArray[np.uint8]) -> NDArray[np.int64]:
    return np.bincount(label.ravel(), minlength=256)[: len(CLASSES)]


def _cache_file(dataset: SegDataset) -> Path:
    names = hashlib.sha256("\n".join(dataset.name(i) for i in range(len(dataset))).encode()).hexdigest()[:16]
    size = "x".join(map(str, dataset.size)) if dataset.size else "files"
    stem = f"{dataset.domain.name}-{dataset.domain.revision()}-{dataset.split}-{size}-{names}"
    return cache_root() / "class-counts" / f"{stem}.npy"
