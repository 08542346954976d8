"""Models in other types than fp32, and copies of models that have run."""

from __future__ import annotations

import copy

import pytest
import torch
from streams import with_extras
from torch import Tensor

import mfuser
from mfuser import methods
from mfuser.segmentor import Batch
from mfuser.towers.vit import VisionEncoder

IDS = [[1] * 5] * 19
# every method at its tiniest, then towers of our own and timm's rotary ones: EVA's fixed table, DINOv3's, and one that is learned
TINY = {f"{name} tiny": (name, methods.constants(name)["BACKBONES"][-1]) for name in methods.names()}
MODELS = TINY | {
    "mfuser bidir": ("mfuser", {"vfm": "tiny", "vlm": "tiny", "fuser": "mvfuser_bidir"}),
    "mfuser attention": ("mfuser", {"vfm": "tiny", "vlm": "tiny", "fuser": "bi_deform_attn", "variant": "sane"}),
    "mfuser small": ("mfuser", {"vfm": "small", "vlm": "small"}),
    "source small": ("source-only", {"backbone": "small"}),
    "source eva": ("source-only", {"backbone": "timm:eva02_tiny_patch14_224"}),
    "source dinov3": ("source-only", {"backbone": "timm:vit_tiny_patch16_dinov3_qkvb"}),
    "source learned": ("source-only", {"backbone": "timm:vit_small_patch16_rope_mixed_224"}),
}
# relative L2 error that rounding may cause; bf16 has 8 bits, fp16 11
ROUNDING = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-5}


def build(name: str) -> mfuser.Segmentor:
    method, options = MODELS[name]
    torch.manual_seed(0)
    made = mfuser.build(method, **options, image_size=(32, 32), weights="random")
    made.enter_training()
    return made.eval()


def batch() -> Batch:
    labels = torch.randint(0, 19, (2, 4, 4)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    return Batch(torch.rand(2, 3, 32, 32), labels)


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


CASES = [(name, dtype) for name in MODELS for dtype in ROUNDING if dtype == torch.bfloat16 or name in TINY]


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_a_model_of_another_type_scores_as_in_fp32(name, dtype):
    model = build(name)
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        other = copy.deepcopy(model).to(dtype)
        scores = other(images.to(dtype))
        assert torch.equal(other(images), scores) or dtype != torch.float64  # images of fp32, too
    assert scores.dtype == dtype
    assert (scores.double() - expected.double()).norm() < ROUNDING[dtype] * expected.double().norm()


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_model_of_another_type_trains(name, dtype):
    model = build(name).train().to(dtype)
    total(model.loss(with_extras(model, batch()))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def held(model: torch.nn.Module) -> list[str]:
    """Attributes of modules that are tensors with a graph."""
    return [
        f"{name}.{key}"
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, Tensor) and not value.is_leaf
    ]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_has_trained_keeps_nothing_of_the_pass_and_can_be_copied(name):
    model = build(name)
    given = with_extras(model, batch())
    loss = total(model.train().loss(given))
    assert held(model) == []
    again = copy.deepcopy(model)
    loss.backward()
    copy.deepcopy(model)
    model.eval()
    again.eval()
    with torch.no_grad():
        assert torch.equal(model(given.images), again(given.images))


@pytest.mark.parametrize("name", ["timm:eva02_tiny_patch14_224", "timm:vit_small_patch16_rope_mixed_224", "tiny"])
def test_a_table_given_to_the_blocks_is_the_one_that_they_would_make(name):
    size = (56, 84) if "eva02" in name else (64, 96)
    tower = VisionEncoder(name, size).eval()
    if any(p.is_meta for p in tower.parameters()):
        from mfuser.towers.loading import fill

        fill(tower)
    tokens, rope = tower.embed(torch.rand(1, 3, *size)), tower.rope()
    assert (rope is None) == (name == "tiny")
    for i in range(2):
        assert torch.equal(tower.block(i, tokens, rope), tower.block(i, tokens))
