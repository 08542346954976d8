"""What makes scores of masks in a prepared copy, against the model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mfuser
from mfuser import methods
from mfuser.fast import compiled, scored

QUERIES = {"mfuser": 19, "tqdm": 19, "rein": 100}


def build(name: str) -> Any:
    torch.manual_seed(0)
    options = {**methods.module(name).BACKBONES[-1], "image_size": (64, 96)}
    return mfuser.build(name, **options).eval().requires_grad_(False)


@pytest.mark.parametrize("name", QUERIES)
def test_a_layer_makes_the_scores_of_the_model(name):
    model, generator = build(name), torch.Generator().manual_seed(1)
    logits = torch.randn(2, QUERIES[name], 20, generator=generator)
    masks = 4 * torch.randn(2, QUERIES[name], 16, 24, generator=generator)
    before = model.scored(logits, masks)
    assert before.shape == (2, 19, 64, 96)
    assert scored.take(model)
    assert torch.equal(model.scored(logits, masks), before)
    torch._dynamo.reset()
    assert compiled.compile_layers(model, (scored.Score,)) == 1
    with compiled.compiling(), torch.no_grad():
        torch.testing.assert_close(model.scored(logits, masks), before, rtol=1e-4, atol=1e-5)


def test_a_model_without_masks_is_left_alone():
    model = mfuser.build("linear", vfm="tiny", image_size=(64, 64))
    assert not scored.take(model)
