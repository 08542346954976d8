"""Convolutional towers: four raw maps, as timm's own feature extractor gives them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from torch.nn import functional as F

from mfuser.towers.cnn import CNNEncoder
from mfuser.towers.loading import fill
from mfuser.towers.table import TOWERS
from mfuser.towers.vit import VisionEncoder


def test_a_shallow_copy_of_the_published_tower_gives_timms_own_features(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
    monkeypatch.setitem(TOWERS, "shallow", replace(TOWERS["convnext_l_clip"], options=sizes, channels=sizes["dims"]))
    tower = CNNEncoder("shallow")
    fill(tower)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.normal_(std=0.1)
    theirs = timm.create_model("convnext_large", pretrained=False, features_only=True, **sizes).eval()
    state = {name.replace("stem.", "stem_").replace("stages.", "stages_"): v for name, v in tower.trunk.state_dict().items()}
    theirs.load_state_dict(state)
    images = torch.rand(2, 3, 64, 96)
    maps = tower.eval()(images)
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 16, 24), (16, 8, 12), (24, 4, 6), (32, 2, 3)]
    for mine, other in zip(maps, theirs((images - tower.mean) / tower.std), strict=True):
        torch.testing.assert_close(mine, other)


def test_the_tiny_tower_gives_the_channels_that_its_row_says_at_four_strides() -> None:
    tower = CNNEncoder("tiny_cnn").eval()
    maps = tower(torch.rand(1, 3, 64, 64))
    assert tower.channels == tuple(m.shape[1] for m in maps)
    assert [m.shape[2] for m in maps] == [16, 8, 4, 2]


def test_an_image_is_padded_to_whole_cells_on_the_right_and_below() -> None:
    tower = CNNEncoder("tiny_cnn").eval()
    images = torch.rand(1, 3, 40, 33)
    padded = F.pad(images - tower.mean, (0, 31, 0, 24)) + tower.mean
    for mine, other in zip(tower(images), tower(padded), strict=True):
        torch.testing.assert_close(mine, other)


def test_every_parameter_of_a_tower_has_a_gradient() -> None:
    tower = CNNEncoder("tiny_cnn")
    sum(m.square().sum() for m in tower(torch.rand(2, 3, 64, 64))).backward()
    assert all(p.grad is not None for p in tower.parameters())


def test_towers_of_the_other_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="`tiny` is no convolutional network; choose from convnext_l_clip, tiny_cnn"):
        CNNEncoder("tiny")
    with pytest.raises(ValueError, match="`tiny_cnn` is a convolutional network, not a plain transformer; choose from .*tiny"):
        VisionEncoder("tiny_cnn", (64, 64))
