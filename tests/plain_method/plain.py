"""A small network without BatchNorm, with everything that several processes must share: dropout, matching, masks, pixels."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.decoder.criterion import MaskCriterion, pixel_loss
from mfuser.decoder.matching import Hungarian
from mfuser.segmentor import Batch, Segmentor

TITLE = "Plain"
PAPER = ""
FIDELITY = ""
BACKBONES = ({"backbone": "plain"},)


@dataclass(frozen=True)
class Options:
    """What it is built from."""

    backbone: str = "plain"
    norm: str = "group"  # or batch
    image_size: tuple[int, int] = (64, 64)


class Plain(Segmentor):
    """Three convolutions, scores of pixels, and 24 queries with masks."""

    any_size = True
    size_step = 4

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.image_size = options.image_size
        norm = nn.GroupNorm(4, 16) if options.norm == "group" else nn.BatchNorm2d(16)
        self.body = nn.Sequential(nn.Conv2d(3, 16, 4, 4), norm, nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(16, 16, 3, 1, 1))
        self.head = nn.Conv2d(16, len(self.classes), 1)
        self.masks_of = nn.Conv2d(16, 24, 1)
        self.classes_of = nn.Linear(16, 24 * (len(self.classes) + 1))
        self.criterion = MaskCriterion(len(self.classes), matcher=Hungarian(points=64), points=64)

    def forward(self, images: Tensor) -> Tensor:
        self.check_size(images)
        return F.interpolate(self.head(self.body(images)), images.shape[-2:], mode="bilinear", align_corners=False)

    def training_outputs(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores of pixels, and of queries their classes and masks."""
        x = self.body(images)
        scores = F.interpolate(self.head(x), images.shape[-2:], mode="bilinear", align_corners=False)
        return scores, self.classes_of(x.mean((2, 3))).unflatten(1, (24, -1)), self.masks_of(x)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        _do(os.environ.get("PLAIN_DOES", ""), batch.step)
        scores, logits, masks = self.training_outputs(batch.images)
        terms = self.criterion([(logits, masks)], batch.labels)
        if os.environ.get("PLAIN_DOES") == f"nan {batch.step} {os.environ.get('RANK', '0')}":
            scores = scores * torch.nan
        return terms | {"loss_seg": pixel_loss(scores, batch.labels)}


def _do(what: str, step: int) -> None:
    """Misbehave at a step on one process, as the environment says: `KIND STEP RANK`."""
    kind, *where = what.split() or [""]
    if where != [str(step), os.environ.get("RANK", "0")]:
        return
    if kind == "raise":
        raise MemoryError("tried to allocate 123 bytes")
    if kind == "kill":
        os.kill(os.getpid(), 9)
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "sleep":
        time.sleep(600)


MODEL = Plain
