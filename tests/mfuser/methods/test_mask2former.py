"""The method mask2former: what of the tower learns, and how fast."""

from __future__ import annotations

import pytest

import mfuser
from dgbench.engine.optim import groups
from dgbench.recipe import load_recipe


def test_with_adapter_none_the_decoder_alone_learns():
    model = mfuser.build("mask2former", vfm="tiny", adapter="none", image_size=(64, 64)).train()
    assert not any(p.requires_grad for p in model.vfm.parameters())
    assert not model.vfm.training
    assert all(p.requires_grad for p in model.decoder.parameters())


def test_the_tower_of_a_full_fine_tuning_has_a_tenth_of_the_learning_rate():
    recipe = load_recipe("mask2former/dinov2-gta")
    model = mfuser.build("mask2former", **recipe.method.options, weights="meta")
    rows, _ = groups(model, recipe.optim)
    rates = {id(p): (row["lr"], row["weight_decay"]) for row in rows for p in row["params"]}
    assert rates[id(model.vfm.trunk.blocks[3].attn.qkv.weight)] == (pytest.approx(1e-5), 0.05)
    assert rates[id(model.vfm.trunk.blocks[3].norm1.weight)] == (pytest.approx(1e-5), 0.0)
    assert rates[id(model.decoder.mask_decoder.cls_embed.weight)] == (pytest.approx(1e-4), 0.05)
    for spared in (model.decoder.queries.query_feat, model.decoder.queries.query_embed, model.decoder.mask_decoder.level_embed):
        assert rates[id(spared.weight)] == (pytest.approx(1e-4), 0.0)


def test_an_adapter_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="adapter `lora` is unknown; choose from full, none"):
        mfuser.build("mask2former", vfm="tiny", adapter="lora")
