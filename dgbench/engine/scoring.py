"""How a protocol lets a model look at an image: windows or the whole, where masks are upsampled, mirrored and scaled."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import mfuser
from dgbench.errors import DataError
from dgbench.protocol import Protocol
from mfuser.decoder.mask_decoder import class_scores
from mfuser.segmentor import Segmentor


def score(model: Segmentor, views: Sequence[Tensor], grid: tuple[int, int], rules: Protocol) -> Tensor:
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


def _look(model: Segmentor, images: Tensor, rules: Protocol) -> Tensor:
    """Scores (B, K, H, W) of images (B, 3, H, W)."""
    ask = model if rules.upsampling == "method" else partial(_upsampled, model, rules.upsampling)
    if rules.window == "crop":
        return mfuser.slide(ask, images, crop=model.image_size, stride=rules.stride_of(model.image_size))
    try:
        model.check_size(images)
    except ValueError:
        (height, width), (rows, columns) = images.shape[-2:], model.image_size
        raise DataError(
            f"protocol `{rules.name}` shows whole images, here {height}x{width} (H x W), but `{model.method}` was "
            f"built for {rows}x{columns}",
            "score it under a protocol that slides a window: `dgbench protocols` lists them",
        ) from None
    return ask(images)


def _upsampled(model: Segmentor, order: str, images: Tensor) -> Tensor:
    """Scores with the masks upsampled before they are mixed (`masks`) or after (`scores`); a method without masks has one way."""
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
