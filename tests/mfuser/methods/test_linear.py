"""The linear head: what of it learns, and what it is made of."""

from __future__ import annotations

import torch

import mfuser
from mfuser.segmentor import Batch


def test_only_the_head_and_its_norm_learn_and_the_tower_stays_as_it_is():
    model = mfuser.build("linear", vfm="tiny", image_size=(64, 64)).train()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        *("norm.weight", "norm.bias", "head.weight", "head.bias")
    }
    before = {name: value.clone() for name, value in model.vfm.state_dict().items()}
    model.loss(Batch(torch.rand(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.long)))["loss_seg"].backward()
    assert not model.vfm.training
    assert all(torch.equal(value, before[name]) for name, value in model.vfm.state_dict().items())
    assert model.norm.running_mean.any()


def test_it_has_the_weights_of_dinov2s_linear_head():
    model = mfuser.build("linear", vfm="dinov2_l", weights="meta")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 2 * 1024 + 1024 * 19 + 19


def test_scores_are_linear_in_normalised_features():
    model = mfuser.build("linear", vfm="tiny", patch=16, image_size=(32, 32)).eval()
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        tokens = model.vfm.embed(images)
        for i in range(model.vfm.depth):
            tokens = model.vfm.block(i, tokens)
        features = model.vfm.finish(tokens)[0, model.vfm.prefix :]
        normed = (features - model.norm.running_mean) / (model.norm.running_var + 1e-5).sqrt()
        logits = normed @ model.head.weight[:, :, 0, 0].T + model.head.bias
        corner = model(images)[0, :, 0, 0]  # a corner of bilinear upsampling is the corner of the grid
    torch.testing.assert_close(corner, logits[0], rtol=1e-4, atol=1e-5)
