"""MFuser at base size: two 768-wide towers of 12 blocks, for GPUs of 8 to 24 GB."""

from __future__ import annotations

import pytest
import torch

import mfuser
from mfuser.segmentor import Batch


@pytest.mark.full
def test_the_base_pair_trains_its_adapters_and_decoder_alone() -> None:
    torch.manual_seed(0)
    model = mfuser.build("mfuser", vfm="dinov2_b", vlm="clip_b", image_size=(64, 64), mask_points=512, weights="random").train()
    assert (model.vfm.dim, model.vfm.depth) == (model.vlm.dim, model.vlm.depth) == (768, 12)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for step in range(2):
        images, labels = torch.rand(2, 3, 64, 64), torch.randint(0, 19, (2, 64, 64), dtype=torch.uint8)
        loss = sum(model.loss(Batch(images, labels, {}, step, 2)).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert all(torch.isfinite(torch.tensor(losses)))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("adapters.11.") for name in moved)
    assert any(name.startswith("mask_decoder.") for name in moved)
    assert not [name for name in moved if name.startswith(("vfm.", "vlm.", "text.tower."))]
