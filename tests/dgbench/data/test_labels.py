"""Label maps against the official tables that cityscapesscripts ships."""

from __future__ import annotations

import numpy as np
from cityscapesscripts.helpers.labels import labels as official

from dgbench.data.labels import CLASSES, IGNORE, LABEL_MAPS, palette


def test_classes_are_the_official_train_ids():
    expected = {label.trainId: label for label in official if 0 <= label.trainId < 255}
    assert len(CLASSES) == len(expected) == 19
    for train_id, own in enumerate(CLASSES):
        assert (own.name, own.label_id, own.color) == (
            expected[train_id].name,
            expected[train_id].id,
            expected[train_id].color,
        )


def test_cityscapes_map_equals_the_official_one_for_every_stored_value():
    table = LABEL_MAPS["cityscapes-ids"].table
    for label in official:
        if label.id >= 0:
            assert table[label.id] == label.trainId
            assert LABEL_MAPS["cityscapes-ids"].known[label.id]
    assert not LABEL_MAPS["cityscapes-ids"].known[34:255].any()


def test_the_three_mapillary_maps_differ_where_their_sources_differ():
    robustnet, openseg, wd2 = (LABEL_MAPS[f"mapillary-{n}"].table for n in ("robustnet", "openseg", "wd2-policy"))
    assert np.flatnonzero(robustnet != openseg).tolist() == [7, 8, 9, 10, 11, 14, 23, 41, 44, 46, 49]
    assert np.flatnonzero(robustnet != wd2).tolist() == [5, 7, 8, 9, 11, 12, 14, 23, 36, 43, 46, 58]


def test_ignored_pixels_have_no_colour():
    assert palette()[IGNORE].tolist() == [0, 0, 0]
