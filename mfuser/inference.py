"""Sliding-window inference over any Segmentor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mfuser.by_size import by_size
from mfuser.segmentor import check_images

_WINDOWS = 16  # at a time


def slide(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    crop: tuple[int, int],
    stride: tuple[int, int],
    *,
    windows_at_once: int | None = None,
) -> Tensor:
    """Return scores (B, K, H, W) averaged over overlapping windows, in fp32 (fp64 for fp64 models); no graph is kept.

    Windows start at multiples of the stride; the last one of a row or column is shifted back to the border. Images
    smaller than the window are padded with zeros on the right and below, and the padding is cut off again. Each window is
    scored in inference mode and in the model's current mode (`train`, `eval`).

    Args:
        model: a Segmentor, or another function from windows (B, 3, *crop) to scores (B, K, *crop).
        images: (B, 3, H, W) in [0, 1], which is checked once per call.    crop, stride: (H, W) of the window and its step.
        windows_at_once: how many windows go through the model together; changes memory, not the result: to a model that
            declares `mixes_batch` they are shown one at a time. By default 16; a model that has `at_once` says how many.

    Raises:
        TypeError: images that are not floating point.
        ValueError: images of another shape or range; a stride beyond the window, which would leave pixels unseen.
    """
    if not (0 < stride[0] <= crop[0] and 0 < stride[1] <= crop[1]):
        raise ValueError(f"stride {stride} must be positive and at most the window, {crop}")
    check_images(images)
    if not len(images):
        raise ValueError("there are no images to score: the batch is empty")
    scores: Tensor | None = None
    for top, part in bands(model, images, crop, stride, windows_at_once=windows_at_once):
        if scores is None:
            # outside of inference mode: an ordinary tensor, which a loss can use as its target
            scores = part.new_empty(*part.shape[:2], *images.shape[2:])
        scores[:, :, top : top + part.shape[2]] = part
    assert scores is not None
    return scores


def bands(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    crop: tuple[int, int],
    stride: tuple[int, int],
    *,
    axis: int = 2,
    windows_at_once: int | None = None,
    device: torch.device | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yield the scores of `slide` in parts along one axis, never those of the whole image at once.

    Args:
        images: floating point as `slide` takes, or uint8 (B, 3, H, W) in 0..255, of which each window is divided by 255.
        axis: 2 for bands of rows (B, K, h, W), h <= crop[0]; 3 for bands of columns (B, K, H, w), w <= crop[1].
        device: where windows are moved to before they are scored; None: they stay.

    Yields: the first row (or column) of a band, and its scores: tensors of inference mode, the bands one behind the other.
    """
    along, across = axis - 2, 3 - axis
    sides = (images.shape[2], images.shape[3])
    missing = [max(0, window - side) for window, side in zip(crop, sides, strict=True)]
    padded = F.pad(images, (0, missing[1], 0, missing[0])) if any(missing) else images
    starts = windows((padded.shape[2], padded.shape[3]), crop, stride)
    places = [(b, first, second) for first in starts[along] for second in starts[across] for b in range(len(images))]
    together, whole = _together(model, len(places), windows_at_once)
    total: Tensor | None = None  # over the windows that begin at `top`, and the parts of earlier ones that overlap them
    top = 0

    def finished(count: int) -> Tensor:
        assert total is not None
        axes = zip(starts, crop, padded.shape[2:], strict=True)
        here = [_covered(tuple(first), window, side, device=total.device) for first, window, side in axes]
        here[along] = here[along][top : top + count]
        # their product, as large as the image, is made where the sums are: counts are exact in any order
        mean = total.narrow(axis, 0, count) / (here[0].to(total)[:, None] * here[1].to(total))
        return mean[:, :, : sides[0], : sides[1]].narrow(axis, 0, min(count, sides[along] - top))

    for begin in range(0, len(places), together):
        part, ready = places[begin : begin + together], []
        with torch.inference_mode():  # not around `yield`: it would apply to the caller's code
            # a model that is prepared for a number of windows sees no other: the last one is shown again
            seen = part + part[-1:] * (together - len(part)) if whole else part
            # together to another device: it would be waited for each of them
            shown = torch.stack([_window(padded, place, crop, along) for place in seen]).to(device)
            scores = model(shown if shown.is_floating_point() else shown.float() / 255)[: len(part)]
            for score, (b, first, second) in zip(scores, part, strict=True):
                if total is None:
                    shape = list(padded.shape[2:])
                    shape[along] = crop[along]
                    # sums of 16-bit scores would have larger errors than their differences
                    total = scores.new_zeros(len(images), scores.shape[1], *shape, dtype=_precise(scores))
                if first > top:
                    ready.append((top, finished(first - top)))
                    kept, total = total.narrow(axis, first - top, crop[along] - first + top), torch.zeros_like(total)
                    total.narrow(axis, 0, kept.shape[axis]).copy_(kept)
                    top = first
                total[b].narrow(1 + across, second, crop[across]).add_(score)
            if begin + together >= len(places):
                ready.append((top, finished(crop[along])))
        yield from ready


def _together(model: Callable[[Tensor], Tensor], windows: int, given: int | None) -> tuple[int, bool]:
    """Return how many of so many windows go through a model together, and whether it is to be that many every time."""
    if mixes_batch(model):
        return 1, False
    if given is not None:
        return given, False
    asked = next((each.at_once for each in _parts(model) if hasattr(each, "at_once")), None)
    return (_WINDOWS, False) if asked is None else (asked(windows), True)


def mixes_batch(model: Callable[[Tensor], Tensor]) -> bool:
    """Return whether a model, or a `functools.partial` of one, declares that it mixes the images of a batch."""
    return any(getattr(each, "mixes_batch", False) for each in _parts(model))


def _parts(model: Any) -> Iterator[Any]:
    """Yield a model, of a `functools.partial` its function and arguments."""
    if isinstance(model, partial):
        for each in (model.func, *model.args):
            yield from _parts(each)
    else:
        yield model


def _window(images: Tensor, place: tuple[int, int, int], crop: tuple[int, int], along: int) -> Tensor:
    b, first, second = place
    y, x = (second, first) if along else (first, second)
    return images[b, :, y : y + crop[0], x : x + crop[1]]


@by_size
def _covered(starts: tuple[int, ...], window: int, side: int, *, device: torch.device | None = None) -> Tensor:
    """Return the number of windows that cover each position of one axis; on a GPU no band waits for it to be copied."""
    count = torch.zeros(side, device=device)
    for start in starts:
        count[start : start + window] += 1
    return count


def _precise(scores: Tensor) -> torch.dtype:
    return torch.float64 if scores.dtype == torch.float64 else torch.float32


def windows(size: tuple[int, int], crop: tuple[int, int], stride: tuple[int, int]) -> tuple[list[int], list[int]]:
    """Return where the windows over an image of `size` begin: (rows, columns). All are (H, W)."""
    rows, columns = (
        [min(i * step, max(0, side - window)) for i in range(max(0, math.ceil((side - window) / step)) + 1)]
        for side, window, step in zip(size, crop, stride, strict=True)
    )
    return rows, columns
