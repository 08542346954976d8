"""The miniature towers that come with dgbench."""

import shutil

import pytest
import torch
from torch.nn import functional as F

import mfuser
from dgbench.streets.render import render
from mfuser.segmentor import CITYSCAPES
from mfuser.towers import files as packaged
from mfuser.towers.embedding import LinearEmbedding
from mfuser.towers.loading import load_tower
from mfuser.towers.table import TOWERS
from mfuser.towers.text import TextEncoder, tokenize
from mfuser.towers.vit import VisionEncoder
from mfuser.towers.weights import WeightsNotFound, files, require

MINI = ("mini_vfm", "mini_vlm")
SIDE = 128


def loaded(name):
    tower = VisionEncoder(name, (SIDE, SIDE))
    load_tower(name, require([name])[name], {"trunk": tower.trunk})
    return tower.eval()


def test_they_come_with_the_package_and_are_small():
    assert sum(path.stat().st_size for path in require(MINI).values()) <= 8_000_000
    assert [files(name) for name in MINI] == [[], []]  # nothing to download


def test_they_can_be_fused():
    rows = [TOWERS[name] for name in MINI]
    assert len({(row.width, row.depth, row.patch) for row in rows}) == 1
    assert [row.role for row in rows] == ["vfm", "vlm"]


def test_each_says_what_it_was_trained_on():
    for name in MINI:
        domain, _, digest = TOWERS[name].weights.pretraining().partition("@")
        assert domain == "streets-pretrain"
        assert len(digest) == 12


def test_a_file_with_a_changed_bit_is_refused(tmp_path, monkeypatch):
    row = TOWERS["mini_vfm"].weights
    path = tmp_path / "mini" / row.file
    path.parent.mkdir()
    shutil.copy(row.where, path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr(packaged, "__file__", str(tmp_path / "files.py"))
    with pytest.raises(WeightsNotFound, match=r"mini_vfm.safetensors, is damaged: its SHA-256 .*install dgbench again"):
        mfuser.build("linear", vfm="mini_vfm", image_size=(64, 64))


def test_a_missing_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(packaged, "__file__", str(tmp_path / "files.py"))
    with pytest.raises(WeightsNotFound, match="mini_vlm.safetensors, is not there"):
        require(["mini_vlm"])


def test_another_patch_is_refused():
    with pytest.raises(ValueError, match="`mini_vfm` has patches of 16 pixels, and its stem fits no other; got 8"):
        VisionEncoder("mini_vfm", (SIDE, SIDE), patch=8)


def test_towers_with_weights_are_frozen_unless_told_otherwise():
    options = {"vfm": "mini_vfm", "vlm": "mini_vlm", "image_size": (64, 64)}
    frozen = mfuser.build("mfuser", **options)
    assert not any(p.requires_grad for part in (frozen.vfm, frozen.vlm, frozen.text) for p in part.parameters())
    trained = mfuser.build("mfuser", **options, freeze_towers=False)
    assert all(p.requires_grad for p in trained.vfm.trunk.blocks.parameters())


def test_features_do_not_depend_on_the_other_images_of_a_batch_in_training():
    tower = loaded("mini_vfm").train()
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(tower.embed(images)[:1], tower.embed(images[:1]))


def test_words_that_no_sentence_had_are_zero_and_class_names_are_not():
    text = TextEncoder("mini_vlm", torch.tensor(tokenize("mini_vlm", CITYSCAPES)))
    load_tower("mini_vlm", require(["mini_vlm"])["mini_vlm"], {"text": text.tower})
    table = text.tower.token_embedding.weight
    assert table.shape == (49408, 64)
    known = table.abs().sum(1) > 0
    assert known[text.token_ids.unique()[1:]].all()  # the first is padding
    assert known.sum() < 300


def test_class_names_find_their_pixels_without_labels():
    """Against chance: of 19 classes, each pixel's cosine is largest for the right one in more than half of the pixels."""
    tower = loaded("mini_vlm")
    text = TextEncoder("mini_vlm", torch.tensor(tokenize("mini_vlm", CITYSCAPES)))
    head = LinearEmbedding(tower, text.dim, bias=True)
    load_tower("mini_vlm", require(["mini_vlm"])["mini_vlm"], {"head": head, "text": text.tower})
    hits = known = 0
    with torch.no_grad():
        classes = F.normalize(text.sentences(text.token_ids), dim=-1)
        for index in range(4):
            image, label = render("streets-world", "val", index, (SIDE, 2 * SIDE))
            tokens = tower.embed(torch.from_numpy(image[:, :SIDE]).permute(2, 0, 1)[None] / 255)
            for i in range(tower.depth):
                tokens = tower.block(i, tokens)
            scores = (F.normalize(head(tower, tokens)[1], dim=-1) @ classes.T).transpose(1, 2).unflatten(2, tower.grid)
            found = F.interpolate(scores, (SIDE, SIDE), mode="bilinear").argmax(1)[0]
            wanted = torch.from_numpy(label[:, :SIDE])
            hits += int((found == wanted).sum())
            known += int((wanted != 255).sum())
    assert hits / known > 0.5


def test_a_tower_of_another_size_gets_resampled_positions():
    wide = VisionEncoder("mini_vfm", (SIDE, 2 * SIDE))
    load_tower("mini_vfm", require(["mini_vfm"])["mini_vfm"], {"trunk": wide.trunk})
    square = loaded("mini_vfm").trunk.pos_embed
    fitted = F.interpolate(square[0, 1:].T.reshape(1, -1, 8, 8), (8, 16), mode="bicubic", align_corners=False)
    torch.testing.assert_close(wide.trunk.pos_embed[0, 1:], fitted.flatten(2)[0].T)
