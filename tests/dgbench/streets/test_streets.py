"""Procedural streets: bytes that never change, labels that fit the geometry, scenes that colour cannot read."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest

from dgbench import streets
from dgbench.streets.atmosphere import transmission
from dgbench.streets.camera import Pose, View
from dgbench.streets.mesh import Mesh, Scene

NAMES = (
    "streets-game",
    "streets-city",
    "streets-adverse",
    "streets-night",
    "streets-rain",
    "streets-fog",
    "streets-snow",
    "streets-world",
    "streets-pretrain",
)
PLACES = ("streets-game", "streets-city", "streets-adverse", "streets-world", "streets-pretrain")
SMALL = (128, 256)
CHECKSUMS = {
    ("streets-game", "train", 0, (256, 512)): "9dfa9ec1b2c3f9d8",
    ("streets-game", "val", 7, (128, 256)): "a3ce3786638f3d14",
    ("streets-city", "train", 1, (256, 512)): "80f7489a90df5e55",
    ("streets-city", "val", 2, (512, 1024)): "c91de862ad61d1a9",
    ("streets-night", "val", 3, (256, 512)): "895368c8c3ba4e78",
    ("streets-rain", "val", 4, (128, 256)): "3685bf59482dffd9",
    ("streets-fog", "val", 5, (256, 512)): "fa479a559bcd19b0",
    ("streets-fog@0.6", "val", 5, (256, 512)): "5873ac96be9b60fc",
    ("streets-snow", "val", 6, (256, 256)): "cbcd690d5888903c",
    ("streets-adverse", "train", 8, (128, 256)): "2d230f0f922f4c10",
    ("streets-world", "val", 9, (256, 512)): "e5977c39e320b196",
    ("streets-world", "train", 10, (512, 512)): "692331d4cbd50d9f",
    ("streets-pretrain", "val", 11, (256, 512)): "9adfd43dc177a645",
    ("streets-pretrain", "train", 12, (128, 256)): "005832147d88e5db",
}


def checksum(domain: str, split: str, index: int, size: tuple[int, int]) -> str:
    image, label = streets.render(domain, split, index, size)
    return hashlib.sha256(image.tobytes() + label.tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("key", CHECKSUMS, ids=lambda key: f"{key[0]}-{key[1]}-{key[2]}-{key[3][0]}x{key[3][1]}")
def test_bytes_are_pinned(key):
    # raise streets.VERSION and renew the table when a change of the scenes is meant
    assert checksum(*key) == CHECKSUMS[key]


def test_the_same_arguments_give_the_same_bytes_in_any_order():
    first = checksum("streets-city", "train", 3, SMALL)
    checksum("streets-world", "val", 8, SMALL)
    assert checksum("streets-city", "train", 3, SMALL) == first
    assert checksum("streets-city", "val", 3, SMALL) != first
    assert checksum("streets-city", "train", 4, SMALL) != first


@pytest.mark.parametrize("name", NAMES)
def test_every_style_renders_images_and_train_ids(name):
    assert name in streets.styles()
    image, label = streets.render(name, "val", 0, SMALL)
    assert image.shape == (*SMALL, 3)
    assert image.dtype == np.uint8
    assert label.shape == SMALL
    assert label.dtype == np.uint8
    assert set(np.unique(label)) <= {*range(19), 255}
    assert image.std() > 8.0


@pytest.mark.parametrize("size", [(128, 256), (256, 256), (96, 320), (33, 57)])
def test_any_size_works(size):
    image, label = streets.render("streets-world", "train", 2, size)
    assert image.shape == (*size, 3)
    assert label.shape == size


def test_sizes_show_the_same_scene():
    _, large = streets.render("streets-game", "val", 5, (256, 512))
    _, small = streets.render("streets-game", "val", 5, (128, 256))
    assert (large[1::2, 1::2] == small).mean() > 0.9


def test_square_images_are_the_middle_of_wide_ones():
    _, wide = streets.render("streets-game", "val", 6, (256, 512))
    _, square = streets.render("streets-game", "val", 6, (256, 256))
    assert (wide[:, 128:384] == square).mean() > 0.98


def test_weather_and_severity_change_the_image_but_not_the_label():
    clear, label = streets.render("streets-fog@0", "val", 1, SMALL)
    deviations = []
    for name in ("streets-fog@0.4", "streets-fog@1.0", "streets-night@1", "streets-rain@0.7", "streets-snow@0.7"):
        image, same = streets.render(name, "val", 1, SMALL)
        assert (same == label).all(), name
        assert (image != clear).mean() > 0.5, name
        deviations.append(image.std())
    assert clear.std() > deviations[0] > deviations[1]


def test_fog_hides_what_is_far_more_than_what_is_near():
    far, near = [], []
    for index in range(4):
        clear, _ = streets.render("streets-fog@0", "val", index, SMALL)
        fog, _ = streets.render("streets-fog@0.7", "val", index, SMALL)
        # the rows at the horizon are far away, the lowest ones are the road before the bonnet
        far.append(np.ptp(fog[56:70].astype(int).mean(2)) / np.ptp(clear[56:70].astype(int).mean(2)))
        near.append(fog[-20:].std() / clear[-20:].std())
    assert np.mean(far) < 0.8 * np.mean(near)


def test_night_is_dark_and_snow_is_white():
    day, label = streets.render("streets-snow@0", "val", 2, SMALL)
    night, _ = streets.render("streets-night@1", "val", 2, SMALL)
    snow, _ = streets.render("streets-snow@1", "val", 2, SMALL)
    assert night[label == 10].mean() < 0.4 * day[label == 10].mean()
    assert snow[label == 0].mean() > day[label == 0].mean() + 20


def test_transmission_is_the_exponential_of_the_optical_depth():
    depth = np.linspace(0.0, 200.0, 401).astype(np.float32)
    expected = [math.exp(-0.03 * float(metres)) for metres in depth]
    assert transmission(depth, 0.03) == pytest.approx(expected, abs=0.009)


def test_projection_and_depth_follow_the_pinhole_model():
    scene = Scene()
    mesh: Mesh = scene.start()
    mesh.poly([(-2.0, 0.0, 12.0), (3.0, 0.0, 8.0), (3.0, 2.5, 8.0), (-2.0, 2.5, 12.0)], scene.colour((0.5, 0.5, 0.5)), 2)
    view = View(Pose(x=0.0, height=1.5, yaw=0.0, pitch=0.0, roll=0.0, focal=1.0), (100, 200))
    world, attributes, _ = scene.arrays()
    faces = view.faces(world, attributes)
    for corner, (x, y, z) in enumerate([(-2.0, 0.0, 12.0), (3.0, 0.0, 8.0), (3.0, 2.5, 8.0), (-2.0, 2.5, 12.0)]):
        column, row = 99.5 + 200.0 * x / z, 49.5 - 200.0 * (y - 1.5) / z
        assert faces.polygons[0, corner] / 16.0 == pytest.approx((column, row), abs=0.04)
        a, b, c, ua, ub, uc, va, vb, vc = faces.planes[:, 0]
        assert 1.0 / (a * column + b * row + c) == pytest.approx(z, rel=1e-9)
        assert (ua * column + ub * row + uc) * z == pytest.approx(0.0 if corner in (0, 3) else 1.0, abs=1e-9)
        assert (va * column + vb * row + vc) * z == pytest.approx(0.0 if corner < 2 else 1.0, abs=1e-9)


def test_road_lies_below_and_sky_above():
    for domain in PLACES:
        total = np.zeros((SMALL[0], 19))
        for index in range(8):
            _, label = streets.render(domain, "val", index, SMALL)
            total += np.stack([(label == k).sum(axis=1) for k in range(19)], axis=1)
        rows = np.arange(SMALL[0])
        centre = (rows[:, None] * total).sum(axis=0) / np.maximum(total.sum(axis=0), 1)
        # building, vegetation and sky above cars and people, and those above the road
        assert centre[10] < centre[2] < centre[13] < centre[0]


@pytest.mark.parametrize("domain", PLACES)
def test_all_classes_occur_and_none_rules(domain):
    shares = streets.frequencies(domain, "train", 36, (96, 192))
    assert shares.shape == (19,)
    assert shares.sum() == pytest.approx(1.0)
    assert (shares > 0.0002).all()
    assert shares.max() < 0.45


def histogram_bayes_miou(source: str, target: str, train: int, test: int) -> float:
    """mIoU of the best class per bin of a 16 x 16 x 16 RGB histogram of the source's training images."""
    counts = np.zeros((4096, 19))
    confusion = np.zeros((19, 19))
    for domain, split, number in ((source, "train", train), (target, "val", test)):
        best = counts.argmax(axis=1)
        for index in range(number):
            image, label = streets.render(domain, split, index, SMALL)
            bins = (image.astype(int) >> 4) @ np.array([256, 16, 1])
            if split == "train":
                np.add.at(counts, (bins.reshape(-1), label.reshape(-1)), 1)
            else:
                np.add.at(confusion, (label.reshape(-1), best[bins].reshape(-1)), 1)
    union = confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    return float(np.mean(np.diag(confusion)[union > 0] / union[union > 0]))


def test_colour_alone_does_not_tell_the_class():
    assert histogram_bayes_miou("streets-game", "streets-game", 24, 8) < 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("streets-gam", "val", 0), "did you mean `streets-game`"),
        (("streets-game@0.5", "val", 0), "has no severity"),
        (("streets-fog@1.5", "val", 0), "from 0 to 1, got `1.5`"),
        (("streets-fog@thick", "val", 0), "got `thick`"),
        (("streets-fog@nan", "val", 0), "got `nan`"),
        (("streets-game", "test", 0), "split must be one of train, val"),
        (("streets-game", "val", -1), "index must not be negative"),
        (("streets-game", "val", 0, (8, 512)), "at least 32"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        streets.render(*arguments)
