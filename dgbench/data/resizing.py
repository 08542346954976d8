"""Resizing of images and labels to a protocol's test size.

OpenCV's bilinear has no antialiasing and counts in 11-bit fractions, Pillow's widens its kernel: where 2048 pixels
become 1024 the two differ visibly. Each is called as it is, so that a protocol's numbers are those of its papers.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dgbench.data.labels import IGNORE
from dgbench.protocol import Protocol, Size

Pixels = NDArray[np.uint8]


def as_tested(
    image: Pixels, label: Pixels, rules: Protocol, domain: str, size: Size | None = None
) -> tuple[list[Pixels], Pixels]:
    """Return the model's input images, one for each of the protocol's scales, and the label to score against.

    Args:
        image: (H, W, 3) RGB.    label: (H, W) train ids.    domain: the name by which the protocol knows its size.
        size: (H, W) of a recipe for all images, which overrides the protocol's.
    """
    if size is None:
        sizes = [rules.test_size(domain, (label.shape[0], label.shape[1]), scale) for scale in rules.scales]
        grid = rules.test_size(domain, (label.shape[0], label.shape[1]))
        image, label = prepared(image, label, rules, domain)
    else:
        sizes = [(max(1, round(size[0] * scale)), max(1, round(size[1] * scale))) for scale in rules.scales]
        grid = size
    if rules.label_grid == "resized":
        label = resize_label(label, grid, by=rules.resize)
    return [resize_image(image, target, by=rules.resize) for target in sizes], label


def prepared(image: Pixels, label: Pixels, rules: Protocol, domain: str) -> tuple[Pixels, Pixels]:
    """Return image and label as the papers' scripts prepare them: halved, or as a square; unchanged for most domains."""
    height, width = rules.prepared_size(domain, (label.shape[0], label.shape[1]))
    square = height == width and bool(rules.square)
    if (height, width) == label.shape:
        return image, label
    full = int(label.shape[1] / label.shape[0] * height) if square else width
    picture = np.asarray(Image.fromarray(image).resize((full, height), Image.Resampling.BICUBIC))
    mask = resize_label(label, (height, full), by="pillow")
    if full < width:
        sides = ((width - full) // 2, width - full - (width - full) // 2)
        return np.pad(picture, ((0, 0), sides, (0, 0))), np.pad(mask, ((0, 0), sides), constant_values=IGNORE)
    left = round((full - width) / 2)
    return picture[:, left : left + width], mask[:, left : left + width]


def resize_image(image: Pixels, size: Size, *, by: str) -> Pixels:
    """Return an RGB image (H, W, 3) at `size` = (H, W) by a resampling that `Protocol.resize` names."""
    if image.shape[:2] == tuple(size):
        return image
    if by.startswith("pillow"):
        kernel = Image.Resampling[by.removeprefix("pillow-").upper()]
        return np.asarray(Image.fromarray(image).resize(size[::-1], kernel))
    return np.asarray(cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR))


def resize_label(label: Pixels, size: Size, *, by: str) -> Pixels:
    """Return train ids (H, W) at `size` = (H, W) by the same library's nearest neighbour."""
    if label.shape == tuple(size):
        return label
    if by.startswith("pillow"):
        return np.asarray(Image.fromarray(label).resize(size[::-1], Image.Resampling.NEAREST))
    return np.asarray(cv2.resize(label, size[::-1], interpolation=cv2.INTER_NEAREST))
