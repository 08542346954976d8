"""Label encodings, each with the file that a usual reader gets wrong without an error."""

from __future__ import annotations

import io
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from cityscapesscripts.helpers.annotation import Annotation
from cityscapesscripts.helpers.labels import labels as official
from cityscapesscripts.preparation.json2labelImg import createLabelImage
from layouts import SIZE, blocks, polygons, write_label
from PIL import Image
from torchvision.io import ImageReadMode, decode_png

from dgbench.data.decode import read_label, read_stored
from dgbench.data.labels import CLASSES, IGNORE, LABEL_MAPS, LabelMap, palette
from dgbench.errors import DataError

IDS = LABEL_MAPS["cityscapes-ids"]
ALL = [*range(19), IGNORE]
# Cityscapes' polygons, by names; the ids of its own script
BY_NAME = LabelMap("names", IDS.classes, frozenset(range(34)) | {255}, {o.name: o.id for o in official if o.id >= 0})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "labels/a.png"


def saved(path: Path, image: Image.Image, **how: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **how)
    return path


def in_torchvision(path: Path, mode: ImageReadMode = ImageReadMode.UNCHANGED) -> np.ndarray:
    return decode_png(torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8), mode).numpy()


def in_opencv(path: Path) -> np.ndarray:
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


def test_an_8_bit_palette_is_read_as_indices_where_opencv_sees_colours(path: Path):
    label = blocks(ALL, 0)
    write_label(path, label, IDS, "ids")
    assert in_opencv(path).ndim == 3
    with Image.open(path) as file:
        assert not np.array_equal(IDS.table[np.asarray(file.convert("L"))], label)
    assert not np.array_equal(IDS.table[in_torchvision(path, ImageReadMode.GRAY)[0]], label)
    assert np.array_equal(read_label(path, IDS), label)


@pytest.mark.parametrize(("bits", "values"), [(4, [7, 8, 11, 12, 13]), (2, [0, 1, 2, 3]), (1, [0, 1])])
def test_a_narrow_palette_is_read_as_indices_where_torchvision_is_wrong(path: Path, bits: int, values: list[int]):
    ids = blocks(values, 0)
    image = Image.fromarray(ids, mode="P")
    image.putpalette([channel for i in range(2**bits) for channel in (255 - i, 2 * i, 9)])
    saved(path, image, bits=bits)
    assert path.read_bytes()[24] == bits
    assert not np.array_equal(in_torchvision(path)[0], ids)
    assert not np.array_equal(in_opencv(path)[..., 0], ids)
    assert np.array_equal(read_label(path, IDS), IDS.table[ids])


def test_16_bit_colour_is_read_by_its_red_where_pillow_sees_zeros(path: Path):
    synthia = LABEL_MAPS["synthia-ids"]
    label = blocks([0, 2, 5, 10, 11, 13, 17, 255], 0)
    write_label(path, label, synthia, "rgb16")
    with Image.open(path) as file:
        assert not np.asarray(file).any()
    assert np.array_equal(read_label(path, synthia, "rgb16"), label)
    assert np.array_equal(read_stored(path, synthia, "rgb16"), in_torchvision(path)[0])


def test_16_bit_colour_under_the_name_of_ids_is_refused(path: Path):
    write_label(path, blocks([0, 2], 0), LABEL_MAPS["synthia-ids"], "rgb16")
    with pytest.raises(DataError, match="RGB image, not an 8-bit label map"):
        read_label(path, LABEL_MAPS["synthia-ids"])


def test_16_bit_grey_keeps_values_beyond_a_byte_where_others_clip_them(path: Path):
    wide = LabelMap("wide", {1: 0, 300: 13, 40000: 18}, frozenset({0, 255}))
    values = np.array([[0, 1, 300, 40000, 255]], np.uint16).repeat(3, 0)
    saved(path, Image.fromarray(values))
    with Image.open(path) as file:
        assert np.asarray(file.convert("L")).max() <= 255
    assert np.array_equal(read_label(path, wide), [[255, 0, 13, 18, 255]] * 3)


def test_narrow_grey_is_refused_because_every_reader_scales_it(path: Path):
    ids = np.tile(np.array([0, 1], np.uint8), (SIZE[0], SIZE[1] // 2))
    saved(path, Image.fromarray(ids.astype(bool)))
    assert path.read_bytes()[24] == 1
    assert in_opencv(path).max() == 255
    with pytest.raises(DataError, match="a.png is a 1-bit grey image, whose values every reader scales"):
        read_label(path, IDS)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colour_maps_are_looked_up_in_the_palette_where_grey_says_nothing(path: Path, mode: str):
    label = blocks(ALL, 0)
    colours = Image.fromarray(palette()[label])
    saved(path, colours.convert(mode, palette=Image.Palette.ADAPTIVE, colors=32) if mode == "P" else colours.convert(mode))
    with Image.open(path) as file:
        assert not np.array_equal(np.asarray(file.convert("L")), label)
    assert np.array_equal(read_label(path, LABEL_MAPS["train-ids"], "colors"), label)


def test_colours_of_what_cityscapes_does_not_score_are_ignored(path: Path):
    scored = {c.color for c in CLASSES}
    for other in official:
        if other.color not in scored:
            saved(path, Image.new("RGB", (4, 4), other.color))
            assert (read_label(path, LABEL_MAPS["train-ids"], "colors") == IGNORE).all(), other.name


def test_a_colour_of_no_class_is_named(path: Path):
    saved(path, Image.new("RGB", (4, 4), (1, 2, 3)))
    with pytest.raises(DataError, match=r"holds the colour \(1, 2, 3\), which is none of the Cityscapes palette"):
        read_label(path, LABEL_MAPS["train-ids"], "colors")


def test_train_ids_under_the_name_of_a_colour_map_are_read(path: Path):
    """MFuser's configuration reads train ids from `colormaps/`."""
    label = blocks(ALL, 0)
    saved(path, Image.fromarray(label))
    assert np.array_equal(read_label(path, LABEL_MAPS["train-ids"], "colors"), label)


def test_polygons_are_drawn_in_the_order_of_the_file_as_cityscapes_script_does(tmp_path: Path):
    path = tmp_path / "a_polygons.json"
    rng = np.random.default_rng(0)
    names = [o.name for o in official if o.id >= 0]
    scene = {
        "imgHeight": 60,
        "imgWidth": 100,
        "objects": [
            {"label": str(rng.choice(names)), "polygon": rng.integers((0, 0), (100, 60), size=(5, 2)).tolist(), "deleted": 0}
            for _ in range(30)
        ],
    }
    scene["objects"] += [
        {"label": "cargroup", "polygon": [[10, 10], [40, 10], [40, 30]], "deleted": 0},
        {"label": "person", "polygon": [[10, 10], [40, 10], [40, 30]], "deleted": 1},
    ]
    path.write_text(json.dumps(scene))
    annotation = Annotation()
    annotation.fromJsonFile(str(path))
    drawn = np.asarray(createLabelImage(annotation, "ids"))
    assert np.array_equal(read_stored(path, BY_NAME, "polygons"), drawn)
    path.write_text(json.dumps(scene | {"objects": scene["objects"][::-1]}))
    assert not np.array_equal(read_stored(path, BY_NAME, "polygons"), drawn)


def test_idds_polygons_are_read_by_idds_names(tmp_path: Path):
    idd = LABEL_MAPS["idd-autonue"]
    values = blocks([*range(40)], 0).astype(np.uint16)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(polygons(values, {value: name for name, value in idd.names.items()})))
    assert np.array_equal(read_stored(path, idd, "polygons"), values)


def test_a_polygon_of_an_unknown_label_is_named(tmp_path: Path):
    path = tmp_path / "a.json"
    scene = {"imgHeight": 4, "imgWidth": 4, "objects": [{"label": "spaceship", "polygon": [[0, 0], [3, 0], [3, 3]]}]}
    path.write_text(json.dumps(scene))
    with pytest.raises(DataError, match="a.json has a polygon labelled `spaceship`, which the label map `idd-autonue`"):
        read_label(path, LABEL_MAPS["idd-autonue"], "polygons")


def test_panoptic_segments_are_looked_up_in_the_annotation_where_one_channel_says_nothing(path: Path):
    wd2 = LABEL_MAPS["wilddash2-policy"]
    label = blocks([0, 1, 13, 17, 255], 0)
    write_label(path, label, wd2, "panoptic")
    with Image.open(path) as file:
        red = np.asarray(file)[..., 0]
    assert not np.array_equal(wd2.table[red], label)
    assert np.array_equal(read_label(path, wd2, "panoptic"), label)


def test_a_segment_that_is_not_annotated_is_named(path: Path):
    write_label(path, blocks([0], 0), LABEL_MAPS["wilddash2-policy"], "panoptic")
    saved(path, Image.new("RGB", (4, 4), (5, 1, 0)))
    with pytest.raises(DataError, match=r"a.png holds segment 261, which its annotation does not list"):
        read_label(path, LABEL_MAPS["wilddash2-policy"], "panoptic")


def test_void_of_a_panoptic_png_needs_no_annotation(path: Path):
    write_label(path, blocks([0], 0), LABEL_MAPS["wilddash2-policy"], "panoptic")
    saved(path, Image.new("RGB", (4, 4)))
    assert (read_label(path, LABEL_MAPS["wilddash2-policy"], "panoptic") == IGNORE).all()


def test_a_panoptic_png_without_its_json_is_refused(path: Path):
    saved(path, Image.new("RGB", (4, 4)))
    with pytest.raises(DataError, match="no labels.json beside the folder of .*a.png"):
        read_label(path, LABEL_MAPS["wilddash2-policy"], "panoptic")


@pytest.mark.parametrize("encoding", ["ids", "rgb16", "colors", "panoptic", "polygons"])
def test_a_truncated_file_is_named(path: Path, encoding: str):
    label_map = LABEL_MAPS["idd-autonue"]
    write_label(path, blocks(ALL, 0), label_map, encoding)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 40])
    with pytest.raises(DataError, match=r"a.png (cannot be read as a label map|is not a file of polygons)"):
        read_label(path, label_map, encoding)


@pytest.mark.parametrize("encoding", ["ids", "rgb16", "colors", "panoptic", "polygons"])
@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"[]", b'{"objects": 3}', b"null"])
def test_what_is_no_label_is_refused(path: Path, encoding: str, content: bytes):
    write_label(path, blocks([0], 0), LABEL_MAPS["wilddash2-policy"], "panoptic")
    path.write_bytes(content)
    with pytest.raises(DataError, match="a.png"):
        read_label(path, LABEL_MAPS["wilddash2-policy"], encoding)


@pytest.mark.parametrize("encoding", ["ids", "rgb16", "colors", "panoptic", "polygons"])
def test_a_missing_file_is_named(path: Path, encoding: str):
    with pytest.raises(DataError, match=f"no such label: {path}"):
        read_label(path, IDS, encoding)


def test_an_8_bit_colour_file_is_no_16_bit_one(path: Path):
    saved(path, Image.new("RGB", (4, 4), (3, 0, 0)))
    with pytest.raises(DataError, match="a.png is not a 16-bit colour PNG but a PNG of 8-bit colour"):
        read_label(path, LABEL_MAPS["synthia-ids"], "rgb16")


def test_bytes_are_read_like_the_file(path: Path):
    label = blocks(ALL, 0)
    write_label(path, label, IDS, "ids")
    assert np.array_equal(read_label(Path("row 3"), IDS, data=path.read_bytes()), label)
    with pytest.raises(DataError, match="row 3 cannot be read as a label map"):
        read_label(Path("row 3"), IDS, data=b"")


def test_values_outside_the_map_are_named_with_what_is_known(path: Path):
    buffer = io.BytesIO()
    Image.fromarray(np.array([[7, 40, 41]], np.uint8)).save(buffer, "PNG")
    with pytest.raises(DataError, match=r"holds label values 40, 41, which the label map `cityscapes-ids` .*\(0..33, 255\)"):
        read_label(path, IDS, data=buffer.getvalue())


def test_a_value_outside_the_map_is_named_with_all_that_the_map_allows(path: Path):
    own = LabelMap("mine", {1: 0, 2: 13, 7: 11}, frozenset({0, 255}))
    saved(path, Image.fromarray(blocks([0, 1, 2, 7, 9, 255], 0)))
    with pytest.raises(
        DataError, match=r"holds label value 9, which the label map `mine` does not know \(0\.\.2, 7, 255\)"
    ) as error:
        read_label(path, own)
    assert "add the values to its `label_map`, or to `ignored`" in (error.value.hint or "")
    assert "(0..18, 255)" in str(refused(path, LABEL_MAPS["train-ids"]))


def refused(path: Path, label_map: LabelMap) -> DataError:
    saved(path, Image.fromarray(np.full(SIZE, 77, np.uint8)))
    with pytest.raises(DataError) as error:
        read_label(path, label_map)
    return error.value
