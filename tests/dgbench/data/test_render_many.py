"""Many pretraining images at once: in the given order, whatever the number of processes."""

from __future__ import annotations

import numpy as np
import pytest

from dgbench import streets
from dgbench.data import pretraining
from dgbench.data.pretraining import render_many
from dgbench.streets.captions import captions

SIZE = (32, 64)


def test_images_captions_and_parts_are_in_the_given_order():
    many = render_many([5, 0, 2], SIZE, 2, workers=1)
    assert many.images.shape == (3, *SIZE, 3)
    assert many.boxes.shape == (3, 2, 4)
    for at, index in enumerate((5, 0, 2)):
        assert np.array_equal(many.images[at], streets.render("streets-pretrain", "train", index, SIZE)[0])
        assert many.captions[at] == captions("streets-pretrain", "train", index)
        first = tuple(map(float, many.boxes[at, 0]))
        assert many.crops[at][0] == captions("streets-pretrain", "train", index, first)


def test_processes_give_the_same_as_one(monkeypatch):
    monkeypatch.setattr(pretraining, "_CHUNK", 3)
    one, two = (render_many(range(8), SIZE, 1, workers, split="val") for workers in (1, 2))
    assert np.array_equal(one.images, two.images)
    assert np.array_equal(one.boxes, two.boxes)
    assert (one.captions, one.crops) == (two.captions, two.crops)


def test_nothing_is_asked_for():
    assert render_many([], SIZE, 0).images.shape == (0, *SIZE, 3)
    assert render_many([1], SIZE, 0).boxes.shape == (1, 0, 4)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="split must be one of train, val"):
        render_many([0], SIZE, 0, split="test")
    with pytest.raises(ValueError, match="at least 32 x 32"):
        render_many([0], (8, 8), 0)
