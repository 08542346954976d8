"""SHADE: styles, both consistencies and the choice of the basis by recorded numbers, and what its training keeps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from golden_files import noise, numbers
from named_weights import named_labels

import mfuser
from mfuser.authors import load_authors_checkpoint, recognise, to_authors_state_dict
from mfuser.methods.shade import SHADE, THINGS, divergence, farthest, majority, restyled, retrospection
from mfuser.segmentor import Batch

GOLDENS = numbers("shade")


@dataclass
class Source:
    """Training data of a few batches of noise, which counts how often it is read."""

    count: int = 40
    read: int = 0

    def batches(self, seed: int, *, augmented: bool = False) -> Iterator[Batch]:
        self.read += 1
        assert augmented
        for _ in range(self.count):
            yield Batch(torch.rand(2, 3, 32, 32) * torch.rand(2, 3, 1, 1), torch.zeros(2, 32, 32, dtype=torch.long))


def begun(source: Source | None = None) -> SHADE:
    torch.manual_seed(0)
    model = mfuser.build("shade", backbone="tiny_resnet", image_size=(64, 64))
    assert isinstance(model, SHADE)
    model.enter_training()
    model.before_step(0, 1000, source or Source())
    return model.train()


def batch() -> Batch:
    labels = torch.zeros(2, 64, 64, dtype=torch.long)
    labels[:, :32] = 13
    return Batch(torch.rand(2, 3, 64, 64), labels)


def test_the_basis_is_chosen_as_by_the_authors() -> None:
    points = noise("shade.style_points", 200, 32)
    assert torch.equal(farthest(points, 16, int(GOLDENS["fps.start"])), GOLDENS["fps.index"])


def test_hallucinated_styles_are_the_authors() -> None:
    x, weights = 1.2 * noise("shm.x", 3, 64, 8, 8) + 0.3, GOLDENS["shm.weights"]
    means, deviations = noise("shm.proto_mean", 64, 64), noise("shm.proto_std", 64, 64).abs() + 0.1
    torch.testing.assert_close(restyled(x, weights @ means, weights @ deviations), GOLDENS["shm.new"], rtol=1e-5, atol=1e-5)


def test_the_divergence_of_styles_is_the_authors() -> None:
    found = divergence(2 * noise("sc.logits", 2, 19, 10, 12), 2 * noise("sc.logits_new", 2, 19, 10, 12))
    torch.testing.assert_close(found, GOLDENS["sc.js"][0], rtol=1e-5, atol=1e-6)


def test_labels_of_cells_and_the_distance_over_things_are_the_authors() -> None:
    labels = torch.from_numpy(named_labels("rc.label", (2, 128, 160), 48)).long()
    small = majority(labels, 16, 19)
    assert torch.equal(small, GOLDENS["rc.label_small"][:, 0].long())
    assert torch.equal(torch.isin(small, torch.tensor(THINGS)), GOLDENS["rc.mask"].bool())
    found = retrospection(noise("rc.student", 2, 24, 8, 10), noise("rc.teacher", 2, 24, 8, 10), labels)
    torch.testing.assert_close(found, GOLDENS["rc.resnet"][0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("term", "moved"),
    [
        ("loss_seg", "decoder.final2.0.weight"),
        ("aux.loss_seg", "aux.4.weight"),
        ("loss_style", "decoder.final2.0.weight"),
        ("loss_retrospection", "encoder.trunk.layer4.0.downsample.0.weight"),
    ],
)
def test_each_term_is_positive_and_moves_a_parameter(term: str, moved: str) -> None:
    model = begun()
    with torch.no_grad():  # a trunk as it began is at no distance from the teacher
        model.encoder.trunk.layer4[0].downsample[0].weight.mul_(1.5)
    loss = model.loss(batch())[term]
    assert loss.item() > 0
    loss.backward()
    grad = model.get_parameter(moved).grad
    assert grad is not None
    assert grad.abs().sum() > 0


def test_inference_is_that_of_the_plain_network() -> None:
    model = begun().eval()
    plain = mfuser.build("erm", backbone="tiny_resnet", image_size=(64, 64))
    plain.load_state_dict(model.model_state())
    images = torch.rand(1, 3, 70, 90)
    with torch.no_grad():
        assert torch.equal(model(images), plain(images))


def test_the_basis_is_chosen_every_three_epochs_and_not_near_the_end() -> None:
    source = Source()
    model = begun(source)  # 80 images, 2 at a time: 40 steps an epoch
    assert source.read == 1
    chosen = model.training_only["styles"].means.clone()
    for step in range(1, 120):
        model.before_step(step, 1000, source)
    assert source.read == 1
    model.before_step(120, 1000, source)
    assert source.read == 2
    assert not torch.equal(chosen, model.training_only["styles"].means)
    model.before_step(960, 1000, source)
    assert source.read == 2
    assert model.training


def test_the_basis_holds_styles_of_source_images() -> None:
    model = begun()
    styles = model.training_only["styles"]
    assert styles.means.shape == (32, 32)
    assert (styles.deviations > 0).all()
    assert styles.means.unique(dim=0).shape[0] == 32


def test_the_teacher_stays_as_it_was() -> None:
    model = begun()
    assert not model.training_only["teacher"].training
    before = {name: value.clone() for name, value in model.training_only["teacher"].state_dict().items()}
    optimizer = torch.optim.SGD(model.groups(0.1, 5e-4), lr=0.1)
    torch.stack(list(model.loss(batch()).values())).sum().backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.training_only["teacher"].state_dict().items())


@pytest.mark.parametrize("backbone", ["resnet101", "resnet50"])
def test_a_checkpoint_with_a_basis_is_shades_and_the_basis_is_unused(backbone: str) -> None:
    model = mfuser.build("shade", backbone=backbone, weights="meta")
    basis = {f"module.SHM.proto_{name}": torch.zeros(64, 64) for name in ("mean", "std")}
    theirs = to_authors_state_dict(model) | basis
    ((method, release),) = recognise(theirs)
    assert (method, release.options) == ("shade", {"backbone": backbone})
    assert load_authors_checkpoint(model, theirs).dead == tuple(basis)


def test_sizes_that_are_no_multiples_of_the_stride_are_refused() -> None:
    with pytest.raises(ValueError, match=r"image size \(64, 70\) must be multiples of 16, the stride of the features"):
        mfuser.build("shade", backbone="tiny_resnet", image_size=(64, 70))
