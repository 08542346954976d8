"""Decoding of image files on the fast path; the same pixels as Pillow's.

OpenCV takes about four fifths of Pillow's time for a PNG or a JPEG of 1914x1052 (torchvision takes the same, and has
deprecated its decoders). But Pillow can stop early: rows of a PNG that lie below the wanted part need not be decoded.
benchmarks/loader.md has the times. libjpeg's warnings about damaged data, which OpenCV prints, are suppressed; `verify`
reports them.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from io import BytesIO
from typing import BinaryIO

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from dgbench.data import files, native_stderr

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff")

# fraction of a PNG's rows up to which decoding them with Pillow is faster than decoding all with OpenCV
_WORTH = 0.8


@dataclass(frozen=True, slots=True)
class Part:
    """Rows `top` up to `bottom`, columns `left` up to `right` of an image."""

    top: int
    left: int
    bottom: int
    right: int

    def of(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return this part of an image (H, W, 3) or label (H, W), as a view."""
        return pixels[self.top : self.bottom, self.left : self.right]


def decode(data: bytes, part: Part | None = None) -> NDArray[np.uint8]:
    """Return the pixels of an image file or of a part of it, (H, W, 3) RGB.

    PNG and JPEG with 8-bit grey or RGB take the fast path, everything else Pillow's. Of 16-bit grey, 65535 becomes 255; of
    16-bit colours and of grey with alpha, Pillow keeps the high bytes, which differ from that by one level at most. Alpha is
    dropped. The EXIF orientation is not applied (but Pillow does so with a TIFF).

    Raises: UnsuitableError for values without a standard conversion to 8 bits; Pillow's errors for damaged files.
    """
    with opened(data) as file:
        # Pillow calls 16-bit RGB `RGB`, too, and keeps the high bytes
        plain = file.mode in ("RGB", "L") and (file.format == "JPEG" or (file.format == "PNG" and data[24] == 8))
        if plain and part is not None and part.bottom < _WORTH * file.height and (top := _first_rows(data, part.bottom)):
            return _pillow(Image.open(BytesIO(top), formats=("PNG",)), part)
        if plain:
            whole = None
            # OpenCV refuses sides of more than a million pixels
            with native_stderr.captured() if file.format == "JPEG" else nullcontext(), suppress(cv2.error):
                whole = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
            if whole is not None:
                pixels: NDArray[np.uint8] = np.asarray(whole)
                return pixels if part is None else part.of(pixels)
            # Pillow's error message is clearer
        return _pillow(file, part)


def opened(source: bytes | BinaryIO) -> Image.Image:
    """Open an image file.

    Raises: UnidentifiedImageError if it is none of `FORMATS`.
    """
    try:
        return Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    except UnidentifiedImageError:
        raise UnidentifiedImageError("it is no PNG, JPEG, WebP, BMP or TIFF file") from None


def orientation(data: bytes) -> int:
    """Return the EXIF orientation of an image, 1 (upright) to 8; 1 if the file has none or is no image."""
    if data[:8] == _PNG and not _may_be_turned(data):
        return 1
    try:
        with opened(data) as file:
            # Pillow decodes a whole PNG to find a chunk after the pixels
            exif = Image.Image.getexif(file)
            if data[:8] == _PNG and (chunk := _png_chunk(data, b"eXIf")):
                exif.load(b"Exif\0\0" + chunk)
            flag = exif.get(ExifTags.Base.Orientation, 1)
    except files.DAMAGED:
        return 1
    return flag if flag in range(1, 9) else 1


def upright(data: bytes) -> NDArray[np.uint8]:
    """Return the pixels of an image file as a viewer shows them, (H, W, 3) RGB: with its EXIF orientation applied.

    Raises: as `decode`.
    """
    pixels = decode(data)
    turn = _TURNS.get(orientation(data))
    if turn is None or data[:4] in _TIFF:  # which Pillow has turned already
        return pixels
    return np.asarray(Image.fromarray(pixels).transpose(turn))


def decoder_warning(data: bytes) -> str:
    """Return libjpeg's warning about a JPEG, "" if there is none. Not for several threads at once."""
    with native_stderr.captured() as told:
        cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_REDUCED_GRAYSCALE_8)  # all data, an eighth of the pixels
        return told.text().strip().partition("\n")[0]


class UnsuitableError(Exception):
    """An image whose values have no standard conversion to 8 bits."""


_PNG = b"\x89PNG\r\n\x1a\n"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _pillow(file: Image.Image, part: Part | None) -> NDArray[np.uint8]:
    if file.mode in ("I", "F"):
        raise UnsuitableError(f"holds 32-bit grey values (mode {file.mode}), which have no agreed way to 8 bits")
    if part is not None:  # only the part is copied out of Pillow
        file = file.crop((part.left, part.top, part.right, part.bottom))
    if file.mode.startswith("I;16"):  # convert() would clip
        grey = ((np.asarray(file).astype(np.uint32) + 128) // 257).astype(np.uint8)
        return grey[..., None].repeat(3, -1)
    return np.asarray(file.convert("RGB"))


def _may_be_turned(data: bytes) -> bool:
    """Return whether a PNG has a chunk that can hold an orientation: eXIf, or XMP and ImageMagick's profiles in text chunks."""
    return any(kind == b"eXIf" or kind in _TEXTS for kind, _ in _png_chunks(data))


_TEXTS = (b"tEXt", b"zTXt", b"iTXt")


def _png_chunk(data: bytes, wanted: bytes) -> bytes:
    return next((body for kind, body in _png_chunks(data, wanted) if kind == wanted), b"")


def _png_chunks(data: bytes, wanted: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
    """Yield the kind of each chunk, with the content of those that are `wanted`."""
    place = 8
    while place + 8 <= len(data):
        size, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        yield kind, data[place + 8 : place + 8 + size] if kind == wanted else b""
        place += 12 + size


def _first_rows(data: bytes, rows: int) -> bytes | None:
    """Return a PNG of an image's first rows: its header with another height. None for interlaced files.

    Rows follow each other in one compressed stream, each filtered by those above (PNG specification, 4.6), so a decoder
    that asks for fewer of them stops there.
    """
    if data[12:16] != b"IHDR" or data[28] != 0:  # no PNG, or interlaced
        return None
    header = data[12:20] + struct.pack(">I", max(1, rows)) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
