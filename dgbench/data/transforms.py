"""The training view of a dataset: draw, random size and crop with a class-share rule, flip, photometric distortion.

All randomness of a sample comes from a generator made of (seed, position), so a batch is the same whichever worker makes
it and whenever training resumes.

The order of operations differs from the papers' code. There, the whole image is decoded and resized before it is cropped, and
all of this is repeated if the crop does not contain the class it was drawn for. Here the window is chosen from the label
alone; then the image is decoded as far as the window reaches, cropped, and only the crop is resized. Windows start at
whole pixels of the file instead of the resized image; the rest is the same, and eight-bit throughout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
import torch
from torch import Tensor

from dgbench.data.dataset import SegDataset
from dgbench.data.images import Part
from dgbench.data.labels import IGNORE
from dgbench.data.photometric import PRESETS, Pixels
from dgbench.data.resizing import resize_label
from dgbench.data.sampling import Around, Wanted
from dgbench.data.union import Union
from dgbench.errors import DataError

TRIES = 10  # of mmsegmentation for a class's share, and of DAFormer for a wanted class; then the last one is taken
# some of GTA5's labels have a few rows less than their images: the rows of both are used, as in the papers' loaders
ODD = 16

Scale = tuple[float, float]  # by which height and width are multiplied


class Sampler(Protocol):
    def draw(self, position: int) -> tuple[int, Wanted | Around | None]: ...


class Resize(Protocol):
    """Random resizing of an image before it is cropped; `recipe.data.ResizeSpec` explains the fields."""

    @property
    def mode(self) -> str: ...
    @property
    def short_edge(self) -> tuple[int, ...]: ...
    @property
    def sample(self) -> str: ...
    @property
    def long_edge(self) -> int | None: ...
    @property
    def size(self) -> tuple[int, int] | None: ...


@dataclass(frozen=True, slots=True)
class Augmentation:
    """Augmentation of a training crop; field names as in the recipe."""

    crop: tuple[int, int]  # (H, W)
    scale: tuple[float, float]
    cat_max_ratio: float
    flip: float
    photometric: str = "mmsegmentation"  # a key of `photometric.PRESETS`
    resize: Resize | None = None  # None: by a ratio out of `scale`


class TrainView(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """A mapping from a position in training to (image (3, H, W), label (H, W)), both uint8; `to_model` takes batches of it."""

    def __init__(self, dataset: SegDataset | Union, sampler: Sampler, augmentation: Augmentation, seed: int) -> None:
        self.dataset, self.sampler, self.augmentation, self.seed = dataset, sampler, augmentation, seed

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        drawn, wanted = self.sampler.draw(position)
        dataset, index = self.dataset.locate(drawn)
        rng = np.random.default_rng([self.seed, 2, position])
        a = self.augmentation
        label, stored = _label(dataset, index)
        if isinstance(wanted, Around):
            wanted = wanted.on(stored, label.shape)
        window, size, label_crop = draw_window(label, a, rng, wanted)
        crop = resized(dataset.image(index, window), size, a.crop)
        if rng.random() < a.flip:
            crop, label_crop = cv2.flip(crop, 1), cv2.flip(label_crop, 1)
        crop = PRESETS[a.photometric](crop, rng)
        return torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1))), torch.from_numpy(label_crop)


def _label(dataset: SegDataset, index: int) -> tuple[Pixels, tuple[int, ...]]:
    """Return the label on the image's grid, and its stored shape."""
    label, size = dataset.label(index), dataset.image_size(index)
    if dataset.size is not None:  # the image comes at this size, the label as it is stored
        return resize_label(label, size, by="opencv"), label.shape
    if any(abs(a - b) > ODD for a, b in zip(size, label.shape, strict=True)):
        dataset.image(index)  # raises an error if it has an EXIF rotation
        raise DataError(
            f"{dataset.name(index)} is {size[0]}x{size[1]} (H x W), but its label is {label.shape[0]}x{label.shape[1]}",
            "the pair is damaged or mismatched: download it again, or move both files out of the folder",
        )
    label = label[: size[0], : size[1]]
    return label, label.shape


def to_model(images: Tensor, labels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Move a batch of a TrainView to a device: images (B, 3, H, W) in [0, 1], labels (B, H, W) int64."""
    # eight-bit until here: a quarter of the bytes between processes and to the GPU
    images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
    return images.float().div_(255), labels.to(device, non_blocking=True).long()


def draw_window(
    label: Pixels, a: Augmentation, rng: np.random.Generator, wanted: Wanted | Around | None = None
) -> tuple[Part, tuple[int, int], Pixels]:
    """Return a window of random scale and position.

    Of up to 10 positions, the first is taken at which no class has more than `cat_max_ratio` of the labelled pixels. If a
    class is wanted (rare-class sampling), up to 10 windows are made so, until one has enough of it after resizing; if a
    position is wanted (class-uniform sampling), every window contains it.

    Returns: the window; the (H, W) to which it is to be resized, less than the crop where the image ends before it; its
        label at the crop's size, padded with 255.
    """
    for _ in range(TRIES + 1):
        scale = _scale(label.shape, a, rng)
        for _ in range(TRIES + 1):
            window, size = _place(label.shape, a.crop, scale, rng, wanted if isinstance(wanted, Around) else None)
            found = cv2.resize(window.of(label), size[::-1], interpolation=cv2.INTER_NEAREST)
            if _mixed(found, a.cat_max_ratio):
                break
        if not isinstance(wanted, Wanted) or np.count_nonzero(found == wanted.train_id) > wanted.pixels:
            break
    return window, size, _padded(found, a.crop, IGNORE)


def resized(image: Pixels, size: tuple[int, int], crop: tuple[int, int]) -> Pixels:
    """Return a window's image (h, w, 3) at `size` = (H, W), padded with black to `crop`.

    By OpenCV's bilinear, without antialiasing, as mmsegmentation does.
    """
    return _padded(cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR), crop, 0)


def _scale(shape: tuple[int, ...], a: Augmentation, rng: np.random.Generator) -> Scale:
    """Draw the scale of an image of (H, W)."""
    if a.resize is None or a.resize.mode == "ratio":
        ratio = a.scale[0] + (a.scale[1] - a.scale[0]) * rng.random()
        return ratio, ratio
    height, width = shape[:2]
    if a.resize.mode == "fixed":
        assert a.resize.size is not None
        return a.resize.size[0] / height, a.resize.size[1] / width
    edges = a.resize.short_edge
    edge = rng.integers(edges[0], edges[1] + 1) if a.resize.sample == "range" else edges[int(rng.integers(len(edges)))]
    ratio = edge / min(height, width)
    if a.resize.long_edge is not None:
        ratio = min(ratio, a.resize.long_edge / max(height, width))
    # whole pixels, rounded half up, as detectron2 and mmcv have it
    return int(height * ratio + 0.5) / height, int(width * ratio + 0.5) / width


def _place(
    shape: tuple[int, ...], crop: tuple[int, int], scale: Scale, rng: np.random.Generator, around: Around | None = None
) -> tuple[Part, tuple[int, int]]:
    height, width = (max(1, round(side / by)) for side, by in zip(crop, scale, strict=True))
    if around is None:
        top = int(rng.integers(max(0, shape[0] - height) + 1))
        left = int(rng.integers(max(0, shape[1] - width) + 1))
    else:
        top = _corner(around.y, height, shape[0], rng)
        left = _corner(around.x, width, shape[1], rng)
    bottom, right = min(shape[0], top + height), min(shape[1], left + width)
    size = (
        crop[0] if bottom - top == height else min(crop[0], max(1, round((bottom - top) * scale[0]))),
        crop[1] if right - left == width else min(crop[1], max(1, round((right - left) * scale[1]))),
    )
    return Part(top, left, bottom, right), size


def _corner(place: float, length: int, end: int, rng: np.random.Generator) -> int:
    """Draw the start of a window of this length that contains `place` and does not reach beyond the image."""
    pixel = int(place)
    return min(max(0, int(rng.integers(pixel - length + 1, pixel + 1))), max(0, end - length))


def _mixed(label: Pixels, cat_max_ratio: float) -> bool:
    if cat_max_ratio >= 1:
        return True
    counts = np.bincount(label.ravel(), minlength=256)[:IGNORE]
    # one class alone says nothing about borders; mmsegmentation's RandomCrop asks the same
    return bool(np.count_nonzero(counts) > 1 and counts.max() < cat_max_ratio * counts.sum())


def _padded(pixels: Pixels, crop: tuple[int, int], value: int) -> Pixels:
    below, right = crop[0] - pixels.shape[0], crop[1] - pixels.shape[1]
    if below or right:
        return np.asarray(cv2.copyMakeBorder(pixels, 0, below, 0, right, cv2.BORDER_CONSTANT, value=(value,) * 3))
    return pixels


class StepBatches(torch.utils.data.Sampler[list[int]]):
    """Positions of each step's batch on one process, from `start` (the step of a resumed run) to `stop`."""

    def __init__(self, start: int, stop: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.steps, self.batch_size, self.rank, self.world = range(start, stop), batch_size, rank, world

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            first = (step * self.world + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))
