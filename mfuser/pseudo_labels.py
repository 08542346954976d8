"""Pseudo-labels for unlabelled images: refinement by class-agnostic segments; and the photometric distortion of a batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mfuser.labels import IGNORE
from mfuser.processes import even_rows

POINTS = 5  # per component
NO_SEGMENT = 255


def refined(labels: Tensor, segments: Tensor, larger_than: int) -> Tensor:
    """Return pseudo-labels (B, H, W) in which segments have the classes of a teacher's labels, as CLOUDS does with SAM's masks.

    In each connected component (4-connectivity) of more than `larger_than` pixels five points are drawn; the segment with most
    of them becomes the component's mask. Pixels in several masks, or in none, are ignored (255). An image without such a
    mask keeps the teacher's labels.

    Args:
        labels: (B, H, W) train ids.    segments: (B, H, W), the number of each pixel's segment, 255 for none.
    """
    given, numbers = labels.cpu().numpy(), segments.cpu().numpy()
    found = np.stack([_refined(one, other, larger_than) for one, other in zip(given, numbers, strict=True)])
    return torch.from_numpy(found).to(labels)


def _refined(labels: NDArray[np.int64], segments: NDArray[np.integer[Any]], larger_than: int) -> NDArray[np.int64]:
    from scipy import ndimage

    out = np.full_like(labels, IGNORE)
    claims: dict[int, list[int]] = {}  # segment -> the class of each component whose mask it is
    for train_id in np.unique(labels):
        components, count = ndimage.label(labels == train_id)
        sizes = np.bincount(components.ravel(), minlength=count + 1)
        for component in np.flatnonzero(sizes[1:] > larger_than) + 1:
            places = np.flatnonzero(components == component)
            chosen = torch.randperm(len(places))[:POINTS].numpy()
            hit = segments.ravel()[places[chosen]]
            if (hit := hit[hit != NO_SEGMENT]).size:
                claims.setdefault(int(np.bincount(hit).argmax()), []).append(int(train_id))
    if not claims:
        return labels
    for number, classes in claims.items():
        if len(classes) == 1:
            out[segments == number] = classes[0]
    return out


def distorted(images: Tensor) -> Tensor:
    """Return images (B, 3, H, W) in [0, 1] with changed brightness, contrast, saturation and hue, each with probability 0.5.

    Ranges and order are those of SSD's distortion (Liu et al., ECCV 2016) as in detectron2.
    """
    drawn = even_rows(len(images)).of(
        lambda total: torch.stack([torch.cat([torch.rand(5), torch.rand(4)]) for _ in range(total)])
    )
    return torch.stack([_distorted(image, numbers) for image, numbers in zip(images, drawn, strict=True)])


def _nine() -> Tensor:
    return torch.cat([torch.rand(5), torch.rand(4)])


def _distorted(image: Tensor, drawn: Tensor) -> Tensor:
    from torchvision.transforms.v2 import functional as tv

    brightness, first, contrast, saturation, hue = (drawn[:5] < 0.5).tolist()
    shift, factor, colour, turn = drawn[5:].tolist()
    if brightness:
        image = (image + (2 * shift - 1) * 32 / 255).clamp(0, 1)
    if contrast and first:
        image = (image * (0.5 + factor)).clamp(0, 1)
    if saturation:
        image = tv.adjust_saturation(image.clamp(0, 1), 0.5 + colour)
    if hue:
        image = tv.adjust_hue(image.clamp(0, 1), (2 * turn - 1) * 0.1)
    if contrast and not first:
        image = (image * (0.5 + factor)).clamp(0, 1)
    return image
