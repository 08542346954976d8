"""Segment photographs with a trained model and draw the result over them."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import mfuser
from dgbench.data.dataset import read_photo
from dgbench.data.labels import NAMES
from dgbench.data.sheet import check_ending, legend, overlay, save_image
from dgbench.engine import checkpoints, modes
from dgbench.engine.beside import Beside
from dgbench.engine.device import pick_device
from dgbench.engine.modes import Ready
from dgbench.engine.photos import file_names, listed, refuse_replaced, refuse_unreadable
from dgbench.engine.scoring import LARGE, first_of, first_of_bands
from dgbench.errors import DataError
from dgbench.progress import Progress, Silent
from dgbench.recipe import Recipe, load_recipe


@dataclass(frozen=True, slots=True)
class Prediction:
    """Classes found in one photograph."""

    photo: Path
    overlay: Path
    method: str
    shares: dict[str, float]  # class name -> share of the pixels, largest first


def predict(
    photos: Sequence[Path],
    run: Path,
    out: Path,
    *,
    device: str | None = None,
    opacity: float = 0.6,
    contours: bool = False,
    mode_name: str | None = None,
    compiles: bool | None = None,
    progress: Progress | None = None,
) -> list[Prediction]:
    """Write an overlay with a legend for each photograph, as a viewer shows it: turned as its EXIF says.

    Args:
        photos: image files of any size, or folders of them.
        run: a run folder or a saved model.
        out: the overlay's file for one photograph, or a folder. Photographs of one name are told apart by their folders.
        opacity: of the classes' colours, 0..1.    contours: borders between classes are drawn, too.
        mode_name: `exact` or `fast`; default: the recipe's, and `exact` without one.    compiles: whether `fast` does.

    Raises: DataError naming every file that cannot be read, before anything is written; CheckpointError.
    """
    files = listed(photos)
    to_folder = out.is_dir() or not out.suffix
    if not to_folder and (len(files) > 1 or len(photos) > 1):
        raise DataError(f"{len(files)} photographs cannot all be written to {out}", "give a folder with --out")
    if not to_folder:
        check_ending(out)
    targets = [out / f"{name}-overlay.png" for name in file_names(files)] if to_folder else [out]
    refuse_replaced(files, targets, "overlay")
    refuse_unreadable(files)  # all of them first: a bad file costs no model time
    on = pick_device(device)
    loaded = checkpoints.load_model(run)
    checkpoints.in_fp32(loaded)
    loaded.to(on)
    recipe = _recipe(run)
    how = modes.mode(mode_name or (recipe.eval.mode if recipe else modes.EXACT), compiles=compiles)
    told = progress or Silent()
    model, compiling = modes.ready(loaded, how, told), modes.Compiling(how)
    height = recipe.data.size[0] if recipe and recipe.data.size else None
    progress = progress if progress and len(files) > 1 else Silent()
    progress.start("segmenting", len(files), "images")

    def drawn(file: Path, target: Path, image: NDArray[np.uint8], label: NDArray[np.uint8]) -> Prediction:
        save_image(with_legend(overlay(image, label, opacity, contours=contours), label), target)
        return Prediction(file, target, model.method, shares(label))

    try:
        with ThreadPoolExecutor(1) as reader, Beside[Prediction](progress.advance) as writing:
            following = reader.submit(read_photo, files[0])
            for i, (file, target) in enumerate(zip(files, targets, strict=True)):
                image = following.result()
                if i + 1 < len(files):
                    following = reader.submit(read_photo, files[i + 1])
                writing.put(partial(drawn, file, target, image, segment(model, image, on, height)))
            results = writing.results()
    finally:
        progress.stop()
    compiling.tell(told)
    return results


def with_legend(picture: NDArray[np.uint8], label: NDArray[np.uint8]) -> Image.Image:
    """Return a picture with the legend of its label's classes below."""
    names = legend(np.flatnonzero(_counted(label)).tolist(), picture.shape[1])
    sheet = Image.new("RGB", (picture.shape[1], picture.shape[0] + names.height + 6), (255, 255, 255))
    sheet.paste(Image.fromarray(picture), (0, 0))
    sheet.paste(names, (0, picture.shape[0] + 6))
    return sheet


def shares(label: NDArray[np.uint8]) -> dict[str, float]:
    """Each class's share of the pixels, largest first, by name; classes that are not there are left out."""
    found = _counted(label) / label.size
    return {NAMES[i]: float(found[i]) for i in np.argsort(-found) if found[i] > 0}


def _counted(label: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Count the pixels of each class, in parts, since NumPy converts labels to eight bytes per pixel for it."""
    flat, part = label.ravel(), 1 << 24
    parts = [np.bincount(flat[i : i + part], minlength=len(NAMES)) for i in range(0, label.size, part)]
    return np.asarray(np.sum(parts, axis=0), np.int64)


@torch.inference_mode()
def segment(model: Ready, image: NDArray[np.uint8], device: torch.device, height: int | None = None) -> NDArray[np.uint8]:
    """Return (H, W) train ids of one RGB image (H, W, 3), by sliding window.

    `height` is the image height that the model was trained at: the photograph is resized to it first, and in any case
    to at least the model's window.
    """
    crop = model.image_size
    full = (image.shape[0], image.shape[1])
    scale = max((height or full[0]) / full[0], crop[0] / full[0], crop[1] / full[1])
    size = (max(crop[0], round(full[0] * scale)), max(crop[1], round(full[1] * scale)))
    with modes.without_tf32(model):
        if max(_area(full), _area(size)) > LARGE:
            return _segment_large(model, image, device, size).cpu().numpy()
        pixels = torch.from_numpy(image.copy()).to(device).permute(2, 0, 1)[None].float() / 255
        if scale != 1:
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)
        scores: Tensor = mfuser.slide(model, pixels, crop=crop, stride=window_stride(crop))
        scores = F.interpolate(scores, full, mode="bilinear", align_corners=False)
        return scores.argmax(1)[0].to(torch.uint8).cpu().numpy()


def _segment_large(model: Ready, image: NDArray[np.uint8], device: torch.device, size: tuple[int, int]) -> Tensor:
    """Segment as `segment`, in parts: the same windows, for which a score may differ in its last bit."""
    full = (image.shape[0], image.shape[1])
    pixels = torch.from_numpy(image if image.flags.writeable else image.copy()).permute(2, 0, 1)[None]
    if size == full:
        return first_of_bands(model, pixels, model.image_size, window_stride(model.image_size), device)
    if _area(size) > max(LARGE, _area(full)):  # a long narrow image, resized to the window
        shrink = math.sqrt(LARGE / _area(size))
        smaller = (max(1, round(size[0] * shrink)), max(1, round(size[1] * shrink)))
        _warn(
            f"a photograph of {full[0]}x{full[1]} (H x W) is shown to the model at {smaller[0]}x{smaller[1]} and filled up with "
            f"black: {size[0]}x{size[1]}, which its window asks for, takes too much memory; cut it into parts for a better result"
        )
        size = smaller
    # channel by channel: as floating point a large image takes gigabytes
    planes = [
        F.interpolate(_plane(pixels[:, i : i + 1], device), size, mode="bilinear", antialias=True, align_corners=False)
        for i in range(3)
    ]
    scores = mfuser.slide(model, torch.cat(planes, 1), crop=model.image_size, stride=window_stride(model.image_size))
    return first_of([scores], full)


def _plane(channel: Tensor, device: torch.device) -> Tensor:
    return channel.to(device).float().div_(255)


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def _warn(text: str) -> None:
    logging.getLogger(__name__).warning(text)


def window_stride(crop: tuple[int, int]) -> tuple[int, int]:
    """Return two thirds of the window, rounded down: 341 for 512 as in Rein and MFuser."""
    return crop[0] * 2 // 3, crop[1] * 2 // 3


def _recipe(run: Path) -> Recipe | None:
    path = run / "recipe.yaml"
    return load_recipe(str(path)) if path.is_file() else None
