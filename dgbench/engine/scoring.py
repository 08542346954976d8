"""Scoring of images as a protocol defines it: by windows or as a whole, with upsampling, flips and scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import mfuser
from dgbench.engine.modes import Ready, without_tf32
from dgbench.errors import DataError
from dgbench.protocol import Protocol
from mfuser.decoder.mask_decoder import class_scores
from mfuser.inference import bands

# pixels of an image beyond which its scores (K fp32 numbers a pixel, several times) are never held as a whole: 32 Mi
LARGE = 1 << 25
_STRIP = 1 << 26  # scores, one number each, that are held of a large image


def predicted(model: Ready, views: Sequence[Tensor], grid: tuple[int, int], rules: Protocol, device: torch.device) -> Tensor:
    """Return the train ids (B, *grid) of a batch of images of one size: the argmax of `score`.

    Images of more than `LARGE` pixels are scored one by one, and in parts: the same windows and weights, for which a score may
    differ in its last bit.

    Args:
        views: the images (B, h, w, 3) uint8 at each of the protocol's scales.    grid: (H, W) of the label.

    Raises: DataError as `score`.
    """
    largest = max(height * width for height, width in (*(view.shape[1:3] for view in views), grid))
    with without_tf32(model):
        if largest <= LARGE:
            return score(model, [_floats(view, device) for view in views], grid, rules).argmax(1)
        parts = ([view[i : i + 1] for view in views] for i in range(len(views[0])))
        return torch.stack([_in_parts(model, part, grid, rules, device) for part in parts])


def _in_parts(model: Ready, views: Sequence[Tensor], grid: tuple[int, int], rules: Protocol, device: torch.device) -> Tensor:
    height, width = views[0].shape[1:3]
    if len(views) == 1 and not rules.flip and rules.window == "crop" and (height, width) == grid:
        images = views[0].permute(0, 3, 1, 2)
        return first_of_bands(_asked(model, rules), images, model.image_size, rules.stride_of(model.image_size), device)
    seen = []
    for view in views:
        images = _floats(view, device)
        seen.append(_look(model, images, rules))
        if rules.flip:
            seen.append(_look(model, images.flip(-1), rules).flip(-1))
    return first_of(seen, grid)


@torch.inference_mode()
def first_of_bands(
    model: Callable[[Tensor], Tensor], images: Tensor, crop: tuple[int, int], stride: tuple[int, int], device: torch.device
) -> Tensor:
    """Return the best class (H, W) uint8 of an image (1, 3, H, W) uint8 at its own size, by sliding window."""
    height, width = images.shape[2:]
    best = torch.empty(height, width, dtype=torch.uint8, device=device)
    axis = 2 if width <= 4 * height else 3  # a band of rows is as wide as the image
    for start, part in bands(model, images, crop, stride, axis=axis, device=device):
        best.narrow(axis - 2, start, part.shape[axis]).copy_(part[0].argmax(0))
    return best


@torch.inference_mode()
def first_of(seen: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
    """Return the best class (*grid) uint8 of scores (1, K, h, w), each upsampled; of several, of their mean softmax."""
    height, width = grid
    best = torch.empty(grid, dtype=torch.uint8, device=seen[0].device)
    rows = max(1, _STRIP // (seen[0].shape[1] * width))
    for top in range(0, height, rows):
        total: Tensor | None = None
        for scores in seen:
            part = _strip(scores, top, min(top + rows, height), grid)
            part = part.softmax(1) if len(seen) > 1 else part
            total = part if total is None else total + part
        assert total is not None
        best[top : top + rows] = total[0].argmax(0)
    return best


def _strip(scores: Tensor, top: int, bottom: int, grid: tuple[int, int]) -> Tensor:
    """Return rows `top` up to `bottom` of scores upsampled to `grid`, bilinear without aligned corners."""
    height = scores.shape[2]
    place = (torch.arange(top, bottom, dtype=torch.float64) + 0.5) * height / grid[0] - 0.5
    place = place.clamp(0, height - 1)
    above = place.floor().long()
    share = (place - above).to(scores)[:, None]
    below = (above + 1).clamp(max=height - 1)
    rows = scores[:, :, above.to(scores.device)] * (1 - share) + scores[:, :, below.to(scores.device)] * share
    return _resize(rows, (bottom - top, grid[1]))


def _floats(view: Tensor, device: torch.device) -> Tensor:
    return view.to(device, non_blocking=True).permute(0, 3, 1, 2).contiguous().float() / 255


def score(model: Ready, views: Sequence[Tensor], grid: tuple[int, int], rules: Protocol) -> Tensor:
    """Return the scores (B, K, *grid) of a batch of images of one size; argmax over K is the prediction.

    Args:
        views: the images (B, 3, H, W) in [0, 1] at each of the protocol's scales.    grid: (H, W) of the label.

    Raises: DataError if the protocol shows whole images and the model was built for another size.
    """
    seen = [(images, mirrored) for images in views for mirrored in ((False, True) if rules.flip else (False,))]
    total: Tensor | None = None
    for images, mirrored in seen:
        scores = _look(model, images.flip(-1) if mirrored else images, rules)
        scores = _resize(scores.flip(-1) if mirrored else scores, grid)
        if len(seen) > 1:  # mmsegmentation averages these, too
            scores = scores.softmax(1)
        total = scores if total is None else total + scores
    assert total is not None
    return total / len(seen)


def _look(model: Ready, images: Tensor, rules: Protocol) -> Tensor:
    """Return scores (B, K, H, W) of images (B, 3, H, W)."""
    ask = _asked(model, rules)
    if rules.window == "crop":
        return mfuser.slide(ask, images, crop=model.image_size, stride=rules.stride_of(model.image_size))
    try:
        model.check_size(images)
    except ValueError:
        (height, width), (rows, columns) = images.shape[-2:], model.image_size
        takes = f"takes multiples of {model.size_step}" if model.any_size else f"was built for {rows}x{columns}"
        raise DataError(
            f"protocol `{rules.name}` shows whole images, here {height}x{width} (H x W), but `{model.method}` {takes}",
            "score it under a protocol that slides a window: `dgbench protocols` lists them",
        ) from None
    if model.mixes_batch:
        return torch.cat([ask(image) for image in images.split(1)])
    return ask(images)


def _asked(model: Ready, rules: Protocol) -> Callable[[Tensor], Tensor]:
    return model if rules.upsampling == "method" else partial(_upsampled, model, rules.upsampling)


def _upsampled(model: Ready, order: str, images: Tensor) -> Tensor:
    """Return scores, masks upsampled before combining them (`masks`) or after (`scores`); without masks there is one way."""
    found = model.masks(images)
    if found is None:
        scores: Tensor = model(images)
        return scores
    logits, masks = found
    size = (images.shape[-2], images.shape[-1])
    if order == "masks":
        return class_scores(logits, _resize(masks, size))
    return _resize(class_scores(logits, masks), size)


def _resize(scores: Tensor, size: tuple[int, int]) -> Tensor:
    if scores.shape[-2:] == torch.Size(size):
        return scores
    return F.interpolate(scores, size, mode="bilinear", align_corners=False)
