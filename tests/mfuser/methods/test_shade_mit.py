"""SHADE on MiT: its distance of features by recorded numbers, its losses, the choice of its basis, its checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from golden_files import FOLDER, noise, numbers
from named_weights import named_labels

import mfuser
from mfuser.authors import load_authors_checkpoint, recognise, to_authors_state_dict
from mfuser.methods.shade import root_distance
from mfuser.segmentor import Batch, Segmentor


@dataclass
class Source:
    """Training data of a few batches of noise, which counts how often it is read."""

    read: int = 0

    def batches(self, seed: int, *, augmented: bool = False) -> Iterator[Batch]:
        self.read += 1
        assert augmented
        for _ in range(20):
            yield Batch(torch.rand(2, 3, 32, 32) * torch.rand(2, 3, 1, 1), torch.zeros(2, 32, 32, dtype=torch.long))


def begun(source: Source | None = None, **options: Any) -> Segmentor:
    torch.manual_seed(0)
    model = mfuser.build("shade", backbone="tiny_mit", image_size=(64, 64), **options)
    model.enter_training()
    model.before_step(0, 1000, source or Source())
    return model.train()


def batch() -> Batch:
    labels = torch.zeros(2, 64, 64, dtype=torch.long)
    labels[:, :32] = 13
    return Batch(torch.rand(2, 3, 64, 64), labels)


def test_the_distance_over_things_is_the_authors() -> None:
    labels = torch.from_numpy(named_labels("rc.label", (2, 128, 160), 48)).long()
    found = 0.005 * root_distance(noise("rc.student", 2, 24, 8, 10), noise("rc.teacher", 2, 24, 8, 10), labels)
    torch.testing.assert_close(found, numbers("shade")["rc.mit"][0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("term", "moved"),
    [
        ("loss_seg", "decoder.classifier.weight"),
        ("loss_style", "decoder.aspp.1.0.weight"),
        ("loss_retrospection", "encoder.trunk.stage4.block.0.mlp.fc2.weight"),
    ],
)
def test_each_term_is_positive_and_moves_a_parameter(term: str, moved: str) -> None:
    model = begun()
    with torch.no_grad():  # a trunk as it began is at no distance from the teacher
        model.get_parameter("encoder.trunk.stage4.patch_embed.proj.weight").mul_(1.5)
    loss = model.loss(batch())[term]
    assert loss.item() > 0
    loss.backward()
    grad = model.get_parameter(moved).grad
    assert grad is not None
    assert grad.abs().sum() > 0


def test_equal_features_have_no_distance_and_finite_gradients() -> None:
    features = torch.randn(2, 8, 2, 2, requires_grad=True)
    loss = root_distance(features, features.detach(), batch().labels)
    assert loss.item() == 0
    loss.backward()
    assert features.grad is not None
    assert (features.grad == 0).all()


def test_without_retrospection_there_is_neither_term_nor_teacher() -> None:
    model = begun(retrospection=False)
    assert set(model.loss(batch())) == {"loss_seg", "loss_style"}
    assert set(model.training_only) == {"styles"}


def test_the_basis_is_of_the_first_stage_and_chosen_every_so_many_steps() -> None:
    source = Source()
    model = begun(source, style_steps=30)
    assert model.training_only["styles"].means.shape == (32, 32)
    for step in range(1, 30):
        model.before_step(step, 31, source)
    assert source.read == 1
    model.before_step(30, 31, source)
    assert source.read == 2
    assert mfuser.options("shade")(backbone="mit_b5", image_size=(512, 512)).style_steps == 4000


def test_norms_have_no_weight_decay_and_batch_norms_have() -> None:
    model = begun()
    decayed = {id(p) for p in model.groups(1.0, 0.01)[0]["params"]}
    kept = {name for name, p in model.named_parameters() if p.requires_grad and id(p) not in decayed}
    assert kept == {name for name, _ in model.named_parameters() if "norm" in name and not name.startswith("training_only")}
    assert id(model.get_parameter("decoder.bottleneck.1.weight")) in decayed


def test_names_and_shapes_are_those_of_the_authors_checkpoints() -> None:
    layout = json.loads((FOLDER / "layout_shade_mitb5.json").read_text())
    model = mfuser.build("shade", backbone="mit_b5", weights="meta", image_size=(512, 512))
    assert sum(p.numel() for p in model.parameters()) == 85_155_283
    theirs = {key: tuple(value.shape) for key, value in to_authors_state_dict(model).items()}
    assert theirs == {f"model.{key}": tuple(shape) for key, (shape, _) in layout.items() if ".shm." not in key}


def test_a_checkpoint_with_basis_and_teacher_is_read_and_both_are_unused() -> None:
    model = mfuser.build("shade", backbone="mit_b5", weights="meta", image_size=(512, 512))
    unused = {f"model.backbone.shm.proto_{name}": torch.zeros(64, 64) for name in ("mean", "std")}
    unused |= {"imnet_model.backbone.norm1.weight": torch.zeros(64)}
    theirs = to_authors_state_dict(model) | unused
    ((method, release),) = recognise(theirs)
    assert (method, release.options, release.recipe) == ("shade", {"backbone": "mit_b5"}, "shade/mit_b5-gta")
    assert set(load_authors_checkpoint(model, theirs).dead) == set(unused)


def test_sizes_that_are_no_multiples_of_the_stride_are_refused() -> None:
    with pytest.raises(ValueError, match=r"image size \(64, 80\) must be multiples of 32, the stride of the features"):
        mfuser.build("shade", backbone="tiny_mit", image_size=(64, 80))
