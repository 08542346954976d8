"""The training view of a dataset: draw, random scale and crop with a class-share rule, flip, photometric distortion.

All randomness of a sample comes from a generator made of (seed, position), so a batch is the same whichever worker makes
it and whenever training resumes. Cropping comes before resizing: the same window as resizing first, at a fraction of the
cost; only the interpolation at the window's border differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from dgbench.data.dataset import SegDataset
from dgbench.data.labels import IGNORE
from dgbench.data.sampling import MIN_SHARE

CROP_TRIES = 10


class Sampler(Protocol):
    def draw(self, position: int) -> tuple[int, int | None]: ...


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What a training crop goes through; field names as in the recipe."""

    crop: tuple[int, int]  # (H, W)
    scale: tuple[float, float]
    cat_max_ratio: float
    flip: float
    photometric: bool


class TrainView(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Maps a position in the training stream to (image (3, H, W) float in [0, 1], label (H, W) int64)."""

    def __init__(self, dataset: SegDataset, sampler: Sampler, augmentation: Augmentation, seed: int) -> None:
        self.dataset, self.sampler, self.augmentation, self.seed = dataset, sampler, augmentation, seed

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        index, wanted = self.sampler.draw(position)
        sample = self.dataset[index]
        rng = np.random.default_rng([self.seed, 2, position])
        a = self.augmentation
        image, label = random_crop(sample.image, sample.label, a, rng, wanted)
        if rng.random() < a.flip:
            image, label = F.horizontal_flip(image), F.horizontal_flip(label)
        if a.photometric:
            distorted = photometric(np.ascontiguousarray(image.permute(1, 2, 0).numpy()), rng)
            image = tv_tensors.Image(torch.from_numpy(distorted).permute(2, 0, 1))
        return F.to_dtype(image, torch.float32, scale=True).as_subclass(Tensor), label.as_subclass(Tensor).long()


def random_crop(image: NDArray[np.uint8], label: NDArray[np.uint8], a: Augmentation, rng: np.random.Generator,
                wanted: int | None = None) -> tuple[tv_tensors.Image, tv_tensors.Mask]:  # fmt: skip
    """A window of random scale and place, resized to the crop size.

    Up to 10 windows are tried until no class holds more than `cat_max_ratio` of the labelled pixels and, when a class
    is wanted (rare-class sampling), the window holds enough of it; the last window is taken as it is. Where the window
    reaches beyond the image, the image is padded with black and the label with 255.
    """
    height, width = label.shape
    scale = a.scale[0] + (a.scale[1] - a.scale[0]) * rng.random()
    window_h, window_w = (max(1, round(side / scale)) for side in a.crop)
    top = left = 0
    for _ in range(CROP_TRIES):
        top = int(rng.integers(max(0, height - window_h) + 1))
        left = int(rng.integers(max(0, width - window_w) + 1))
        if _acceptable(label[top : top + window_h, left : left + window_w], a.cat_max_ratio, wanted, label.size):
            break
    cropped = label[top : top + window_h, left : left + window_w]
    pixels = np.ascontiguousarray(image[top : top + window_h, left : left + window_w].transpose(2, 0, 1))
    pad = [0, 0, window_w - cropped.shape[1], window_h - cropped.shape[0]]
    out = tv_tensors.Image(torch.from_numpy(pixels))
    mask = tv_tensors.Mask(torch.from_numpy(cropped.copy()))
    if any(pad):
        out, mask = F.pad(out, pad, fill=0), F.pad(mask, pad, fill=IGNORE)
    if (window_h, window_w) != a.crop:
        out, mask = F.resize(out, list(a.crop), antialias=True), F.resize_mask(mask, list(a.crop))
    return out, mask


def photometric(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """An RGB image (H, W, 3) with brightness, contrast, saturation and hue changed, each in half of the draws.

    The ranges and the order are those of mmsegmentation's PhotoMetricDistortion, which all compared methods train with:
    torchvision's transform of the same name shuffles colour channels as well, which none of them does.
    """
    if rng.random() < 0.5:
        image = _affine(image, 1.0, rng.uniform(-32, 32))
    contrast_first = rng.random() < 0.5
    if contrast_first and rng.random() < 0.5:
        image = _affine(image, rng.uniform(0.5, 1.5), 0.0)
    saturate, turn = rng.random(2) < 0.5
    if saturate or turn:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        if saturate:
            hsv[..., 1] = _affine(hsv[..., 1], rng.uniform(0.5, 1.5), 0.0)
        if turn:  # OpenCV counts hue in steps of two degrees
            hsv[..., 0] = (hsv[..., 0].astype(np.int16) + rng.integers(-18, 18)) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).astype(np.uint8, copy=False)
    if not contrast_first and rng.random() < 0.5:
        image = _affine(image, rng.uniform(0.5, 1.5), 0.0)
    return image


def _affine(values: NDArray[np.uint8], gain: float, offset: float) -> NDArray[np.uint8]:
    """A look-up table: eight-bit values have no more than 256 results."""
    table = np.clip(np.arange(256, dtype=np.float32) * gain + offset, 0, 255).astype(np.uint8)
    mapped: NDArray[np.uint8] = table[values]
    return mapped


def _acceptable(label: NDArray[np.uint8], cat_max_ratio: float, wanted: int | None, area: int) -> bool:
    counts = np.bincount(label.ravel(), minlength=256)
    if wanted is not None and counts[wanted] < 0.5 * MIN_SHARE * area:
        return False
    counts = counts[:IGNORE]
    # one class alone says nothing about borders; mmsegmentation's RandomCrop asks the same
    return bool(np.count_nonzero(counts) > 1 and counts.max() < cat_max_ratio * counts.sum())


class StepBatches(torch.utils.data.Sampler[list[int]]):
    """Positions of each step's batch on one process, from `start` to `stop`: a resumed run asks from where it was."""

    def __init__(self, start: int, stop: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.steps, self.batch_size, self.rank, self.world = range(start, stop), batch_size, rank, world

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            first = (step * self.world + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))
