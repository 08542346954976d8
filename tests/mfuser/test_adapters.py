"""Rein's and SET's adapters against numbers recorded from the authors' code (tests/goldens/README.md)."""

from __future__ import annotations

import math

import pytest
import torch
from golden_files import fill_by_name, noise, numbers, relative_error
from torch import Tensor

from mfuser.adapters import Reins, SpectralReins


def filled(adapter: Reins) -> Reins:
    fill_by_name(adapter, "backbone.reins")
    return adapter


def rein(kind: str = "lora") -> Reins:
    return filled(Reins(3, 32, tokens=10, rank=4 if kind == "lora" else None, query_dim=16))


def spectral(*, spatial: bool = False) -> SpectralReins:
    adapter = SpectralReins(3, 32, grid=(3, 4), spatial=spatial, tokens=10, rank=4, query_dim=16)
    filled(adapter)
    return adapter


def with_class_token(adapter: Reins, layer: int, tokens: Tensor) -> Tensor:
    return torch.cat([tokens[:, :1], adapter(layer, tokens[:, 1:])], 1)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_reins_refine_tokens_as_the_authors_do(kind):
    goldens, adapter = numbers("rein"), rein(kind)
    tokens = noise(f"rein/{kind}/feats", 2, 13, 32)
    assert relative_error(goldens, f"{kind}.delta_layer1_NBC", adapter.delta(1, tokens[:, 1:]).transpose(0, 1)) < 1e-6
    assert relative_error(goldens, f"{kind}.no_cls_layer0", adapter(0, tokens)) < 1e-6
    for layer in range(3):
        tokens = with_class_token(adapter, layer, tokens)
        assert relative_error(goldens, f"{kind}.feats_after_{layer}", tokens) < 1e-6


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_reins_make_the_authors_queries(kind):
    assert relative_error(numbers("rein"), f"{kind}.queries", rein(kind).queries()) < 1e-6


def test_reins_have_the_papers_number_of_parameters():
    assert sum(p.numel() for p in Reins(24, 1024).parameters()) == 2_990_081
    assert sum(p.numel() for p in SpectralReins(24, 1024, grid=(32, 32)).parameters()) == 7_546_881


def test_reins_are_drawn_as_the_authors_draw_them():
    torch.manual_seed(0)
    adapter = SpectralReins(2, 1024, grid=(32, 32))
    bounds = {"learnable_tokens_a": 128, "learnable_tokens_b": 128, "learnable_tokens2": 1024}
    for name, fan in bounds.items():
        bound = math.sqrt(6 / (768 + fan))
        assert 0.99 * bound < getattr(adapter, name).abs().max() <= bound
    assert adapter.scale.item() == pytest.approx(0.001)
    # kaiming_uniform(a=sqrt 5)
    assert 0.99 / 32 < adapter.mlp_delta_f2.weight.abs().max() <= 1 / 32


@pytest.mark.parametrize("batch", [1, 2])
def test_spectral_tokens_refine_phase_and_amplitude_as_the_authors_do(batch):
    goldens, adapter = numbers("set"), spectral()
    tokens = noise(f"set/feats_b{batch}", batch, 13, 32)
    phase, amplitude = adapter.spectrum(tokens[:, 1:])
    assert relative_error(goldens, f"b{batch}.phase_NBC", phase) < 1e-5
    assert relative_error(goldens, f"b{batch}.amp_NBC", amplitude) < 1e-5
    assert relative_error(goldens, f"b{batch}.roundtrip_NBC", adapter.inverse(phase, amplitude).transpose(0, 1)) < 1e-5
    new_phase, new_amplitude = adapter.changed(0, phase, amplitude)
    assert relative_error(goldens, f"b{batch}.delta_phase", new_phase) < 1e-5
    assert relative_error(goldens, f"b{batch}.delta_amp", new_amplitude) < 1e-5
    assert relative_error(goldens, f"b{batch}.delta", adapter.delta(0, tokens[:, 1:]).transpose(0, 1)) < 1e-5
    for layer in range(3):
        tokens = with_class_token(adapter, layer, tokens)
        assert relative_error(goldens, f"b{batch}.feats_after_{layer}", tokens) < 1e-5
    assert relative_error(goldens, f"b{batch}.queries", adapter.queries()) < 1e-6


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_the_releases_transforms_change_the_scale_by_the_batch(batch):
    patches = torch.randn(batch, 12, 32)
    adapter = spectral()
    torch.testing.assert_close(adapter.inverse(*adapter.spectrum(patches)), patches * math.sqrt(batch / 2), rtol=1e-3, atol=1e-3)


def test_transforms_over_the_image_plane_give_the_patches_back_and_leave_images_apart():
    adapter, patches = spectral(spatial=True), torch.randn(2, 12, 32)
    torch.testing.assert_close(adapter.inverse(*adapter.spectrum(patches)), patches, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(adapter(1, patches)[:1], adapter(1, patches[:1]), rtol=1e-3, atol=1e-3)


def test_spectral_tokens_compute_in_fp32_under_autocast():
    adapter, patches = spectral(), noise("set/feats_b2", 2, 13, 32)
    with torch.autocast("cpu", torch.bfloat16):
        found = adapter.delta(0, patches)
    assert torch.equal(found, adapter.delta(0, patches))


@pytest.mark.parametrize("kind", ["lora", "full", "release", "spatial"])
def test_every_parameter_of_an_adapter_learns(kind):
    adapter = rein(kind) if kind in ("lora", "full") else spectral(spatial=kind == "spatial")
    patches = noise("set/feats_b2", 2, 13, 32)[:, 1:]
    for layer in range(3):
        patches = adapter(layer, patches)
    (patches.square().sum() + adapter.queries().square().sum()).backward()
    assert all(p.grad is not None and p.grad.any() and torch.isfinite(p.grad).all() for p in adapter.parameters())
