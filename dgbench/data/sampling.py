"""Samplers of training images: uniform epochs, by weight of the source, or by class.

Rare-class sampling is DAFormer's (Hoyer et al., CVPR 2022, eq. 4), class-uniform sampling NVIDIA's (Zhu et al., CVPR 2019), as
RobustNet has it.

Every draw is a pure function of (seed, position), so that a resumed run and a run on another number of loader workers
see the same images.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dgbench import atomic
from dgbench.data.dataset import SegDataset
from dgbench.data.labels import CLASSES
from dgbench.data.places import cache_root
from dgbench.data.union import Union
from dgbench.errors import DataError
from dgbench.progress import Progress
from dgbench.resources import usable_cores

if TYPE_CHECKING:
    from dgbench.recipe import DataSpec

# DAFormer, tqdm and MFuser draw images with more than this many pixels of the class, and require half as many in the crop
MIN_PIXELS = 3000
MIN_CROP_RATIO = 0.5
_GTA5_AREA = 1914 * 1052


def min_pixels(size: tuple[int, int] | None) -> float:
    """Return the number of pixels of a class from which on an image is drawn for it.

    Args:
        size: (H, W) to which a recipe resizes the images, for which it is the same
            share of the image as in GTA5. None, for images at their stored size: the papers' number.
    """
    return MIN_PIXELS if size is None else MIN_PIXELS * size[0] * size[1] / _GTA5_AREA


@dataclass(frozen=True, slots=True)
class Wanted:
    """Requirement on a crop: more than `pixels` pixels of class `train_id`."""

    train_id: int
    pixels: float


@dataclass(frozen=True, slots=True)
class Around:
    """Requirement on a crop: it contains this pixel (y, x), which may be a fraction."""

    y: float
    x: float

    def on(self, stored: tuple[int, ...], grid: tuple[int, ...]) -> Around:
        """Return the same position after an image of (H, W) `stored` was resized to `grid`."""
        return Around(min(self.y * grid[0] / stored[0], grid[0] - 1), min(self.x * grid[1] / stored[1], grid[1] - 1))


class UniformSampler:
    """Shuffled epochs without replacement."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def draw(self, position: int) -> tuple[int, Wanted | None]:
        """Return the image of the `position`-th draw, with no requirement on the crop."""
        epoch, offset = divmod(position, self.count)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.count)
        return int(self._order[offset]), None


class RareClassSampler:
    """Sampler that draws a class with P(c) = softmax((1 - f_c) / T), then an image with enough pixels of it.

    Args:
        counts: (n, K) pixels per image and class.
        temperature: T; small favours rare classes, large is uniform over classes.
        size: (H, W) to which the recipe resizes the images, None for their stored size; see `min_pixels`.

    Raises: DataError where no label holds a class.
    """

    def __init__(self, counts: NDArray[np.int64], temperature: float, seed: int, size: tuple[int, int] | None = None) -> None:
        self.seed = seed
        frequency = counts.sum(0) / max(counts.sum(), 1)
        self.classes = np.flatnonzero(frequency > 0)
        if not len(self.classes):
            raise DataError(
                f"all pixels of the {len(counts)} labels are ignored: rare-class sampling has no class to draw",
                "`dgbench data verify` lists which values they hold and what they are read as; train on labelled images",
            )
        logits = (1 - frequency[self.classes]) / temperature
        weights = np.exp(logits - logits.max())
        self.probability = weights / weights.sum()
        self._in_crop = MIN_CROP_RATIO * min_pixels(size)
        # counts are those of labels at their stored size
        least = np.full(len(counts), MIN_PIXELS) if size is None else MIN_PIXELS / _GTA5_AREA * counts.sum(1)
        self._images = {}
        for c in self.classes:
            enough = np.flatnonzero(counts[:, c] > least)
            self._images[int(c)] = enough if len(enough) else np.flatnonzero(counts[:, c] > 0)

    def draw(self, position: int) -> tuple[int, Wanted | None]:
        """Return the image of the `position`-th draw, and what its crop should contain."""
        rng = np.random.default_rng([self.seed, 1, position])
        c = int(rng.choice(self.classes, p=self.probability))
        return int(rng.choice(self._images[c])), Wanted(c, self._in_crop)


class WeightedSampler:
    """Sampler that draws a source by weight, then one of its images, with replacement.

    Args:
        counts: images of each source, in the order of the union.    weights: one for each source.
    """

    def __init__(self, counts: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self.seed, self.counts = seed, list(counts)
        self.first = np.concatenate([[0], np.cumsum(counts)[:-1]])
        self.probability = np.asarray(weights, np.float64) / math.fsum(weights)

    def draw(self, position: int) -> tuple[int, None]:
        """Return the image of the `position`-th draw, with no requirement on the crop."""
        rng = np.random.default_rng([self.seed, 3, position])
        source = int(rng.choice(len(self.counts), p=self.probability))
        return int(self.first[source] + rng.integers(self.counts[source])), None


class ClassUniformSampler:
    """Shuffled epochs in which a share of the images is drawn by class, equally for all, and cropped around that class.

    An epoch of `count` images has int(count * (1 - share)) that are drawn uniformly, and for every class that occurs
    int(count * share / 19) of its tiles: shuffled, and repeated if there are fewer.

    Args:
        tiles: (n, 4) of image, class, and the centroid's y and x, as `class_tiles` returns them.
        count: images of the dataset.    share: of an epoch, drawn by class.

    Raises: DataError where there is no tile, or an epoch would have no image.
    """

    def __init__(self, tiles: NDArray[np.float64], count: int, share: float, seed: int, tile: int) -> None:
        self.count, self.seed, self.tiles = count, seed, tiles
        self.uniform, self.each = int(count * (1 - share)), int(count * share / len(CLASSES))
        self.classes = np.unique(tiles[:, 1]) if len(tiles) else np.empty(0)
        if not len(self.classes):
            raise DataError(
                f"no label holds a class in a whole tile of {tile} x {tile} pixels: class-uniform sampling has nothing to draw",
                "set data.class_uniform.tile to at most the labels' height and width; `dgbench data verify` says what they hold",
            )
        if not self.each:
            raise DataError(
                f"{count} images are too few for class-uniform sampling of a share of {share:g}: "
                f"no image is left for each of {len(CLASSES)} classes",
                f"train on at least {math.ceil(len(CLASSES) / share)} images, or set data.class_uniform.share higher",
            )
        self.length = self.uniform + self.each * len(self.classes)
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def draw(self, position: int) -> tuple[int, Around | None]:
        """Return the image of the `position`-th draw, and the position that its crop should contain."""
        epoch, offset = divmod(position, self.length)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        one = int(self._order[offset])
        if one < self.count:
            return one, None
        image, _, y, x = self.tiles[one - self.count]
        return int(image), Around(float(y), float(x))

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        """Return shuffled images, followed by tiles."""
        rng = np.random.default_rng([self.seed, 4, epoch])
        parts = [np.resize(rng.permutation(self.count), self.uniform)]
        for c in self.classes:
            own = rng.permutation(np.flatnonzero(self.tiles[:, 1] == c)) + self.count
            parts.append(np.resize(own, self.each))
        order: NDArray[np.int64] = rng.permutation(np.concatenate(parts))
        return order


def sampler_of(
    data: DataSpec, dataset: SegDataset | Union, seed: int, progress: Progress
) -> UniformSampler | WeightedSampler | RareClassSampler | ClassUniformSampler:
    """Return the sampler of a recipe's `data`.

    Raises: DataError if it chooses images by their classes, and no label holds any.
    """
    if data.class_uniform is not None:
        rule = data.class_uniform
        return ClassUniformSampler(class_tiles(dataset, rule.tile, progress), len(dataset), rule.share, seed, rule.tile)
    if data.rare_class_sampling is not None:
        counts = class_counts(dataset, progress)
        if not counts.any():
            raise DataError(
                f"no pixel of `{data.source}` {dataset.split} has one of the 19 classes: all are ignored",
                f"see which values its labels hold: dgbench data verify {' '.join(data.sources)}",
            )
        return RareClassSampler(counts, data.rare_class_sampling, seed, dataset.size)
    if data.source_weights is not None:
        return WeightedSampler([len(part) for part in dataset.parts], data.source_weights, seed)
    return UniformSampler(len(dataset), seed)


def class_counts(dataset: SegDataset | Union, progress: Progress) -> NDArray[np.int64]:
    """Return (n, 19) pixels of each class in each image, counted once.

    They are stored beside the data, for all users of it, or in the cache folder if that cannot be
    written, and counted again when a label file or the label map has changed.
    """
    if isinstance(dataset, Union):
        return np.concatenate([class_counts(part, progress) for part in dataset.parts])

    def count(index: int) -> NDArray[np.int64]:
        return np.bincount(dataset.label(index).ravel(), minlength=256)[: len(CLASSES)][None]

    counts = _looked_up(dataset, "class-counts", count, (np.int64, len(CLASSES)), progress)
    return counts.astype(np.int64, copy=False)


def class_tiles(dataset: SegDataset | Union, tile: int, progress: Progress) -> NDArray[np.float64]:
    """Return (n, 4) of image, class, and y and x of the class's centroid, for each class in each square tile of the labels.

    Tiles of `tile` pixels lie side by side from the upper left corner; the rest at the right and bottom has none, as in the
    original code. The result is stored like that of `class_counts`.
    """
    if isinstance(dataset, Union):
        found = [class_tiles(part, tile, progress) for part in dataset.parts]
        for part, first in zip(found, dataset.first, strict=True):
            part[:, 0] += first
        return np.concatenate(found)

    def centroids(index: int) -> NDArray[np.float64]:
        label = dataset.label(index)
        rows = [
            (index, c, top + y, left + x)
            for top in range(0, label.shape[0] - tile + 1, tile)
            for left in range(0, label.shape[1] - tile + 1, tile)
            for c, (y, x) in _centroids(label[top : top + tile, left : left + tile])
        ]
        return np.array(rows, np.float64).reshape(-1, 4)

    return _looked_up(dataset, f"class-tiles-{tile}", centroids, (np.float64, 4), progress)


def _centroids(label: NDArray[np.uint8]) -> Iterator[tuple[int, tuple[float, float]]]:
    present = np.flatnonzero(np.bincount(label.ravel(), minlength=256)[: len(CLASSES)])
    for c in present:
        ys, xs = np.nonzero(label == c)
        yield int(c), (float(ys.mean()), float(xs.mean()))


def _looked_up(
    dataset: SegDataset, what: str, one: Callable[[int], NDArray[Any]], form: tuple[type, int], progress: Progress
) -> NDArray[Any]:
    """Return the results of `one` for all labels, concatenated; from a file if there is one."""
    places = _cache_files(dataset, what)
    for path in places:
        with suppress(OSError, ValueError):  # a damaged file is made again
            kept: NDArray[Any] = np.load(path, allow_pickle=False)
            whole = what != "class-counts" or len(kept) == len(dataset)
            if kept.ndim == 2 and kept.shape[1] == form[1] and kept.dtype == form[0] and whole:
                return kept
    found = []
    progress.start(f"counting classes of {dataset.domain.name} {dataset.split}", len(dataset), "images")
    try:
        # threads: decoding and counting run outside the interpreter's lock
        with ThreadPoolExecutor(min(usable_cores(), 16)) as pool:
            try:
                for rows in pool.map(one, range(len(dataset))):
                    found.append(rows)
                    progress.advance()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C does not wait for the remaining labels
                raise
    finally:
        progress.stop()
    together = np.concatenate(found)
    buffer = io.BytesIO()
    np.save(buffer, together, allow_pickle=False)
    for path in places:
        try:
            atomic.write(path, buffer.getvalue())
            break
        except OSError:
            if path == places[-1]:
                raise
    return together


def _cache_files(dataset: SegDataset, what: str) -> list[Path]:
    """Return the folders in which they may be, the preferred one first."""
    name = f"{what}-{dataset.domain.name}-{dataset.split}-{dataset.fingerprint()}.npy"
    beside = [dataset.folder / ".dgbench" / name] if dataset.folder is not None else []
    return [*beside, cache_root() / "class-counts" / name]
