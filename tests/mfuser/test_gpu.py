"""What runs on a GPU gives the CPU's numbers."""

from __future__ import annotations

import pytest
import torch

import mfuser
from mfuser import methods
from mfuser.segmentor import Batch

pytestmark = pytest.mark.gpu


@pytest.fixture
def model():
    torch.manual_seed(0)
    return mfuser.build("mfuser", vfm="tiny", vlm="tiny", image_size=(64, 64), patch=8).eval()


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 19, (2, 8, 8), generator=generator).repeat_interleave(8, 1).repeat_interleave(8, 2)
    return Batch(torch.rand(2, 3, 64, 64, generator=generator), labels)


def given(output: int, kind: str, shape: tuple[int, int, int], like: torch.Tensor) -> torch.Tensor:
    """The same points on every device."""
    generator = torch.Generator().manual_seed(output + 100 * (kind == "over"))
    return torch.rand(shape, generator=generator).to(like.device)


def test_scores_losses_and_gradients_equal_the_cpus(model, batch, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    results = {}
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad()
        here = Batch(batch.images.to(device), batch.labels.to(device))
        with torch.no_grad():
            scores = model(here.images)
        terms = model.loss(here, draw=given)
        sum(terms.values()).backward()
        norms = {name: p.grad.norm().cpu() for name, p in model.named_parameters() if p.grad is not None}
        results[device] = scores.cpu(), {k: v.detach().cpu() for k, v in terms.items()}, norms
    for cpu, cuda in zip(results["cpu"], results["cuda"], strict=True):
        torch.testing.assert_close(cuda, cpu, rtol=2e-3, atol=1e-4)


def test_training_in_bf16_keeps_losses_finite_and_weights_in_fp32(model, batch):
    model.cuda().train()
    with torch.autocast("cuda", torch.bfloat16):
        terms = model.loss(Batch(batch.images.cuda(), batch.labels.cuda()))
    sum(terms.values()).backward()
    assert all(torch.isfinite(value) for value in terms.values())
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


def tiny(name: str) -> mfuser.Segmentor:
    torch.manual_seed(0)
    return mfuser.build(name, **methods.module(name).BACKBONES[-1], image_size=(64, 64), weights="random")


@pytest.mark.parametrize("name", methods.names())
def test_every_method_scores_as_on_a_cpu(name, batch, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = tiny(name).eval()
    scores = []
    for device in ("cpu", "cuda"):
        with torch.no_grad():
            scores.append(model.to(device)(batch.images.to(device)).cpu())
    torch.testing.assert_close(scores[1], scores[0], rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("name", methods.names())
def test_every_method_trains_in_bf16(name, batch):
    model = tiny(name).cuda().train()
    if model.extras:
        pytest.skip("needs images besides the batch")
    model.enter_training()
    model.cuda()
    with torch.autocast("cuda", torch.bfloat16):
        terms = model.loss(Batch(batch.images.cuda(), batch.labels.cuda()))
    sum(terms.values()).backward()
    assert all(torch.isfinite(value) for value in terms.values())
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
