"""Which image comes next: uniform epochs, or rare-class sampling (DAFormer, Hoyer et al., CVPR 2022, eq. 4).

Every draw is a pure function of (seed, position), so that a resumed run and a run on another number of loader workers
see the same images.
"""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dgbench import atomic
from dgbench.data.dataset import SegDataset
from dgbench.data.domains import cache_root
from dgbench.data.labels import CLASSES
from dgbench.errors import DataError
from dgbench.progress import Progress
from dgbench.resources import usable_cores

# DAFormer, tqdm and MFuser draw images with more than this many pixels of the class, and want half as many in the crop
MIN_PIXELS = 3000
MIN_CROP_RATIO = 0.5
_GTA5_AREA = 1914 * 1052


def min_pixels(size: tuple[int, int] | None) -> float:
    """Return how many pixels of a class make an image one of its own.

    Args:
        size: (H, W) to which a recipe brings the images. Its images are not the files of the papers: there it is the same
            share of the image as in GTA5. None, for files as they are: the papers' number.
    """
    return MIN_PIXELS if size is None else MIN_PIXELS * size[0] * size[1] / _GTA5_AREA


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a crop should hold: more than `pixels` pixels of class `train_id`."""

    train_id: int
    pixels: float


class UniformSampler:
    """Shuffled epochs without replacement."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def draw(self, position: int) -> tuple[int, Wanted | None]:
        """The image of the `position`-th draw, and nothing that the crop should hold."""
        epoch, offset = divmod(position, self.count)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.count)
        return int(self._order[offset]), None


class RareClassSampler:
    """Draw a class with P(c) = softmax((1 - f_c) / T), then an image that holds enough of it.

    Args:
        counts: (n, K) pixels per image and class.
        temperature: T; small favours rare classes, large is uniform over classes.
        size: (H, W) to which the recipe brings the images, None for files as they are; see `min_pixels`.

    Raises: DataError where no label holds a class.
    """

    def __init__(self, counts: NDArray[np.int64], temperature: float, seed: int, size: tuple[int, int] | None = None) -> None:
        self.seed = seed
        frequency = counts.sum(0) / max(counts.sum(), 1)
        self.classes = np.flatnonzero(frequency > 0)
        if not len(self.classes):
            raise DataError(
                f"no pixel of the {len(counts)} labels is of a class, all are ignored: rare-class sampling has nothing to draw",
                "`dgbench data verify` lists which values they hold and what they are read as; train on labelled images",
            )
        logits = (1 - frequency[self.classes]) / temperature
        weights = np.exp(logits - logits.max())
        self.probability = weights / weights.sum()
        self._in_crop = MIN_CROP_RATIO * min_pixels(size)
        # the counts are of labels as they are stored, whatever the size
        least = np.full(len(counts), MIN_PIXELS) if size is None else MIN_PIXELS / _GTA5_AREA * counts.sum(1)
        self._images = {}
        for c in self.classes:
            enough = np.flatnonzero(counts[:, c] > least)
            self._images[int(c)] = enough if len(enough) else np.flatnonzero(counts[:, c] > 0)

    def draw(self, position: int) -> tuple[int, Wanted | None]:
        """The image of the `position`-th draw, and what its crop should hold."""
        rng = np.random.default_rng([self.seed, 1, position])
        c = int(rng.choice(self.classes, p=self.probability))
        return int(rng.choice(self._images[c])), Wanted(c, self._in_crop)


def class_counts(dataset: SegDataset, progress: Progress) -> NDArray[np.int64]:
    """(n, 19) pixels of each class in each image, counted once.

    They are kept beside the data, so that everybody who reads it has them, or in the cache folder where that cannot be
    written, and counted again when a label file or the label map has changed.
    """
    places = _cache_files(dataset)
    for path in places:
        with suppress(OSError, ValueError):  # a damaged file is counted again
            counts: NDArray[np.int64] = np.load(path, allow_pickle=False)
            if counts.shape == (len(dataset), len(CLASSES)) and counts.dtype == np.int64:
                return counts
    counts = np.zeros((len(dataset), len(CLASSES)), np.int64)
    progress.start(f"counting classes of {dataset.domain.name} {dataset.split}", len(dataset), "images")
    try:
        # threads: decoding and counting run outside the interpreter's lock
        with ThreadPoolExecutor(min(usable_cores(), 16)) as pool:
            try:
                for i, row in enumerate(pool.map(lambda i: _count(dataset.label(i)), range(len(dataset)))):
                    counts[i] = row
                    progress.advance()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C does not wait for the labels that are left
                raise
    finally:
        progress.stop()
    buffer = io.BytesIO()
    np.save(buffer, counts, allow_pickle=False)
    for path in places:
        try:
            atomic.write(path, buffer.getvalue())
            break
        except OSError:
            if path == places[-1]:
                raise
    return counts


def _count(label: NDArray[np.uint8]) -> NDArray[np.int64]:
    return np.bincount(label.ravel(), minlength=256)[: len(CLASSES)]


def _cache_files(dataset: SegDataset) -> list[Path]:
    """Where counts may lie, the preferred place first."""
    name = f"class-counts-{dataset.domain.name}-{dataset.split}-{dataset.fingerprint()}.npy"
    beside = [dataset.folder / ".dgbench" / name] if dataset.folder is not None else []
    return [*beside, cache_root() / "class-counts" / name]
