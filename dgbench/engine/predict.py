"""Segment photographs with a trained model and draw the result over them."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
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
from dgbench.data.dataset import read_photo
from dgbench.data.images import SUFFIXES
from dgbench.data.labels import NAMES
from dgbench.data.sheet import legend, overlay, save_image
from dgbench.engine import checkpoints
from dgbench.engine.device import pick_device
from dgbench.engine.scoring import LARGE, first_of, first_of_bands
from dgbench.errors import DataError
from dgbench.recipe import load_recipe
from mfuser.segmentor import Segmentor

_OVERLAY = "-overlay"


@dataclass(frozen=True, slots=True)
class Prediction:
    """What was found in one photograph."""

    photo: Path
    overlay: Path
    method: str
    shares: dict[str, float]  # class name -> share of the pixels, largest first


def predict(photos: Sequence[Path], run: Path, out: Path, *, device: str | None = None) -> list[Prediction]:
    """Write an overlay with a legend for each photograph, as a viewer shows it: turned as its EXIF says.

    Args:
        photos: image files of any size, or folders of them.
        run: a run folder or a saved model.
        out: the overlay's file for one photograph, or a folder. Photographs of one name are told apart by their folders.

    Raises: DataError naming every file that cannot be read, before anything is written; CheckpointError.
    """
    given = len(photos)
    photos = _listed(photos)
    to_folder = out.is_dir() or not out.suffix
    if not to_folder and (len(photos) > 1 or given > 1):
        raise DataError(f"{len(photos)} photographs cannot all be written to {out}", "give a folder with --out")
    targets = _targets(photos, out) if to_folder else [out]
    if over := next((target for target in targets if _place(target) in {_place(photo) for photo in photos}), None):
        raise DataError(f"{over} is one of the photographs: its overlay would replace it", "give another --out")
    _refuse_unreadable(photos)  # all of them first: a bad file costs no model time
    on = pick_device(device)
    model = checkpoints.load_model(run).to(on)
    model.merge()
    height = _trained_height(run)
    results = []
    for photo, target in zip(photos, targets, strict=True):
        image = read_photo(photo)
        label = segment(model, image, on, height)
        picture = Image.fromarray(overlay(image, label))
        shares = _counted(label) / label.size
        order = [int(i) for i in np.argsort(-shares) if shares[i] > 0]
        names = legend(sorted(order), picture.width)
        sheet = Image.new("RGB", (picture.width, picture.height + names.height + 6), (255, 255, 255))
        sheet.paste(picture, (0, 0))
        sheet.paste(names, (0, picture.height + 6))
        save_image(sheet, target)
        results.append(Prediction(photo, target, model.method, {NAMES[i]: float(shares[i]) for i in order}))
    return results


def _counted(label: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Pixels of each class; NumPy makes numbers of eight bytes of what it counts, so a large label goes in parts."""
    flat, part = label.ravel(), 1 << 24
    parts = [np.bincount(flat[i : i + part], minlength=len(NAMES)) for i in range(0, label.size, part)]
    return np.asarray(np.sum(parts, axis=0), np.int64)


def _listed(given: Sequence[Path]) -> list[Path]:
    """The files, with the images of folders in their place, each once."""
    found: dict[Path, Path] = {}
    for path in given:
        files = [path]
        if path.is_dir():
            files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and not p.is_dir() and p.name[0] != ".")
            photographs = {p.stem for p in files}
            # overlays that were written beside their photographs
            files = [p for p in files if not (p.stem.endswith(_OVERLAY) and p.stem.removesuffix(_OVERLAY) in photographs)]
            if not files:
                raise DataError(f"no image in {path}", f"images end in {', '.join(SUFFIXES)}")
        for file in files:
            found.setdefault(_place(file), file)
    return list(found.values())


def _place(path: Path) -> Path:
    return path.resolve()


def _targets(photos: Sequence[Path], folder: Path) -> list[Path]:
    """An overlay's file for each photograph: named after it; where that is not enough, after its folders and suffix, too."""
    stems = Counter(photo.stem.casefold() for photo in photos)
    names = [photo.stem if stems[photo.stem.casefold()] == 1 else _long_name(photo, photos) for photo in photos]
    if len({name.casefold() for name in names}) < len(names):
        names = [f"{n:0{len(str(len(photos)))}d}-{photo.stem}" for n, photo in enumerate(photos, 1)]
    return [folder / f"{name}{_OVERLAY}.png" for name in names]


def _long_name(photo: Path, photos: Sequence[Path]) -> str:
    alike = [_place(p) for p in photos if p.stem.casefold() == photo.stem.casefold()]
    parts = _place(photo).relative_to(os.path.commonpath([p.parent for p in alike])).parts
    same_folder = sum(p.parent == _place(photo).parent for p in alike) > 1
    return "-".join([*parts[:-1], photo.name.replace(".", "-") if same_folder else photo.stem])


def _refuse_unreadable(photos: Sequence[Path]) -> None:
    problems = []
    for photo in photos:
        try:
            read_photo(photo)
        except DataError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        listed = "".join(f"\n  {error.message}" for error in problems)
        raise DataError(f"{len(problems)} of {len(photos)} photographs cannot be read:{listed}", "leave them out, or repair them")


@torch.inference_mode()
def segment(model: Segmentor, image: NDArray[np.uint8], device: torch.device, height: int | None = None) -> NDArray[np.uint8]:
    """(H, W) train ids of one RGB image (H, W, 3), by sliding window.

    `height` is the image height that the model was trained at: the photograph is brought to it first, and in any case
    to at least the model's window.
    """
    crop = model.image_size
    full = (image.shape[0], image.shape[1])
    scale = max((height or full[0]) / full[0], crop[0] / full[0], crop[1] / full[1])
    size = (max(crop[0], round(full[0] * scale)), max(crop[1], round(full[1] * scale)))
    if max(_area(full), _area(size)) > LARGE:
        return _segment_large(model, image, device, size).cpu().numpy()
    pixels = torch.from_numpy(image.copy()).to(device).permute(2, 0, 1)[None].float() / 255
    if scale != 1:
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)
    scores: Tensor = mfuser.slide(model, pixels, crop=crop, stride=window_stride(crop))
    scores = F.interpolate(scores, full, mode="bilinear", align_corners=False)
    return scores.argmax(1)[0].to(torch.uint8).cpu().numpy()


def _segment_large(model: Segmentor, image: NDArray[np.uint8], device: torch.device, size: tuple[int, int]) -> Tensor:
    """As `segment`, in parts: the same windows, for which a score may differ in its last bit."""
    full = (image.shape[0], image.shape[1])
    pixels = torch.from_numpy(image if image.flags.writeable else image.copy()).permute(2, 0, 1)[None]
    if size == full:
        return first_of_bands(model, pixels, model.image_size, window_stride(model.image_size), device)
    if _area(size) > max(LARGE, _area(full)):  # a stripe, brought to the window
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
    """Two thirds of the window, rounded down: 341 for 512 as in Rein and MFuser."""
    return crop[0] * 2 // 3, crop[1] * 2 // 3


def _trained_height(run: Path) -> int | None:
    recipe = run / "recipe.yaml"
    size = load_recipe(str(recipe)).data.size if recipe.is_file() else None
    return size[0] if size else None
