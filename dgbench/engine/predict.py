"""Segment photographs with a trained model and draw the result over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import mfuser
from dgbench.data.dataset import read_image
from dgbench.data.labels import NAMES
from dgbench.data.sheet import legend, overlay, save_image
from dgbench.engine import checkpoints
from dgbench.engine.device import pick_device
from dgbench.errors import DataError
from dgbench.recipe import load_recipe
from mfuser.segmentor import Segmentor


@dataclass(frozen=True, slots=True)
class Prediction:
    """What was found in one photograph."""

    photo: Path
    overlay: Path
    method: str
    shares: dict[str, float]  # class name -> share of the pixels, largest first


def predict(photos: Sequence[Path], run: Path, out: Path, *, device: str | None = None) -> list[Prediction]:
    """Write an overlay with a legend for each photograph.

    Args:
        photos: image files of any size.
        run: a run folder or a saved model.
        out: the overlay's file for one photograph, a folder for several.

    Raises: DataError, CheckpointError naming the file at fault.
    """
    if len(photos) > 1 and out.suffix:
        raise DataError(f"{len(photos)} photographs cannot all be written to {out}", "give a folder with --out")
    images = [read_image(photo) for photo in photos]  # all of them first: a bad path costs no model time
    on = pick_device(device)
    model = checkpoints.load_model(run).to(on)
    height = _trained_height(run)
    results = []
    for photo, image in zip(photos, images, strict=True):
        target = out if out.suffix else out / f"{photo.stem}-overlay.png"
        label = segment(model, image, on, height)
        picture = Image.fromarray(overlay(image, label))
        shares = np.bincount(label.ravel(), minlength=len(NAMES)) / label.size
        order = [int(i) for i in np.argsort(-shares) if shares[i] > 0]
        names = legend(sorted(order), picture.width)
        sheet = Image.new("RGB", (picture.width, picture.height + names.height + 6), (255, 255, 255))
        sheet.paste(picture, (0, 0))
        sheet.paste(names, (0, picture.height + 6))
        save_image(sheet, target)
        results.append(Prediction(photo, target, model.method, {NAMES[i]: float(shares[i]) for i in order}))
    return results


@torch.inference_mode()
def segment(model: Segmentor, image: NDArray[np.uint8], device: torch.device,
            height: int | None = None) -> NDArray[np.uint8]:  # fmt: skip
    """(H, W) train ids of one RGB image (H, W, 3), by sliding window.

    `height` is the image height that the model was trained at: the photograph is brought to it first, and in any case
    to at least the model's window.
    """
    pixels = torch.from_numpy(image.copy()).to(device).permute(2, 0, 1)[None].float() / 255
    full = pixels.shape[-2:]
    crop = model.image_size
    scale = max((height or full[0]) / full[0], crop[0] / full[0], crop[1] / full[1])
    if scale != 1:
        size = [max(c, round(side * scale)) for c, side in zip(crop, full, strict=True)]
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)
    scores: Tensor = mfuser.slide(model, pixels, crop=crop, stride=window_stride(crop))
    scores = F.interpolate(scores, full, mode="bilinear", align_corners=False)
    return scores.argmax(1)[0].to(torch.uint8).cpu().numpy()


def window_stride(crop: tuple[int, int]) -> tuple[int, int]:
    """Two thirds of the window, rounded down: 341 for 512 as in Rein and MFuser."""
    return crop[0] * 2 // 3, crop[1] * 2 // 3


def _trained_height(run: Path) -> int | None:
    recipe = run / "recipe.yaml"
    size = load_recipe(str(recipe)).data.size if recipe.is_file() else None
    return size[0] if size else None
