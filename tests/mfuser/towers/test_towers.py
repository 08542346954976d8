"""MFuser over pairs of towers: what fits together, what goes with what, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from golden_files import description

import mfuser
from mfuser.authors import load_authors_checkpoint
from mfuser.segmentor import Batch
from mfuser.towers.embedding import PooledEmbedding, ProjectedEmbedding, SumEmbedding, counterparts
from mfuser.towers.loading import load_tower
from mfuser.towers.meta import unfilled
from mfuser.towers.table import TOWERS, HubFile, Tower
from mfuser.towers.vit import VisionEncoder
from mfuser.towers.weights import WeightsNotFound, files, hub_file

IDS = {"eva02": "eva", "clip": "clip", "siglip": "siglip", "siglip2": "siglip"}


def full(vlm: str, vfm: str, **options) -> mfuser.Segmentor:
    """A model at full size without memory for its weights; SigLIP2's vocabulary is larger, but the ids fit."""
    ids = description(f"layout_{IDS[vlm]}")["tokens"]
    with unfilled():
        return mfuser.build("mfuser", vlm=vlm, vfm=vfm, token_ids=ids, weights="meta", **options)


@pytest.mark.parametrize("vlm", sorted(IDS))
@pytest.mark.parametrize("vfm", ["dinov2_l", "dinov2_l_reg4", "dinov3_l", "timm:vit_large_patch16_siglip_384"])
def test_every_pair_of_large_towers_is_built(vfm, vlm):
    model = full(vlm, vfm)
    assert model.vfm.grid == model.vlm.grid
    assert not any(p.requires_grad for p in (*model.vfm.parameters(), *model.vlm.parameters()))
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("size", [(504, 504), (768, 768), (512, 1024)])
@pytest.mark.parametrize("vlm", sorted(IDS))
def test_every_tower_is_built_for_other_sizes(vlm, size):
    model = full(vlm, "dinov3_l", image_size=size)
    patch = TOWERS[vlm].patch
    assert model.vfm.grid == model.vlm.grid == (size[0] // patch, size[1] // patch)


def test_tiny_towers_say_which_sizes_they_take():
    with pytest.raises(ValueError, match=r"image size \(60, 64\) is not a multiple of the patch of `tiny`, 8"):
        mfuser.build("mfuser", vfm="tiny", vlm="tiny", image_size=(60, 64))
    model = mfuser.build("mfuser", vfm="tiny", vlm="tiny", image_size=(64, 64))
    with pytest.raises(ValueError, match=r"use mfuser.slide for larger ones, or build with image_size=\(64, 96\)"):
        model(torch.rand(1, 3, 64, 96))


def test_towers_that_do_not_match_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match="`timm:vit_base_patch16_dinov3` has 12 blocks and `eva02` 24; they must be equal"):
        full("eva02", "timm:vit_base_patch16_dinov3")
    with pytest.raises(ValueError, match="`timm:vit_tiny_patch16_224` is 192 wide and `.*` 64; they must be equal"):
        mfuser.build("mfuser", vfm="timm:vit_tiny_patch16_224", vlm="twelve", token_ids=[[1] * 5] * 19, weights="random")
    # before anything is downloaded
    with pytest.raises(ValueError, match="has 12 blocks and `tiny` 3; they must be equal"):
        mfuser.build("mfuser", vfm="timm:vit_tiny_patch16_224", vlm="tiny", image_size=(64, 64))


def test_a_model_of_timms_is_no_language_tower():
    with pytest.raises(ValueError, match="vlm `timm:vit_tiny_patch16_224` has no text tower; choose from .*; other towers are"):
        mfuser.build("mfuser", vfm="tiny", vlm="timm:vit_tiny_patch16_224")
    with pytest.raises(ValueError, match="vfm `dinov9` is unknown; choose from .*, or timm:<model> for vfm"):
        mfuser.build("mfuser", vfm="dinov9", vlm="tiny")
    with pytest.raises(ValueError, match="timm has no model `vit_nope`"):
        mfuser.build("mfuser", vfm="timm:vit_nope", vlm="tiny")


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    """Tiny towers with every kind of prefix, and one of twelve blocks."""
    tiny = TOWERS["tiny"]
    kinds = {
        "registers": {"reg_tokens": 4},
        "bare": {"class_token": False, "global_pool": ""},
        "bare_registers": {"class_token": False, "reg_tokens": 4, "global_pool": ""},
    }
    for name, options in kinds.items():
        monkeypatch.setitem(TOWERS, name, Tower(None, 8, tiny.mean, tiny.std, {**tiny.options, **options}))
    monkeypatch.setitem(TOWERS, "twelve", replace(tiny, options={**tiny.options, "depth": 12}, depth=12))
    from mfuser.methods import mfuser as method

    monkeypatch.setitem(method._SIZES, "twelve", method._SIZES["tiny"])


@pytest.mark.parametrize(
    ("vfm", "vlm", "expected"),
    # the numbers of the foundation tower's tokens that go with the other's
    [
        ("tiny", "tiny", [0, 1, 2, 3, 4]),
        ("registers", "tiny", [0, 5, 6, 7, 8]),
        ("tiny", "bare", [1, 2, 3, 4]),
        ("registers", "bare", [5, 6, 7, 8]),
        ("bare", "bare", [0, 1, 2, 3]),
        ("bare", "tiny", [1.5, 0, 1, 2, 3]),
        ("bare_registers", "tiny", [5.5, 4, 5, 6, 7]),
    ],
)
def test_class_goes_with_class_patch_with_patch_and_registers_with_nothing(vfm, vlm, expected):
    one, other = (VisionEncoder(name, (16, 16)) for name in (vfm, vlm))
    tokens = torch.arange(one.prefix + 4.0).view(1, -1, 1)
    assert counterparts(one, other, tokens).flatten().tolist() == expected


@pytest.mark.parametrize("embedding", [SumEmbedding, ProjectedEmbedding])
@pytest.mark.parametrize("vfm", ["tiny", "registers", "bare"])
def test_an_embedding_is_of_the_grid_whatever_the_prefix(embedding, vfm):
    one, other = VisionEncoder(vfm, (16, 24)), VisionEncoder("tiny", (16, 24))
    module = embedding(one, other, 64)
    d, v = one.embed(torch.rand(2, 3, 16, 24)), other.embed(torch.rand(2, 3, 16, 24))
    global_, visual = module(one, other, d, v)
    assert (global_.shape, visual.shape) == ((2, 1, 64), (2, 6, 64))
    # a patch changes its own place alone, a register nothing
    moved = d.clone()
    moved[:, one.prefix + 2] += torch.randn(64)
    changed = (module(one, other, moved, v)[1] - visual).abs().amax((0, 2)) > 1e-6
    assert changed.tolist() == [False, False, True, False, False, False]
    if one.prefix > one.classes:
        moved = d.clone()
        moved[:, 1:5] += torch.randn(64)
        again = module(one, other, moved, v)
        assert torch.equal(again[0], global_)
        assert torch.equal(again[1], visual)


@pytest.mark.parametrize("vfm", ["tiny", "registers", "bare"])
def test_the_pooling_head_takes_every_prefix(vfm):
    one, other = VisionEncoder(vfm, (16, 16)), VisionEncoder("bare", (16, 16))
    d, v = one.embed(torch.rand(2, 3, 16, 16)), other.embed(torch.rand(2, 3, 16, 16))
    global_, visual = PooledEmbedding(one, other, 64)(one, other, d, v)
    assert (global_.shape, visual.shape) == ((2, 1, 64), (2, 4, 64))


@pytest.mark.parametrize("vfm", ["registers", "bare"])
def test_mfuser_trains_with_a_tower_of_another_prefix(vfm):
    model = mfuser.build("mfuser", vfm=vfm, vlm="tiny", image_size=(64, 64), weights="random").train()
    labels = torch.zeros(2, 64, 64, dtype=torch.long)
    torch.stack(list(model.loss(Batch(torch.rand(2, 3, 64, 64), labels)).values())).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert model.eval()(torch.rand(1, 3, 64, 64)).shape == (1, 19, 64, 64)


@pytest.mark.parametrize("model", ["vit_tiny_patch16_dinov3_qkvb", "vit_wee_patch16_reg1_gap_256", "test_vit3"])
def test_a_model_of_timms_is_filled_from_its_file_and_its_positions_fitted(model, tmp_path):
    import timm
    from safetensors.torch import save_file

    # the file on the Hub has the model's own grid, a square, and a classifier
    theirs = timm.create_model(model, img_size=64, num_classes=10, dynamic_img_size=False)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.1)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    for size in ((64, 64), (32, 96)):
        tower = VisionEncoder(f"timm:{model}", size).eval()
        load_tower(f"timm:{model}", tmp_path / "model.safetensors", {"trunk": tower.trunk})
        if tower.trunk.pos_embed is None or size == (64, 64):
            expected = timm.create_model(model, img_size=size, num_classes=10, dynamic_img_size=False).eval()
            expected.load_state_dict(theirs.state_dict())
            images = torch.rand(1, 3, *size)
            tokens = tower.embed(images)
            for i in range(tower.depth):
                tokens = tower.block(i, tokens)
            wanted = expected.fc_norm(expected.forward_features((images - tower.mean) / tower.std))
            torch.testing.assert_close(tower.finish(tokens), wanted, rtol=1e-4, atol=1e-5)
        else:
            own = 0 if tower.trunk.no_embed_class else tower.prefix
            square = theirs.pos_embed[0, own:].T.reshape(1, -1, 4, 4)
            fitted = torch.nn.functional.interpolate(square, (2, 6), mode="bicubic", align_corners=False)
            torch.testing.assert_close(tower.trunk.pos_embed[0, own:], fitted.flatten(2)[0].T)
            assert torch.equal(tower.trunk.pos_embed[0, :own], theirs.pos_embed[0, :own])


def test_weights_of_every_tower_have_a_place():
    assert all(row.scratch == (row.weights is None) for row in TOWERS.values())
    assert [row.file for row in files("siglip2")] == ["open_clip_model.safetensors", "tokenizer.json"]
    # 303 M parameters of four bytes
    found = hub_file("timm:vit_large_patch16_dinov3.lvd1689m")
    assert (found.repo, found.file, found.gigabytes) == ("timm/vit_large_patch16_dinov3.lvd1689m", "model.safetensors", 1.2)
    tagless = hub_file("timm:vit_tiny_patch16_224")
    assert isinstance(tagless, HubFile)
    assert (tagless.size, tagless.licence) == ("23 MB", "apache-2.0")
    assert tagless.repo == "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    with pytest.raises(ValueError, match="timm has no weights of `vit_base_patch16_gap_224` on the Hub"):
        hub_file("timm:vit_base_patch16_gap_224")
    with pytest.raises(ValueError, match="unknown tower `dinov9`; choose from .*, or timm:<model>"):
        hub_file("dinov9")


def test_missing_weights_of_a_model_of_timms_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsNotFound, match="timm/vit_large_patch16_dinov3.lvd1689m/model.safetensors"):
        mfuser.build("mfuser", vfm="timm:vit_large_patch16_dinov3", vlm="siglip2")


def test_the_authors_released_none_of_the_other_pairs():
    weights = dict.fromkeys(description("layout_eva")["keys"], torch.zeros(1))
    with pytest.raises(ValueError, match=r"released no `mfuser` with dinov3_l \+ eva02; there are: dinov2_l \+ eva02, "):
        load_authors_checkpoint(full("eva02", "dinov3_l"), weights)
    with pytest.raises(ValueError, match=r"the authors released no `mfuser` with dinov2_l \+ siglip2"):
        load_authors_checkpoint(full("siglip2", "dinov2_l"), weights)
