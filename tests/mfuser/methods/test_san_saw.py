"""SAN-SAW: norms, regions, whitening and weights of classes by recorded numbers, its network, and what a training of it needs."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from golden_files import FOLDER, noise, numbers, relative_error
from named_weights import is_named, named_input, named_tensor, sample_index
from torch import Tensor
from torch.nn import functional as F

import mfuser
from mfuser.authors import load_authors_checkpoint, recognise, to_authors_state_dict
from mfuser.decoder.deeplab import resized
from mfuser.decoder.semantic import SemanticNorm, above_lowest, grouped, ranked, whitening_loss
from mfuser.methods.san_saw import SELECTED, SanSaw, class_weights, weighted
from mfuser.segmentor import Batch

GOLDENS = numbers("san_saw")
LAYOUT = {name: tuple(shape) for name, (shape, _) in json.loads((FOLDER / "layout_san_saw_r101.json").read_text()).items()}
SHARED = ("classifier_1.bias", "classifier_1.weight", "classifier_2.bias", "classifier_2.weight")
X = noise("san.x", 2, 16, 20, 24)
LOGITS = 2 * noise("san.logits", 2, 19, 20, 24)


def labels() -> Tensor:
    found = GOLDENS["san.label"].long()
    return torch.where(found < 0, 255, found)


def norm(*, clustered: bool) -> SemanticNorm:
    module = SemanticNorm(16, SELECTED, clustered=clustered)
    names = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    module.load_state_dict({name: torch.from_numpy(named_tensor(f"SAN_stage_1.{name}", shape)) for name, shape in names.items()})
    return module


def built(**options: str) -> SanSaw:
    torch.manual_seed(0)
    model = mfuser.build("san-saw", backbone="tiny_resnet", image_size=(64, 64), **options)
    assert isinstance(model, SanSaw)
    model.enter_training()
    return model.train()


def batch() -> Batch:
    return Batch(torch.rand(2, 3, 64, 64), torch.randint(0, 19, (2, 64, 64)))


def test_the_norm_is_the_authors() -> None:
    assert relative_error(GOLDENS, "san.out_released", norm(clustered=False)(X, LOGITS)) < 1e-5


def test_with_regions_it_is_that_of_the_authors_text() -> None:
    assert relative_error(GOLDENS, "san.out_paper", norm(clustered=True)(X, LOGITS)) < 1e-5


def test_with_regions_and_one_convolution_it_is_the_authors_code_when_repaired() -> None:
    module = norm(clustered=True)
    for branch in module.CFR_branches[1:]:
        branch.load_state_dict(module.CFR_branches[0].state_dict())
    assert relative_error(GOLDENS, "san.out_kmeans", module(X, LOGITS)) < 1e-5


def test_regions_are_those_that_were_recorded() -> None:
    branch, shares = norm(clustered=True).CFR_branches[0], LOGITS.softmax(1)
    for i, label in enumerate(SELECTED):
        share = shares[:, [label]]
        x = X * share
        heat = (x * branch(torch.cat([x.mean(1, True), x.amax(1, True), share], 1)).sigmoid()).mean(1)
        assert torch.equal(above_lowest(heat), GOLDENS["san.region_masks"][:, i].float())


def test_clusters_are_the_best_of_all() -> None:
    values = noise("clusters", 14).sort().values.double()

    def cost(bounds: tuple[int, ...]) -> float:
        return sum(float((part - part.mean()).square().sum()) for part in values.tensor_split(bounds))

    best = min(itertools.combinations(range(1, 14), 4), key=cost)
    order = torch.randperm(14)
    assert torch.equal(above_lowest(values[order]), (torch.arange(14) >= best[0])[order].double())


def test_the_target_and_the_distance_to_it_are_the_authors() -> None:
    module = norm(clustered=False)
    target = module.target(X, labels())
    assert relative_error(GOLDENS, "san.target", target) < 1e-5
    torch.testing.assert_close(F.smooth_l1_loss(module(X, LOGITS), target), GOLDENS["san.smooth_l1"][0], rtol=1e-5, atol=0)


def test_groups_of_channels_and_their_whitening_are_the_authors() -> None:
    weights = torch.from_numpy(named_tensor("classifier_1.weight", (19, 20, 1, 1)))[:, :, 0, 0]
    assert torch.equal(ranked(weights[list(SELECTED)].abs()), GOLDENS["saw.index"].long())
    groups = grouped(1.5 * noise("saw.x", 2, 20, 9, 11), weights, SELECTED)
    torch.testing.assert_close(groups.flatten(1, 2), GOLDENS["saw.sorted"], rtol=1e-5, atol=1e-6)
    assert whitening_loss(groups) == GOLDENS["saw.loss"][0] == 0  # within the margin
    torch.testing.assert_close(whitening_loss(6 * groups), GOLDENS["saw.loss_sorted_x6"][0], rtol=1e-5, atol=0)


def test_weights_of_classes_and_the_weighted_loss_are_the_authors() -> None:
    weights = class_weights(labels(), 19)
    torch.testing.assert_close(weights, GOLDENS["ce.weights"], rtol=1e-6, atol=0)
    found = weighted(noise("san.ce_logits", 2, 19, 80, 96), labels(), weights)
    torch.testing.assert_close(found, GOLDENS["ce.loss"][0], rtol=1e-5, atol=0)


def test_parameters_are_as_many_as_the_authors() -> None:
    parameters = list(mfuser.build("san-saw", weights="meta").parameters())
    assert sum(p.numel() for p in parameters) == 44_619_324
    assert sum(p.numel() for p in parameters if not p.requires_grad) == 128  # the published norm of the stem, which is unused


def test_names_and_shapes_are_those_of_the_authors_checkpoints() -> None:
    theirs = to_authors_state_dict(mfuser.build("san-saw", weights="meta"))
    assert {name: tuple(value.shape) for name, value in theirs.items()} == LAYOUT


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("backbone", ["resnet101", "resnet50"])
def test_a_checkpoint_is_known_bare_and_from_data_parallel(backbone: str, prefix: str) -> None:
    model = mfuser.build("san-saw", backbone=backbone, weights="meta")
    theirs = {prefix + name: value for name, value in to_authors_state_dict(model).items()}
    ((method, release),) = recognise(theirs)
    assert (method, release.options) == ("san-saw", {"backbone": backbone})
    assert load_authors_checkpoint(model, theirs).dead == tuple(prefix + name for name in SHARED)


def test_a_checkpoint_that_does_not_fit_is_refused_by_name() -> None:
    model = mfuser.build("san-saw", weights="meta")
    theirs = to_authors_state_dict(model)
    del theirs["in1.bias"]
    with pytest.raises(ValueError, match=r"1 tensors missing \(in1.bias\), 1 unknown \(in2.bias\)"):
        load_authors_checkpoint(model, theirs | {"in2.bias": torch.zeros(64)})


@pytest.mark.full
def test_maps_and_scores_with_weights_by_name_equal_the_authors() -> None:
    expected = numbers("san_saw_r101")
    model = mfuser.build("san-saw", weights="meta")
    assert isinstance(model, SanSaw)
    empty = torch.zeros((), dtype=torch.int64)
    load_authors_checkpoint(model, {k: torch.from_numpy(named_tensor(k, s)) if is_named(k) else empty for k, s in LAYOUT.items()})
    with torch.no_grad():
        seen = model.see(torch.from_numpy(named_input("net.image", (2, 3, 64, 96))), normalised=True)
        found = [*seen.logits, model.layer5(seen.third), seen.last]
    for i, logits in enumerate(found, 1):
        torch.testing.assert_close(resized(logits, (64, 96))[:, :, ::8, ::8], expected[f"eval.x{i}"], rtol=1e-4, atol=2e-3)
    for i in (1, 2):
        for name, value in ((f"l{i}_in", seen.before[i - 1]), (f"l{i}_out", seen.behind[i - 1])):
            places = torch.from_numpy(sample_index(f"net.{name}", value.numel(), 4096))
            torch.testing.assert_close(value.flatten()[places], expected[f"eval.{name}"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("variant", "term", "moved"),
    [
        ("release", "loss_seg", "layer6.conv2d_list.1.weight"),
        ("release", "stage1.loss_seg", "classifier_1.weight"),
        ("release", "stage2.loss_seg", "classifier_2.weight"),
        ("release", "stage1.loss_norm", "SAN_stage_1.IN.weight"),
        ("release", "stage2.loss_norm", "encoder.trunk.conv1.0.weight"),
        ("paper", "stage1.loss_whitening", "SAN_stage_1.CFR_branches.3.weight"),
        ("paper", "stage2.loss_whitening", "encoder.trunk.conv1.0.weight"),
    ],
)
def test_each_term_is_positive_and_moves_a_parameter(variant: str, term: str, moved: str) -> None:
    model = built(variant=variant)
    with torch.no_grad():  # beyond the margin of whitening
        model.SAN_stage_1.IN.weight.fill_(6)
        model.SAN_stage_2.IN.weight.fill_(6)
    loss = model.loss(batch())[term]
    assert loss.item() > 0
    loss.backward()
    grad = model.get_parameter(moved).grad
    assert grad is not None
    assert grad.abs().sum() > 0


def test_the_release_has_no_whitening() -> None:
    assert not [name for name in built().loss(batch()) if "whitening" in name]


@pytest.mark.parametrize("variant", ["release", "paper"])
def test_what_is_trained_is_what_the_losses_reach(variant: str) -> None:
    model = built(variant=variant)
    torch.stack(list(model.loss(batch()).values())).sum().backward()
    assert [name for name, p in model.named_parameters() if (p.grad is None) == p.requires_grad] == []


def test_images_of_a_batch_are_scored_alone_but_for_the_papers_clusters() -> None:
    images = torch.rand(2, 3, 64, 64)
    for variant in ("release", "paper"):
        model = built(variant=variant).eval()
        with torch.no_grad():
            alone = torch.cat([model(image[None]) for image in images])
            assert torch.allclose(model(images), alone, rtol=1e-4, atol=1e-4) or model.mixes_batch
        assert model.mixes_batch == (variant == "paper")


def test_classifiers_of_the_first_stages_do_not_move_the_trunk() -> None:
    model = built()
    model.loss(batch())["stage1.loss_seg"].backward()
    assert all(p.grad is None for p in model.encoder.parameters())


def test_without_labels_the_cross_entropy_is_zero() -> None:
    given = batch()
    given.labels.fill_(255)
    assert built().loss(given)["loss_seg"] == 0


def test_images_are_given_to_the_trunk_as_caffe_has_them() -> None:
    found = built().encoder.normalised(torch.tensor([1.0, 0.5, 0.0]).view(1, 3, 1, 1))
    torch.testing.assert_close(found.flatten(), torch.tensor([-104.007, 127.5 - 116.669, 255 - 122.679]), rtol=1e-5, atol=1e-4)


def test_any_size_becomes_scores_of_its_own_size() -> None:
    with torch.no_grad():
        assert built().eval()(torch.rand(1, 3, 71, 130)).shape == (1, 19, 71, 130)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ValueError, match="variant `sane` is unknown; choose from release, paper"):
        mfuser.build("san-saw", backbone="tiny_resnet", variant="sane")
    with pytest.raises(ValueError, match="backbone `dinov2_s` is no ResNet; choose from"):
        mfuser.build("san-saw", backbone="dinov2_s")
