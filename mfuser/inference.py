"""Sliding-window inference over any Segmentor."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mfuser.segmentor import check_images


def slide(model: Callable[[Tensor], Tensor], images: Tensor, crop: tuple[int, int], stride: tuple[int, int], *,
          windows_at_once: int = 16) -> Tensor:  # fmt: skip
    """Scores (B, K, H, W) averaged over overlapping windows, in fp32 (fp64 where the model's are): no graph is kept.

    Windows start at multiples of the stride; the last one of a row or column is shifted back to the border. Images
    smaller than the window are padded with zeros on the right and below, and the padding is cut off again. Each window is
    scored in inference mode and in whatever mode (`train`, `eval`) the model is.

    Args:
        model: a Segmentor, or what maps windows (B, 3, *crop) to scores (B, K, *crop) otherwise.
        images: (B, 3, H, W) in [0, 1], which is looked at once a call.    crop, stride: (H, W) of the window and its step.
        windows_at_once: how many windows go through the model together; changes memory, not the result.

    Raises:
        TypeError: images that are not floating point.
        ValueError: images of another shape or range; a stride beyond the window, which would leave pixels unseen.
    """
    if not (0 < stride[0] <= crop[0] and 0 < stride[1] <= crop[1]):
        raise ValueError(f"stride {stride} must be positive and at most the window, {crop}")
    check_images(images)
    if not len(images):
        raise ValueError("there are no images to score: the batch is empty")
    with torch.inference_mode():
        total, seen = _summed(model, images, crop, stride, windows_at_once)
    # outside of it: an ordinary tensor, which a loss may take for its target
    return (total / seen)[:, :, : images.shape[2], : images.shape[3]]


def _summed(model: Callable[[Tensor], Tensor], images: Tensor, crop: tuple[int, int], stride: tuple[int, int],
            windows_at_once: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sum of all windows' scores (B, K, H', W') over the padded images, and how many windows saw each pixel (H', W')."""
    batch, _, height, width = images.shape
    padded = F.pad(images, (0, max(0, crop[1] - width), 0, max(0, crop[0] - height)))
    rows, columns = windows((padded.shape[-2], padded.shape[-1]), crop, stride)
    places = [(b, y, x) for y in rows for x in columns for b in range(batch)]
    total: Tensor | None = None
    for first in range(0, len(places), windows_at_once):
        part = places[first : first + windows_at_once]
        scores = model(torch.stack([padded[b, :, y : y + crop[0], x : x + crop[1]] for b, y, x in part]))
        if total is None:
            # sums of 16-bit scores would be off by more than their differences
            total = scores.new_zeros(batch, scores.shape[1], *padded.shape[-2:], dtype=_precise(scores))
        for score, (b, y, x) in zip(scores, part, strict=True):
            total[b, :, y : y + crop[0], x : x + crop[1]] += score
    assert total is not None
    seen = total.new_zeros(padded.shape[-2:])
    for y in rows:
        for x in columns:
            seen[y : y + crop[0], x : x + crop[1]] += 1
    return total, seen


def _precise(scores: Tensor) -> torch.dtype:
    return torch.float64 if scores.dtype == torch.float64 else torch.float32


def windows(size: tuple[int, int], crop: tuple[int, int], stride: tuple[int, int]) -> tuple[list[int], list[int]]:
    """Where the windows over an image of `size` begin: (rows, columns). All are (H, W)."""
    rows, columns = (
        [min(i * step, max(0, side - window)) for i in range(max(0, math.ceil((side - window) / step)) + 1)]
        for side, window, step in zip(size, crop, stride, strict=True)
    )
    return rows, columns
