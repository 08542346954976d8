"""The value of a pixel of a label file, for every kind of image file.

Label files with lossy compression are refused.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from dgbench.data import palettes
from dgbench.data.labels import LabelMap
from dgbench.errors import DataError

Stored = NDArray[np.uint8] | NDArray[np.uint16]

VERSION = 2  # raised when files are read as other labels than before: stored class counts are then made again
FORMATS = ("PNG", "BMP", "GIF", "TIFF", "WEBP")  # that can keep values without loss
_TIFF_LOSSY = ("jpeg", "tiff_jpeg", "webp", "jpeg2000", "lerc")
_BITS_PER_SAMPLE = 258  # a tag of TIFF

GREY, COLOR, COLOR_ALPHA = 0, 2, 6  # colour types of the PNG specification, chapter 11
KINDS = {0: "grey", 2: "colour", 3: "palette", 4: "grey + alpha", 6: "colour + alpha"}


def values(content: bytes, path: Path, label_map: LabelMap) -> Stored:
    """Return (H, W) values of a file that stores a number for each pixel.

    8-bit and 16-bit grey as they are; a palette by its index, or by its grey values where those are the labels
    (`palettes`); colour whose channels are equal, as programs save grey. Narrower grey, which means multiples of 255 but is
    sometimes written as numbers, only if one of both fits the label map. Alpha must be the same everywhere.

    Raises: DataError naming the file if its values are ambiguous.
    """
    with opened(content, path) as file:
        bits = _bits(content, file)
        if bits == 16 and file.mode in ("LA", "RGB", "RGBA"):  # of which Pillow keeps the high bytes
            raise _no_label_map(path, f"16-bit {file.mode}")
        if file.mode in ("1", "L"):
            _refuse_see_through(file, path)
            grey = np.asarray(file) if file.mode == "L" else np.asarray(file).astype(np.uint8) * np.uint8(255)
            return grey if bits == 8 else _narrow(grey, bits, path, label_map)
        if file.mode in ("P", "PA"):
            return _of_palette(file, path, label_map)
        if file.mode in ("I;16", "I;16B", "I;16L", "I"):
            wide = np.asarray(file)
            if wide.min() >= 0 and wide.max() < 65535:
                return wide.astype(np.uint16)
        if file.mode in ("LA", "RGB", "RGBA"):
            _refuse_see_through(file, path)
            channels = np.asarray(file)
            first = channels[..., 0]
            if file.mode == "LA":
                return np.ascontiguousarray(first)
            # renderings also show "unlabeled" as black
            if first.any() and (first == channels[..., 1]).all() and (first == channels[..., 2]).all():
                return np.ascontiguousarray(first)
        raise _no_label_map(path, file.mode)


def colors(content: bytes, path: Path) -> NDArray[np.uint32]:
    """Return (H, W) values R + 256 G + 65536 B of a file that stores a colour for each pixel, in any kind of PNG.

    Raises: DataError naming the file if it holds anything else than 8-bit colours.
    """
    with opened(content, path) as file:
        if file.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA") or _bits(content, file) == 16:
            depth = "16-bit " if _bits(content, file) == 16 else ""
            raise DataError(
                f"{path} is a {depth}{file.mode} image, 8-bit colours were expected", "unpack the official label archive again"
            )
        pixels = np.asarray(file.convert("RGBA")).view(np.dtype("<u4"))[..., 0]
        return pixels & np.uint32(0xFFFFFF)


def color_of(code: int) -> tuple[int, int, int]:
    """Return R, G, B of one of `colors`."""
    return code & 255, code >> 8 & 255, code >> 16


@contextmanager
def opened(content: bytes, path: Path) -> Iterator[Image.Image]:
    """Open a label file.

    Raises: DataError naming the file if it has lossy compression; Pillow's error if it is none of `FORMATS`.
    """
    if content[:3] == b"\xff\xd8\xff":
        raise _lossy(path, "a JPEG")
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP" and not _lossless_webp(content):
        raise _lossy(path, "a lossy WebP")
    try:
        file = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise UnidentifiedImageError("it is no PNG, BMP, GIF, TIFF or WebP file") from None
    with file:
        if file.format == "TIFF" and file.info.get("compression") in _TIFF_LOSSY:
            raise _lossy(path, f"a TIFF compressed by {file.info['compression'].removeprefix('tiff_')}")
        yield file


def used(indices: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the values that occur in an 8-bit image, in ascending order."""
    import cv2  # NumPy takes ten times as long

    counts = cv2.calcHist([np.ascontiguousarray(indices)], [0], None, [256], [0, 256])
    return np.flatnonzero(counts)


def png_header(content: bytes) -> tuple[int, int]:
    """Return bits per sample and colour type of a PNG, (0, -1) for anything else."""
    if content[:8] != b"\x89PNG\r\n\x1a\n" or len(content) < 26:
        return 0, -1
    depth, kind = struct.unpack(">BB", content[24:26])
    return depth, kind


def _no_label_map(path: Path, what: str) -> DataError:
    return DataError(
        f"{path} is a {what} image, not an 8-bit label map",
        "this looks like a colour rendering of the labels: the file with ids is needed",
    )


def _lossy(path: Path, what: str) -> DataError:
    return DataError(
        f"{path} is {what}, which changes values where labels meet",
        "labels need a file without loss, PNG for example: take those that this file was made of",
    )


def _lossless_webp(content: bytes) -> bool:
    """Return whether the pixels of a WebP are in the lossless chunk; the extended form has chunks before it, animations none."""
    place = 12
    while place + 8 <= len(content):
        kind, size = content[place : place + 4], int.from_bytes(content[place + 4 : place + 8], "little")
        if kind in (b"VP8L", b"VP8 ", b"ANMF"):
            return kind == b"VP8L"
        place += 8 + size + size % 2
    return True  # Pillow says what is wrong with it


def _bits(content: bytes, file: Image.Image) -> int:
    """Return the bits per sample that Pillow's mode does not tell; 8 for a palette."""
    depth, kind = png_header(content)
    if depth:
        return 8 if kind == 3 else depth
    tags: Any = getattr(file, "tag_v2", {})
    if file.mode in ("P", "PA"):
        return 8
    usual = (1 if file.mode == "1" else 8,)
    return int(min(tags.get(_BITS_PER_SAMPLE, usual)))


def _narrow(scaled: NDArray[np.uint8], bits: int, path: Path, label_map: LabelMap) -> Stored:
    """Return the values of samples of 1, 2 or 4 bits, which are fractions of white; `scaled` holds them as 8-bit grey."""
    numbers = scaled // np.uint8(255 // (2**bits - 1))
    if np.array_equal(numbers, scaled) or label_map.strangers(used(numbers).tolist()):
        return scaled
    raise DataError(
        f"{path} is a {bits}-bit grey image, whose values every reader scales up to 255: it is ambiguous whether "
        f"{used(numbers)[-1]} or {used(scaled)[-1]} was meant",
        "save it as 8-bit grey, or unpack the official label archive again",
    )


def _of_palette(file: Image.Image, path: Path, label_map: LabelMap) -> Stored:
    indices = np.ascontiguousarray(np.asarray(file) if file.mode == "P" else np.asarray(file)[..., 0])
    stored = np.full((256, 3), -1, np.int16)
    entries = np.asarray(file.getpalette("RGB") or [], np.int16).reshape(-1, 3)
    stored[: len(entries)] = entries
    table = palettes.values_of(used(indices), stored, label_map, path)
    if table is None:
        return indices
    _refuse_see_through(file, path)
    import cv2

    return np.asarray(cv2.LUT(indices, table), np.uint8)


def _refuse_see_through(file: Image.Image, path: Path) -> None:
    """Refuse transparent pixels, whose values are arbitrary."""
    if not file.has_transparency_data:
        return
    alpha = np.asarray(file.convert("RGBA"))[..., 3]
    if alpha.min() != alpha.max() or not alpha.max():
        raise DataError(
            f"{path} has transparent pixels, whose values have no meaning",
            "save the labels without alpha, with the value for ignored pixels there",
        )
