"""Pictures of labelled images: overlay, legend, contact sheet."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dgbench import atomic
from dgbench.data.dataset import Sample
from dgbench.data.images import SUFFIXES
from dgbench.data.labels import CLASSES, IGNORE, palette
from dgbench.errors import DataError

_AT_ONCE = 1 << 22  # pixels
_GAP = 6
_ROW = 18  # height of one legend entry, pixels
_BACKGROUND, _INK = (255, 255, 255), (20, 20, 20)


def overlay(
    image: NDArray[np.uint8], label: NDArray[np.uint8], opacity: float = 0.6, *, contours: bool = False
) -> NDArray[np.uint8]:
    """(H, W, 3) RGB: the image under its label's colours; ignored pixels keep the image.

    Args:
        contours: both sides of the border between two classes are drawn in the classes' colours, whatever the opacity.
    """
    out = np.empty_like(image)
    rows = max(1, _AT_ONCE // max(1, image.shape[1]))
    for top in range(0, len(image), rows):  # in floating point a large image takes gigabytes
        part, ids = image[top : top + rows], label[top : top + rows]
        blend = (1 - opacity) * part + opacity * palette()[ids]
        blend[ids == IGNORE] = part[ids == IGNORE]
        out[top : top + rows] = blend.round()
    if contours:
        edges = _borders(label)
        out[edges] = palette()[label[edges]]
    return out


def _borders(label: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """(H, W): the pixels near another class, for every 512 rows of the image by one pixel more."""
    width = 2 * max(1, round(label.shape[0] / 512)) + 1
    around = cv2.morphologyEx(label, cv2.MORPH_GRADIENT, np.ones((width, width), np.uint8))
    return np.asarray((around != 0) & (label != IGNORE))


def color_map(label: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W, 3) RGB: the label's colours alone; ignored pixels are black."""
    return palette()[label]


def label_ids(train_ids: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W): Cityscapes' label ids of train ids; ignored pixels are 0, unlabeled."""
    table = np.zeros(256, np.uint8)
    table[: len(CLASSES)] = [c.label_id for c in CLASSES]
    return table[train_ids]


def contact_sheet(samples: Sequence[Sample], title: str, width: int = 1200) -> Image.Image:
    """Return rows of image and overlay, two samples per row, with a title above and the legend below."""
    per_row = 2 if len(samples) > 1 else 1
    cell_w = (width - _GAP * (2 * per_row + 1)) // (2 * per_row)
    height, full_w = samples[0].label.shape
    cell_h = min(max(1, round(cell_w * height / full_w)), 2 * cell_w)
    rows = -(-len(samples) // per_row)
    legend_image = legend(sorted({int(v) for s in samples for v in np.unique(s.label)} - {IGNORE}), width)
    sheet = Image.new("RGB", (width, _ROW + _GAP + rows * (cell_h + _GAP) + legend_image.height + _GAP), _BACKGROUND)
    ImageDraw.Draw(sheet).text((_GAP, 3), title, _INK, font=ImageFont.load_default(13))
    for i, sample in enumerate(samples):
        row, column = divmod(i, per_row)
        top = _ROW + _GAP + row * (cell_h + _GAP)
        for j, picture in enumerate((sample.image, overlay(sample.image, sample.label))):
            cell = Image.fromarray(picture).resize(_fitted(picture.shape, cell_w, cell_h), Image.Resampling.LANCZOS)
            left = _GAP + (2 * column + j) * (cell_w + _GAP)
            sheet.paste(cell, (left + (cell_w - cell.width) // 2, top + (cell_h - cell.height) // 2))
    sheet.paste(legend_image, (0, sheet.height - legend_image.height))
    return sheet


def _fitted(shape: tuple[int, ...], width: int, height: int) -> tuple[int, int]:
    """Return (W, H) of an image of `shape` (H, W, ...) in a cell of `width` x `height`, with its aspect ratio if possible."""
    scaled = max(1, round(width * shape[0] / shape[1]))
    return (width, scaled) if scaled <= height else (max(1, round(height * shape[1] / shape[0])), height)


def legend(train_ids: Sequence[int], width: int, font_size: int = 12) -> Image.Image:
    """Colour and name of each class, in as many columns as fit; everything grows with the font."""
    font = ImageFont.load_default(font_size)
    gap, row_h, box, inset = (round(length * font_size / 12) for length in (_GAP, _ROW, 16, 2))
    entry_w = box + gap + max(int(font.getlength(c.name)) for c in CLASSES) + 2 * gap
    columns = max(1, (width - gap) // entry_w)
    rows = -(-len(train_ids) // columns)
    image = Image.new("RGB", (width, rows * row_h + gap), _BACKGROUND)
    draw = ImageDraw.Draw(image)
    for i, train_id in enumerate(train_ids):
        row, column = divmod(i, columns)
        x, y = gap + column * entry_w, row * row_h
        draw.rectangle((x, y + inset, x + box, y + box - inset), CLASSES[train_id].color)
        draw.text((x + box + gap, y), CLASSES[train_id].name, _INK, font=font)
    return image


def check_ending(path: Path) -> None:
    """Refuse a picture's file whose ending is not that of a picture: it would be written as PNG whatever it is called.

    Raises: DataError naming the endings that are allowed.
    """
    if path.suffix and path.suffix.lower() not in SUFFIXES:
        hint = "choose one of them, or an existing folder, where several pictures are made"
        raise DataError(f"{path} is to be a picture and must end in {', '.join(SUFFIXES)}", hint)


def save_image(image: Image.Image, path: Path) -> None:
    """Write a picture atomically; the suffix gives the format, PNG if there is none.

    Raises: DataError for the ending of something else.
    """
    check_ending(path)
    buffer = io.BytesIO()
    image.save(buffer, Image.registered_extensions().get(path.suffix.lower(), "PNG"))
    atomic.write(path, buffer.getvalue())
