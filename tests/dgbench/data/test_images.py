"""Decoding: Pillow's pixels, whole and in part, whatever the file holds."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from dgbench.data.dataset import read_image, read_photo, size_of
from dgbench.data.images import Part, decode, decoder_warning, orientation
from dgbench.errors import DataError

SIZE = (48, 80)


def scene(height: int = SIZE[0], width: int = SIZE[1]) -> NDArray[np.uint8]:
    """Smooth parts, edges and noise, so that a PNG uses all its filters."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    image = np.stack([2 * x, 3 * y, x + y], 2).astype(np.uint8)
    image[height // 3 : height // 2] = rng.integers(0, 256, (height // 2 - height // 3, width, 3))
    image[height // 2 :, : width // 2] = (200, 30, 90)
    return image


def encoded(picture: Image.Image, kind: str, **settings: object) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, kind, **settings)
    return buffer.getvalue()


def pillow(data: bytes) -> NDArray[np.uint8]:
    with Image.open(BytesIO(data)) as file:
        return np.asarray(file.convert("RGB"))


def interlaced(image: NDArray[np.uint8]) -> bytes:
    """A PNG whose rows are stored in the seven passes of Adam7, unfiltered; no library here writes one."""
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    parts = [image[top::down, left::right] for top, left, down, right in passes]
    raw = b"".join(b"\0" + row.tobytes() for part in parts for row in part)
    height, width = image.shape[:2]
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1)), (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    made = [struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)


RGB = Image.fromarray(scene())
PNGS = {
    "rgb": encoded(RGB, "PNG"),
    "rgb, fast": encoded(RGB, "PNG", compress_level=1),
    "grey": encoded(RGB.convert("L"), "PNG"),
    "palette": encoded(RGB.convert("P"), "PNG"),
    "4-bit palette": encoded(RGB.quantize(13), "PNG", bits=4),
    "with alpha": encoded(RGB.convert("RGBA"), "PNG"),
    "interlaced": interlaced(scene()),
}
# what OpenCV writes and Pillow does not
SIXTEEN = np.random.default_rng(1).integers(0, 2**16, (*SIZE, 3), dtype=np.uint16)


@pytest.mark.parametrize("kind", PNGS)
def test_a_png_has_pillows_pixels_bit_for_bit(kind: str) -> None:
    assert np.array_equal(decode(PNGS[kind]), pillow(PNGS[kind]))


def test_sixteen_bit_colours_are_left_to_pillow() -> None:
    import cv2

    data = cv2.imencode(".png", SIXTEEN[..., ::-1])[1].tobytes()
    assert decode(data).dtype == np.uint8
    assert np.array_equal(decode(data), SIXTEEN >> 8)
    assert np.array_equal(decode(data, Part(0, 0, 9, 80)), SIXTEEN[:9] >> 8)


SIDEWAYS = Image.Exif()
SIDEWAYS[0x0112] = 6  # the orientation: as nobody in the field reads it


@pytest.mark.parametrize(
    "settings", [{}, {"quality": 95, "subsampling": 0}, {"quality": 60, "progressive": True}, {"exif": SIDEWAYS}]
)
def test_a_jpeg_has_pillows_pixels(settings: dict[str, object]) -> None:
    """Bit for bit where both are built with libjpeg-turbo, as the wheels are; another decoder may round otherwise by one."""
    data = encoded(RGB, "JPEG", **settings)
    assert np.abs(decode(data).astype(int) - pillow(data)).max() <= 1
    grey = encoded(RGB.convert("L"), "JPEG", **settings)
    assert np.abs(decode(grey).astype(int) - pillow(grey)).max() <= 1


def test_a_jpeg_for_printing_and_other_kinds_are_left_to_pillow() -> None:
    for data in (encoded(RGB.convert("CMYK"), "JPEG"), encoded(RGB, "BMP"), encoded(RGB, "WEBP", lossless=True)):
        assert np.array_equal(decode(data), pillow(data))
        assert np.array_equal(decode(data, Part(3, 4, 20, 30)), pillow(data)[3:20, 4:30])


@pytest.mark.parametrize("kind", [*PNGS, "jpeg"])
def test_a_part_is_a_part_of_the_whole(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    data = encoded(RGB, "JPEG") if kind == "jpeg" else PNGS[kind]
    whole = decode(data)
    for bottom in range(1, SIZE[0] + 1):
        part = Part(bottom // 2, bottom // 3, bottom, SIZE[1] - bottom // 4)
        assert np.array_equal(decode(data, part), part.of(whole)), bottom
    assert capfd.readouterr().err == ""  # the decoders' libraries warn there


def test_rows_below_the_part_are_not_decoded() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 300, 3), dtype=np.uint8))
    data = bytearray(encoded(noise, "PNG"))
    end = data.rindex(b"IDAT") + 4 + 1000
    data[end : end + 40] = bytes(40)  # no stream that can be inflated
    assert np.array_equal(decode(bytes(data), Part(0, 0, 40, 300)), np.asarray(noise)[:40])
    with pytest.raises(OSError, match="broken"):
        decode(bytes(data), Part(0, 0, 400, 300))


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_a_file_that_ends_early_is_refused(kind: str, tmp_path: Path) -> None:
    data = PNGS["rgb"] if kind == "png" else encoded(RGB, "JPEG")
    path = tmp_path / f"cut.{kind}"
    for share in (0.05, 0.3, 0.6, 0.9):
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(DataError, match="cut.* cannot be read as an image"):
            read_image(path)


def test_a_size_or_a_part_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "scene.png"
    path.write_bytes(PNGS["rgb"])
    assert size_of({"id": "a", "image": {"path": str(path), "bytes": None}}) == SIZE
    assert size_of({"id": "a", "image": {"path": None, "bytes": PNGS["rgb"]}}) == SIZE
    small = np.asarray(RGB.resize((40, 24), Image.Resampling.BILINEAR))
    assert np.array_equal(read_image(path, (24, 40)), small)
    part = Part(2, 5, 20, 40)
    assert np.array_equal(read_image(path, part=part), part.of(scene()))
    assert np.array_equal(read_image(path, (24, 40), part=part), part.of(small))
    with pytest.raises(DataError, match="no such image"):
        size_of({"id": "a", "image": {"path": str(tmp_path / "nothing.png"), "bytes": None}})


WIDE = np.arange(65536, dtype=np.uint16).reshape(256, 256)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_to_eight(kind: str) -> None:
    data = encoded(Image.fromarray(WIDE), kind)
    assert (pillow(data) == 255).mean() > 0.99  # which clips
    expected = np.round(WIDE / 257).astype(np.uint8)
    assert np.array_equal(decode(data), np.dstack([expected] * 3))
    assert np.array_equal(decode(data, Part(3, 4, 20, 30)), np.dstack([expected] * 3)[3:20, 4:30])


def test_sixteen_bit_grey_with_alpha_keeps_its_brightness() -> None:
    import cv2

    data = cv2.imencode(".png", np.dstack([WIDE, WIDE, WIDE, np.full_like(WIDE, 65535)]))[1].tobytes()
    assert np.abs(decode(data).astype(int) - np.round(WIDE / 257)[..., None]).max() <= 1


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_wider_grey_is_refused(dtype: type, tmp_path: Path) -> None:
    path = tmp_path / "depth.tif"
    Image.fromarray(np.linspace(0, 1e5, 64, dtype=dtype).reshape(8, 8)).save(path)
    with pytest.raises(DataError, match=r"depth.tif holds 32-bit grey values \(mode [IF]\)"):
        read_image(path)


def test_other_kinds_of_files_are_not_tried(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(RGB, "PCX"))
    with pytest.raises(DataError, match="a.png cannot be read as an image: it is no PNG, JPEG, WebP, BMP or TIFF file"):
        read_image(path)


def turned(flag: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = flag
    return encoded(RGB, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("flag", range(1, 9))
def test_a_photograph_is_shown_as_its_exif_says(kind: str, flag: int, tmp_path: Path) -> None:
    data = turned(flag, kind)
    assert orientation(data) == flag
    path = tmp_path / "photo"
    path.write_bytes(data)
    with Image.open(BytesIO(data)) as file:
        shown = np.asarray(ImageOps.exif_transpose(file).convert("RGB"))
    assert np.abs(read_photo(path).astype(int) - shown).max() <= 1


def test_exif_behind_the_pixels_of_a_png_is_found() -> None:
    data = turned(6, "PNG")
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    late = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    assert orientation(late) == 6


@pytest.mark.parametrize("data", [b"", b"{}", PNGS["rgb"], encoded(RGB, "JPEG"), encoded(RGB, "JPEG", exif=b"Exif\0\0nothing")])
def test_what_has_no_orientation_has_the_usual_one(data: bytes) -> None:
    assert orientation(data) == 1


def damaged() -> bytes:
    """A JPEG with a stretch of zeros in the middle of its data, which decoders pass over with a warning."""
    data = bytearray(encoded(RGB, "JPEG", quality=95))
    data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
    return bytes(data)


def test_what_libjpeg_says_is_asked_for_and_not_printed(capfd: pytest.CaptureFixture[str]) -> None:
    assert decode(damaged()).shape == (*SIZE, 3)
    assert decoder_warning(damaged()).startswith("Corrupt JPEG data: ")
    assert decoder_warning(encoded(RGB, "JPEG")) == ""
    assert capfd.readouterr().err == ""


def test_what_others_write_meanwhile_reaches_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    import os

    from dgbench.data import native_stderr

    with native_stderr.captured():
        os.write(2, b"Corrupt JPEG data: 3 extraneous bytes before marker 0xd9\nout of memory\n")
    assert capfd.readouterr().err == "out of memory\n"
