"""Pictures of one image in several ways: side by side, or a row for each image with a title above each column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dgbench.data.sheet import legend
from dgbench.render.outside import visible

_BACKGROUND, _INK = (255, 255, 255), (20, 20, 20)
_SMALLEST = 11  # font size, pixels
_OF_WIDTH = 55  # the width of the picture in font sizes: 9 pt across a text of 17 cm


@dataclass(frozen=True, slots=True)
class Row:
    """One image in several ways."""

    title: str  # written upwards on the left, "" for none
    cells: tuple[NDArray[np.uint8], ...]  # RGB (H, W, 3), one for each column, all of one size


def panels(rows: Sequence[Row], titles: Sequence[str], train_ids: Sequence[int], cell_width: int) -> Image.Image:
    """Draw rows of pictures under the columns' titles, with the classes' legend below.

    Args:
        cell_width: of every column, pixels; a row is as high as its image then is.
    """
    columns = len(titles)
    font_size = max(_SMALLEST, columns * cell_width // _OF_WIDTH)
    gap, line = max(3, font_size // 3), round(1.6 * font_size)
    left = line if any(row.title for row in rows) else 0
    width = left + columns * cell_width + (columns - 1) * gap
    heights = [max(1, round(cell_width * row.cells[0].shape[0] / row.cells[0].shape[1])) for row in rows]
    names = legend(train_ids, width, font_size)
    sheet = Image.new("RGB", (width, line + sum(heights) + len(rows) * gap + names.height), _BACKGROUND)
    for column, title in enumerate(titles):
        sheet.paste(_text(title, cell_width, line, font_size), (left + column * (cell_width + gap), 0))
    top = line
    for row, height in zip(rows, heights, strict=True):
        if row.title:
            sheet.paste(_text(row.title, height, line, font_size).rotate(90, expand=True), (0, top))
        for column, cell in enumerate(row.cells):
            picture = Image.fromarray(cell).resize((cell_width, height), Image.Resampling.LANCZOS)
            sheet.paste(picture, (left + column * (cell_width + gap), top))
        top += height + gap
    sheet.paste(names, (0, top))
    return sheet


def _text(text: str, width: int, height: int, font_size: int) -> Image.Image:
    """A line of text in the middle of a field, smaller or cut short where it would not fit."""
    text = visible(text)
    font = ImageFont.load_default(font_size)
    while font.getlength(text) > width and font_size > _SMALLEST:
        font_size -= 1
        font = ImageFont.load_default(font_size)
    shown = text
    while font.getlength(shown) > width and len(text) > 1:
        text = text[:-1]
        shown = f"{text}..."
    field = Image.new("RGB", (width, height), _BACKGROUND)
    ImageDraw.Draw(field).text((width / 2, height / 2), shown, _INK, font=font, anchor="mm")
    return field
