"""What a pixel of a label file stands for, whatever program saved the file; files of public tools lie in `recompressed/`."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from layouts import blocks, write_label
from numpy.typing import NDArray
from PIL import Image

from dgbench.data.decode import read_label, read_stored
from dgbench.data.labels import IGNORE, LABEL_MAPS, LabelMap, palette
from dgbench.errors import DataError

MADE = Path(__file__).parent / "recompressed"
IDS, TRAIN_IDS, GTA5 = (LABEL_MAPS[name] for name in ("cityscapes-ids", "train-ids", "gta5-ids"))
VISTAS = LABEL_MAPS["mapillary-robustnet"]
STREET = blocks([7, 8, 11, 13, 21, 23, 26], 3)
ROAD, BUILDING, FENCE, CAR = (128, 64, 128), (70, 70, 70), (190, 153, 153), (0, 0, 142)


def read(image: Image.Image, label_map: LabelMap, encoding: str = "ids", kind: str = "PNG", **how: object) -> NDArray[np.uint8]:
    return read_label(Path("labels/a.png"), label_map, encoding, data=encoded(image, kind, **how))


def encoded(image: Image.Image, kind: str = "PNG", **how: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def in_palette(indices: object, colors: list[tuple[int, int, int]]) -> Image.Image:
    image = Image.fromarray(np.asarray(indices, np.uint8))
    image.putpalette([channel for color in colors for channel in color])
    return image


def grey_palette(values: NDArray[np.uint8]) -> Image.Image:
    """The values as an optimiser may store them: those that occur, numbered from the largest."""
    known = np.unique(values)[::-1]
    return in_palette(len(known) - 1 - np.searchsorted(known[::-1], values), [(int(v),) * 3 for v in known])


def narrow(samples: NDArray[np.uint8], bits: int) -> bytes:
    """A grey PNG of 1, 2 or 4 bits, by the specification."""
    rows = np.unpackbits(samples[..., None], axis=2)[..., 8 - bits :].reshape(len(samples), -1)
    raw = b"".join(b"\0" + np.packbits(row).tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], bits, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    made = [struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)


@pytest.mark.parametrize("label_map", [IDS, GTA5])
@pytest.mark.parametrize("tool", ["optipng", "pngquant"])
def test_grey_labels_that_a_tool_saved_as_a_palette_keep_their_classes(tool: str, label_map: LabelMap):
    path = MADE / f"grey-{tool}.png"
    with Image.open(path) as file:
        assert file.mode == "P"
        assert not np.array_equal(np.asarray(file), STREET)
    assert np.array_equal(read_stored(path, label_map), STREET)
    assert np.array_equal(read_label(path, label_map), label_map.table[STREET])


@pytest.mark.parametrize("bits", [8, 4])
def test_a_grey_palette_is_read_by_its_grey_values(bits: int):
    assert np.array_equal(read(grey_palette(STREET), IDS, bits=bits), IDS.table[STREET])
    assert np.array_equal(read(grey_palette(blocks([0, 4, 13, IGNORE], 0)), TRAIN_IDS, bits=bits), blocks([0, 4, 13, IGNORE], 0))


def test_a_grey_palette_of_other_values_than_the_maps_is_refused_by_them():
    with pytest.raises(DataError, match="holds label values 21, 23, 26, which the label map `train-ids` does not know"):
        read(grey_palette(STREET), TRAIN_IDS)


@pytest.mark.parametrize("encoding", ["png", "bmp", "gif", "tiff", "webp"])
def test_every_lossless_kind_of_file_keeps_grey_labels(encoding: str):
    how = {"lossless": True} if encoding == "webp" else {}
    image = Image.fromarray(STREET)
    image = image.convert("RGB") if encoding == "webp" else image
    assert np.array_equal(read(image, IDS, kind=encoding.upper(), **how), IDS.table[STREET])


@pytest.mark.parametrize("mode", ["LA", "RGB", "RGBA"])
def test_grey_that_a_program_saved_with_more_channels_is_read(mode: str):
    assert np.array_equal(read(Image.fromarray(STREET).convert(mode), IDS), IDS.table[STREET])


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "L"])
def test_values_under_transparent_pixels_are_refused(mode: str):
    image, how = Image.fromarray(STREET), {}
    if mode == "P":
        image, how = grey_palette(STREET), {"transparency": 0}
    elif mode == "L":
        how = {"transparency": 7}
    else:
        image = image.convert(mode)
        image.putalpha(Image.fromarray(np.where(STREET == 7, 0, 255).astype(np.uint8)))
    with pytest.raises(DataError, match="a.png has transparent pixels, whose values have no meaning"):
        read(image, IDS, **how)


def test_a_colour_rendering_is_no_label_map():
    for image in (Image.fromarray(palette()[blocks([0, 2, 13], 0)]), Image.new("RGB", (4, 4)), Image.new("CMYK", (4, 4))):
        with pytest.raises(DataError, match=rf"a.png is a {image.mode} image, not an 8-bit label map"):
            read(image, TRAIN_IDS, kind="TIFF")


@pytest.mark.parametrize("label_map", [IDS, TRAIN_IDS])
def test_16_bit_colours_and_alpha_are_refused_where_pillow_sees_zeros(label_map: LabelMap):
    values = blocks([0, 7, 11], 0).astype(np.uint16)
    for channels in (3, 4):
        data = cv2.imencode(".png", np.dstack([values] * channels))[1].tobytes()
        with pytest.raises(DataError, match="a.png is a 16-bit RGBA? image"):
            read_label(Path("a.png"), label_map, data=data)
        with pytest.raises(DataError, match="a.png is a 16-bit RGBA? image, 8-bit colours were expected"):
            read_label(Path("a.png"), label_map, "colors", data=data)


# narrow grey: what an optimiser makes of 0 and 255, of 0, 17, 34, ..., and what some programs write for 0, 1, 2, ...


def test_narrow_grey_is_read_where_only_one_reading_is_possible():
    assert not read_label(Path("a.png"), TRAIN_IDS, data=narrow(np.zeros((5, 9), np.uint8), 1)).any()
    two = LabelMap("two", {0: 0, 170: 13}, frozenset({IGNORE}))
    samples = np.tile(np.array([0, 2, 3], np.uint8), (4, 3))
    assert np.array_equal(read_label(Path("a.png"), two, data=narrow(samples, 2)), np.tile([0, 13, IGNORE], (4, 3)))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_narrow_grey_is_refused_where_both_readings_are_possible(bits: int):
    samples = np.tile(np.array([0, 2**bits - 1], np.uint8), (4, 4))
    with pytest.raises(DataError, match=rf"a {bits}-bit grey image.* whether {2**bits - 1} or 255 was meant"):
        read_label(Path("a.png"), TRAIN_IDS, data=narrow(samples, bits))
    if bits == 1:
        with pytest.raises(DataError, match="a 1-bit grey image"):
            read(Image.fromarray(samples.astype(bool)), TRAIN_IDS, kind="TIFF")


@pytest.mark.parametrize(
    ("name", "label_map", "label"), [("gta5", GTA5, STREET), ("vistas", VISTAS, blocks([0, 13, 15, 17, 24, 27, 30, 55, 65], 4))]
)
def test_a_published_palette_is_read_by_index_and_refused_in_another_order(name: str, label_map: LabelMap, label: object):
    assert np.array_equal(read_stored(MADE / f"{name}-optipng.png", label_map), label)
    with pytest.raises(DataError, match=rf"{name}-oxipng.png has a palette whose entry \d+ is \(.*\), which is published as the"):
        read_label(MADE / f"{name}-oxipng.png", label_map)


@pytest.mark.parametrize("label_map", [IDS, TRAIN_IDS])
def test_cityscapes_colours_in_another_order_are_refused(label_map: LabelMap):
    """Grey label files are published of these; palettes are made by converters."""
    right = [next(v for v, c in label_map.classes.items() if c == train_id) for train_id in (0, 2, 4, 13)]
    colors = [(0, 0, 0)] * 256
    for value, color in zip(right, (ROAD, BUILDING, FENCE, CAR), strict=True):
        colors[value] = color
    label = blocks(right, 0)
    assert np.array_equal(read(in_palette(label, colors), label_map), label_map.table[label])
    with pytest.raises(DataError, match=r"a.png has a palette whose entry 0 is \(0, 0, 142\)"):
        read(in_palette(blocks([0, 1, 2, 3], 0), [CAR, ROAD, BUILDING, FENCE]), label_map)


def test_grey_colours_of_a_published_palette_do_not_make_a_grey_palette():
    """GTA5 shows "static" as (20, 20, 20), which as a value would be a traffic sign."""
    only = in_palette(blocks([0, 1], 0), [(0, 0, 0), (20, 20, 20)])
    with pytest.raises(DataError, match=r"entry 1 is \(20, 20, 20\), which is published as the colour of 4"):
        read(only, GTA5)


@pytest.mark.parametrize("domain_map", [GTA5, VISTAS])
def test_the_colours_of_the_classes_go_with_their_values(domain_map: LabelMap):
    """What `dgbench data export` writes, and whoever shows a set's values in Cityscapes' colours."""
    label = blocks(sorted(domain_map.classes), 0)
    assert np.array_equal(
        read(in_palette(label, [tuple(c) for c in palette()[domain_map.table].tolist()]), domain_map), domain_map.table[label]
    )


def test_a_colour_map_of_ones_own_is_read_by_index():
    """PASCAL VOC's palette has black and grey entries, too."""
    voc = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128), (128, 128, 128)]
    mine = LabelMap("mine", {1: 0, 2: 2, 7: 13}, frozenset({0, IGNORE}))
    for values in ([0, 1, 2, 7], [0, 7], [7], [0]):
        label = blocks(values, 0)
        assert np.array_equal(read(in_palette(label, voc), mine), mine.table[label])


def test_a_grey_entry_that_may_be_index_or_value_is_refused():
    mine = LabelMap("mine", {1: 0, 128: 2, 7: 13}, frozenset({0, IGNORE}))
    colors = [(0, 0, 0), (128, 0, 0), *[(1, 2, 3)] * 5, (128, 128, 128)]
    with pytest.raises(DataError, match=r"a.png has a palette whose entry 7 is \(128, 128, 128\), and both 7 and 128 are labels"):
        read(in_palette(np.full((4, 4), 7), colors), mine)


# colours and segments


@pytest.mark.parametrize("tool", ["oxipng", "pngquant"])
def test_colour_maps_that_a_tool_saved_as_a_palette_are_read_by_colour(tool: str):
    path = MADE / f"colours-{tool}.png"
    with Image.open(path) as file:
        assert file.mode == "P"
    assert np.array_equal(read_label(path, TRAIN_IDS, "colors"), IDS.table[STREET])


def test_a_colour_map_that_became_grey_is_read_by_colour():
    label = blocks([2, 5, IGNORE], 0)  # buildings, poles and what is unlabeled have grey colours
    grey = Image.fromarray(palette()[label][..., 0])
    assert grey.mode == "L"
    assert np.array_equal(read(grey, TRAIN_IDS, "colors"), label)


def test_train_ids_under_the_name_of_a_colour_map_are_read_whatever_saved_them():
    label = blocks([0, 2, 4, 13, IGNORE], 0)
    for image in (grey_palette(label), Image.fromarray(label).convert("RGB"), Image.fromarray(label).convert("LA")):
        assert np.array_equal(read(image, TRAIN_IDS, "colors"), label)


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_black_alone_may_be_road_or_unlabeled(mode: str):
    with pytest.raises(DataError, match="a.png is completely black"):
        read(Image.new(mode, (4, 4)), TRAIN_IDS, "colors")


@pytest.mark.parametrize("mode", ["P", "L", "RGBA"])
def test_panoptic_segments_are_read_by_colour_whatever_saved_them(tmp_path: Path, mode: str):
    path, label_map = tmp_path / "panoptic/a.png", LABEL_MAPS["wilddash2-policy"]
    label = blocks([0, 1, 13, 17, IGNORE], 0)
    write_label(path, label, label_map, "panoptic")
    if mode == "L":
        (tmp_path / "panoptic.json").write_text(
            '{"annotations": [{"file_name": "a.png", "segments_info": [{"id": 197379, "category_id": 7}]}]}'
        )
        Image.new("L", (4, 4), 3).save(path)
        assert not read_label(path, label_map, "panoptic").any()
        return
    with Image.open(path) as file:
        pixels = np.asarray(file)
    found, indices = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
    image = in_palette(indices.reshape(label.shape), found.tolist()) if mode == "P" else Image.fromarray(pixels).convert(mode)
    image.save(path)
    assert np.array_equal(read_label(path, label_map, "panoptic"), label)


# loss


@pytest.mark.parametrize("encoding", ["ids", "colors", "panoptic", "rgb16"])
@pytest.mark.parametrize(
    ("kind", "how", "what"),
    [
        ("JPEG", {"quality": 100, "subsampling": 0}, "a JPEG"),
        ("WEBP", {"quality": 100}, "a lossy WebP"),
        ("WEBP", {"quality": 100, "exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0"}, "a lossy WebP"),
        ("TIFF", {"compression": "jpeg"}, "a TIFF compressed by jpeg"),
    ],
)
def test_labels_stored_with_loss_are_refused(tmp_path: Path, encoding: str, kind: str, how: dict[str, object], what: str):
    path = tmp_path / "panoptic/a.png"
    write_label(path, blocks([0], 0), LABEL_MAPS["wilddash2-policy"], "panoptic")
    path.write_bytes(encoded(Image.fromarray(palette()[IDS.table[STREET]]), kind, **how))
    says = "is not a 16-bit colour PNG" if encoding == "rgb16" else f"is {what}, which changes values where labels meet"
    with pytest.raises(DataError, match=f"a.png {says}"):
        read_label(path, IDS, encoding)


def test_other_kinds_of_files_are_not_tried():
    with pytest.raises(DataError, match="a.png cannot be read as a label map: it is no PNG, BMP, GIF, TIFF or WebP file"):
        read(Image.fromarray(STREET), IDS, kind="PCX")
