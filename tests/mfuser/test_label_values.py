"""What labels the losses take, and that all of them take the same."""

from __future__ import annotations

import pytest
import torch
from streams import with_extras
from torch import Tensor

import mfuser
from mfuser import methods
from mfuser.decoder.criterion import MaskCriterion, alignment_loss
from mfuser.labels import train_ids
from mfuser.segmentor import Batch

METHODS = methods.names()
LOGITS = torch.randn(2, 19, 4, 4, generator=torch.Generator().manual_seed(0))
MODELS: dict[str, mfuser.Segmentor] = {}


def model(name: str) -> mfuser.Segmentor:
    if name not in MODELS:
        MODELS[name] = mfuser.build(name, **methods.constants(name)["BACKBONES"][-1], image_size=(32, 32))
        MODELS[name].enter_training()
    return MODELS[name]


def by_model(name: str):
    return lambda labels: model(name).loss(with_extras(model(name), Batch(torch.full((len(labels), 3, 32, 32), 0.3), labels)))


def by_criterion(labels: Tensor) -> dict[str, Tensor]:
    size = len(labels)
    return MaskCriterion(points=64)([(torch.zeros(size, 19, 20), LOGITS[:size])], labels)


LOSSES = {
    **{name: by_model(name) for name in METHODS},
    "criterion": by_criterion,
    "alignment": lambda labels: {"loss": alignment_loss(LOGITS[: len(labels)], labels)},
}


def labels() -> Tensor:
    made = torch.randint(0, 19, (2, 32, 32), generator=torch.Generator().manual_seed(1))
    made[:, :5] = 255
    return made


def value(name: str, given: Tensor) -> float:
    if name in METHODS:
        model(name)  # built before, which draws, too
    torch.manual_seed(0)
    if name in METHODS:
        model(name).enter_training()  # a dictionary changes with every step
    return torch.stack(list(LOSSES[name](given).values())).sum().item()


@pytest.mark.parametrize("name", LOSSES)
def test_labels_of_every_integer_type_cost_the_same(name):
    expected = value(name, labels())
    assert expected > 0
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert value(name, labels().to(dtype)) == expected
    inside = labels().where(labels() != 255, torch.tensor(3))
    assert value(name, inside.to(torch.int8)) == value(name, inside)


@pytest.mark.parametrize("strange", [-1, -100, 19, 33, 254, 256])
@pytest.mark.parametrize("name", LOSSES)
def test_a_label_that_is_no_class_is_refused_by_every_loss(name, strange):
    given = labels().int()
    given[1, 20, 20] = strange
    with pytest.raises(ValueError, match=f"labels hold {strange}; allowed are train ids 0..18, and 255 for what is to be"):
        value(name, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_labels_that_are_no_integers_are_refused_by_every_loss(name, dtype):
    with pytest.raises(TypeError, match=f"labels must be integers, got {dtype}; allowed are torch.uint8, "):
        value(name, labels().to(dtype))


def test_many_strange_labels_are_not_all_listed_and_shapes_are_named():
    with pytest.raises(ValueError, match=r"labels hold 19, 20, 21, 22, 23, \.\.\.; allowed"):
        train_ids(torch.arange(256).view(1, 16, 16), 19)
    with pytest.raises(ValueError, match=r"labels are \(4, 4\), expected \(B, H, W\)"):
        train_ids(torch.zeros(4, 4, dtype=torch.long), 19)
    with pytest.raises(TypeError, match="got ndarray"):
        train_ids(torch.zeros(1, 4, 4, dtype=torch.long).numpy(), 19)


def test_the_loss_is_torchs_cross_entropy_of_the_labelled_pixels():
    given, tiny = labels(), model("source-only")
    images = torch.rand(2, 3, 32, 32)
    expected = torch.nn.functional.cross_entropy(tiny(images), given, ignore_index=255)
    torch.testing.assert_close(tiny.loss(Batch(images, given.byte()))["loss_seg"], expected)


@pytest.mark.parametrize("name", ["criterion", "alignment"])
def test_no_image_costs_nothing(name):
    assert all(float(term) == 0 for term in LOSSES[name](labels()[:0]).values())
