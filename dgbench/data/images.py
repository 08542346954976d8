"""Decoding of image files on the fast path; the same pixels as Pillow's.

OpenCV takes about four fifths of Pillow's time for a PNG or a JPEG of 1914x1052 (torchvision takes the same, and has
deprecated its decoders). But Pillow can stop early: rows of a PNG that lie below the wanted part need not be decoded.
benchmarks/loader.md has the times.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from io import BytesIO

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

# of a PNG's rows: up to here, Pillow's part of the work is less than OpenCV's whole
_WORTH = 0.8


@dataclass(frozen=True, slots=True)
class Part:
    """Rows `top` up to `bottom`, columns `left` up to `right` of an image."""

    top: int
    left: int
    bottom: int
    right: int

    def of(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """This part of an image (H, W, 3) or label (H, W): a view."""
        return pixels[self.top : self.bottom, self.left : self.right]


def decode(data: bytes, part: Part | None = None) -> NDArray[np.uint8]:
    """Return the pixels of an image file or of a part of it, (H, W, 3) RGB.

    PNG and JPEG with 8-bit grey or RGB take the fast path, everything else Pillow's. Nothing is rotated by EXIF.

    Raises: what Pillow raises for a file that is damaged or no image.
    """
    with Image.open(BytesIO(data)) as file:
        # Pillow calls 16-bit RGB `RGB`, too, and keeps the high bytes
        plain = file.mode in ("RGB", "L") and (file.format == "JPEG" or (file.format == "PNG" and data[24] == 8))
        if plain and part is not None and part.bottom < _WORTH * file.height and (top := _first_rows(data, part.bottom)):
            return _pillow(Image.open(BytesIO(top)), part)
        if plain:
            whole = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
            if whole is not None:
                pixels: NDArray[np.uint8] = np.asarray(whole)
                return pixels if part is None else part.of(pixels)
            # Pillow says what is wrong in words that a user knows
        return _pillow(file, part)


def _pillow(file: Image.Image, part: Part | None) -> NDArray[np.uint8]:
    if part is not None:  # only the part is copied out of Pillow
        return np.asarray(file.crop((part.left, part.top, part.right, part.bottom)).convert("RGB"))
    return np.asarray(file.convert("RGB"))


def _first_rows(data: bytes, rows: int) -> bytes | None:
    """A PNG file of the first rows of another: its header with another height. None for what stores rows in another order.

    Rows follow each other in one compressed stream, each filtered by those above (PNG specification, 4.6), so a decoder
    that asks for fewer of them stops there.
    """
    if data[12:16] != b"IHDR" or data[28] != 0:  # no PNG, or interlaced
        return None
    header = data[12:20] + struct.pack(">I", max(1, rows)) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
