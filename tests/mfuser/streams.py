"""What a method's further streams of images may give, for tests of its losses."""

from __future__ import annotations

import torch

from mfuser.segmentor import Batch, Segmentor


def with_extras(model: Segmentor, batch: Batch) -> Batch:
    """Fill in the streams that a model declares, with images and labels drawn by the generator of the CPU."""
    for stream in model.extras:
        size = tuple(batch.images.shape[-2:]) if stream.size == "crop" else stream.size
        batch.extra[stream.name] = torch.rand(len(batch.images), 3, *size, dtype=batch.images.dtype)
        if stream.labels:
            batch.extra[f"{stream.name}_labels"] = torch.randint(0, 19, (len(batch.images), *size))
    return batch
