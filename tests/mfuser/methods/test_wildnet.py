"""WildNet: styles, contents and consistency by recorded numbers, its network's names, and what its training keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from golden_files import FOLDER, noise, numbers
from named_weights import is_named, named_input, named_labels, named_tensor, sample_index
from timm.models.resnet import Bottleneck
from torch import Tensor, nn
from torch.nn import functional as F

import mfuser
from mfuser.authors import load_authors_checkpoint, recognise, release_of, sources_of, to_authors_state_dict
from mfuser.methods.wildnet import Contents, WildNet, at_points, content_loss, divergence, through, with_style
from mfuser.segmentor import Batch

GOLDENS = numbers("wildnet")
BANK = ("module.wild_cont_dict", "module.wild_cont_dict_ptr")
# DistributedDataParallel puts `module.` before each name of the layout
_KEYS = json.loads((FOLDER / "layout_wildnet_r101.json").read_text())
LAYOUT = {f"module.{key}": tuple(shape) for key, (shape, _) in _KEYS.items()}


def begun() -> WildNet:
    torch.manual_seed(0)
    model = mfuser.build("wildnet", backbone="tiny_resnet", image_size=(64, 64))
    assert isinstance(model, WildNet)
    model.enter_training()
    return model.train()


def batch() -> Batch:
    return Batch(torch.rand(2, 3, 64, 64), torch.randint(0, 19, (2, 64, 64)), {"wild": torch.rand(2, 3, 64, 64)})


def points(features: Tensor, side: int) -> Tensor:
    return F.normalize(F.interpolate(features, (side, side)).flatten(2).transpose(1, 2), dim=-1)


def bank(name: str, channels: int, size: int, place: int = 0) -> Contents:
    contents = Contents(channels, size)
    contents.columns.copy_(F.normalize(noise(name, channels, size), dim=0))
    contents.next.fill_(place)
    return contents


def test_styles_are_the_authors() -> None:
    found = with_style(1.3 * noise("adain.content", 2, 8, 7, 9) + 0.4, 0.6 * noise("adain.style", 2, 8, 7, 9) - 0.2)
    torch.testing.assert_close(found, GOLDENS["adain.out"], rtol=1e-5, atol=1e-5)


def test_contents_their_nearest_ones_and_the_dictionary_are_the_authors() -> None:
    source = noise("cel.source", 2, 16, 20, 20)
    styled = points(0.8 * source + 0.6 * noise("cel.stylized", 2, 16, 20, 20), 64)
    contents = bank("cel.dictionary", 16, 1024, 768)
    nearest = torch.stack([contents.nearest(image) for image in styled])
    assert (nearest == GOLDENS["cel.nearest"]).float().mean() > 0.998  # recorded in half precision, where some are as near
    found = content_loss(points(source, 64), styled, at_points(GOLDENS["cel.label"].long(), 64), contents)
    expected = GOLDENS["cel.sce"][0], GOLDENS["cel.wce"][0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[0] + found[1], GOLDENS["cel.loss"][0], rtol=1e-4, atol=1e-5)
    contents.add(points(noise("cel.wild", 2, 16, 20, 20), 16).flatten(0, 1))
    assert contents.next == GOLDENS["cel.ptr_after"][0]
    places = torch.from_numpy(sample_index("cel.dictionary_after", 16384, 4096))
    torch.testing.assert_close(contents.columns.flatten()[places], GOLDENS["cel.dictionary_after"], rtol=1e-5, atol=1e-6)


def test_consistency_is_the_authors() -> None:
    found = divergence(2 * noise("scr.logits", 2, 19, 6, 7), 2 * noise("scr.logits_stylized", 2, 19, 6, 7))
    torch.testing.assert_close(found, GOLDENS["scr.loss"][0], rtol=1e-5, atol=1e-7)


def test_a_styled_block_and_its_norms_are_the_authors() -> None:
    """Three streams through one block, in evaluation and then in training mode: one update of each norm per stream."""
    block = Bottleneck(16, 4)
    block.act3 = nn.Identity()
    state = {f"layer1.2.{name}": tuple(value.shape) for name, value in block.state_dict().items() if value.dim()}
    block.load_state_dict({name[9:]: torch.from_numpy(named_tensor(name, shape)) for name, shape in state.items()}, strict=False)
    given = [noise(f"fs.{name}", 2, 16, 8, 8) for name in ("source", "wild", "stylized")]
    for mode in ("eval", "train"):
        block.train(mode == "train")
        found = through(block, *given, styles=True)
        for name, value in zip(("source", "wild", "stylized"), found, strict=True):
            torch.testing.assert_close(value, GOLDENS[f"fs.{mode}.{name}"], rtol=1e-4, atol=1e-5)
    for name in ("bn1", "bn2", "bn3"):
        value = block.get_submodule(name).running_mean
        torch.testing.assert_close(value, GOLDENS[f"fs.after.{name}.running_mean"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("backbone", "count"), [("resnet101", 64_205_126), ("resnet50", 45_212_998)])
def test_parameters_are_as_many_as_the_authors(backbone: str, count: int) -> None:
    assert sum(p.numel() for p in mfuser.build("wildnet", backbone=backbone, weights="meta").parameters()) == count


def test_names_and_shapes_are_those_of_the_authors_checkpoints() -> None:
    model = mfuser.build("wildnet", weights="meta")
    sources = sources_of(model, release_of(model), model.state_dict())
    found = {source.keys[0]: tuple(model.state_dict()[name].shape) for name, source in sources.items()}
    assert found == {name: shape for name, shape in LAYOUT.items() if name not in BANK}


@pytest.mark.parametrize("backbone", ["resnet101", "resnet50"])
def test_a_checkpoint_is_wildnets_and_its_dictionary_is_unused(backbone: str) -> None:
    model = mfuser.build("wildnet", backbone=backbone, weights="meta")
    theirs = to_authors_state_dict(model) | {BANK[0]: torch.zeros(256, 8), BANK[1]: torch.zeros(1)}
    ((method, release),) = recognise(theirs)
    assert (method, release.options) == ("wildnet", {"backbone": backbone})
    assert load_authors_checkpoint(model, theirs).dead == BANK


def test_a_checkpoint_whose_stem_has_a_norm_is_refused_by_name() -> None:
    names = LAYOUT | {"module.layer0.1.weight": (64,)}
    state = {name: torch.empty(shape, device="meta") for name, shape in names.items()}
    with pytest.raises(ValueError, match=r"0 tensors missing \(\), 1 unknown \(module.layer0.1.weight\)"):
        load_authors_checkpoint(mfuser.build("wildnet", weights="meta"), state)


@pytest.mark.full
def test_scores_losses_and_gradients_with_weights_by_name_equal_the_authors() -> None:
    expected = numbers("wildnet_r101")
    model = mfuser.build("wildnet", weights="meta", wild_images=4)
    state = {}
    for name, shape in LAYOUT.items():
        bare = name.removeprefix("module.")
        named = is_named(bare) and name not in BANK
        state[name] = torch.from_numpy(named_tensor(bare, shape)) if named else torch.zeros(shape, dtype=torch.int64)
    load_authors_checkpoint(model, state)
    assert isinstance(model, WildNet)
    model.enter_training()
    model.training_only["contents"] = bank("net.dictionary", 256, 1024)
    model.encoder.mean.zero_()  # the recorded images are normalised
    model.encoder.std.fill_(1)
    model.check_size = lambda images: None  # type: ignore[method-assign]
    images, wild = (torch.from_numpy(named_input(f"net.{name}", (2, 3, 64, 96))) for name in ("image", "wild"))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images)[:, :, ::8, ::8], expected["eval.logits"], rtol=1e-4, atol=2e-3)
    model.train()
    model.aux[3].p = 0.0  # as it was recorded
    labels = torch.from_numpy(named_labels("net.label", (2, 64, 96), 16)).long()
    terms = model.loss(Batch(images, labels, {"wild": wild}))
    t = {name: value.item() for name, value in terms.items()}
    found = [
        *(t["loss_seg"], t["aux.loss_seg"] / 0.4, (t["loss_source_content"] + t["loss_wild_content"]) / 0.1),
        *(t["styled.loss_seg"], t["styled.aux.loss_seg"] / 0.4, t["loss_consistency"] / 10, t["aux.loss_consistency"] / 4),
    ]
    torch.testing.assert_close(torch.tensor(found), expected["train.losses"], rtol=1e-3, atol=1e-4)
    total = torch.stack(list(terms.values())).sum()
    torch.testing.assert_close(total, expected["train.total"][0], rtol=1e-3, atol=1e-4)
    total.backward()
    ours = {
        "final2.0.weight": "decoder.final2.0.weight",
        "layer0.0.weight": "encoder.trunk.conv1.weight",
        "layer2.0.conv1.weight": "encoder.trunk.layer2.0.conv1.weight",
        "layer4.2.conv3.weight": "encoder.trunk.layer4.2.conv3.weight",
        "proj.0.weight": "proj.0.weight",
    }
    for theirs, name in ours.items():
        grad = model.get_parameter(name).grad
        assert grad is not None
        # in fp64 instead of fp32 they change by up to 1.9 %
        torch.testing.assert_close(grad.norm(), expected[f"grad.norm.{theirs}"][0], rtol=2e-2, atol=0)


@pytest.mark.parametrize(
    ("term", "moved"),
    [
        ("loss_seg", "decoder.final2.0.weight"),
        ("aux.loss_seg", "aux.4.weight"),
        ("styled.loss_seg", "decoder.final2.0.weight"),
        ("styled.aux.loss_seg", "aux.4.weight"),
        ("loss_source_content", "proj.0.weight"),
        ("loss_wild_content", "proj.0.weight"),
        ("loss_consistency", "decoder.final2.0.weight"),
        ("aux.loss_consistency", "aux.4.weight"),
    ],
)
def test_each_term_is_positive_and_moves_a_parameter_and_the_trunk(term: str, moved: str) -> None:
    model = begun()
    loss = model.loss(batch())[term]
    assert loss.item() > 0
    loss.backward()
    grads = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {moved, "encoder.trunk.conv1.0.weight"} <= grads


def test_without_labels_the_contents_are_no_loss() -> None:
    model, given = begun(), batch()
    given.labels.fill_(255)
    terms = model.loss(given)
    assert terms["loss_source_content"] == terms["loss_wild_content"] == 0
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_step_puts_the_wild_features_into_the_dictionary() -> None:
    model = begun()
    contents = model.training_only["contents"]
    before = contents.columns.clone()
    model.loss(batch())
    assert contents.next == 2 * 8 * 8
    changed = (contents.columns != before).any(0)
    assert changed[:128].all()
    assert not changed[128:].any()
    torch.testing.assert_close(contents.columns.norm(dim=0), torch.ones(2048))


def test_the_dictionary_is_kept_for_resuming_and_not_in_the_model_file() -> None:
    model, other = begun(), begun()
    model.loss(batch())
    other.load_training_state(model.training_state())
    assert torch.equal(other.training_only["contents"].columns, model.training_only["contents"].columns)
    assert other.training_only["contents"].next == 128
    assert not any("contents" in name for name in model.model_state())


def test_a_model_with_the_sizes_of_the_release_can_be_saved_and_loaded(tmp_path: Path) -> None:
    sizes = {"points": 64, "wild_points": 16, "wild_images": 1536}
    model = mfuser.build("wildnet", backbone="tiny_resnet", image_size=(64, 64), **sizes)
    loaded = mfuser.load(mfuser.save(model, tmp_path / "it"))
    assert loaded.options == model.options
    assert isinstance(loaded, WildNet)
    assert loaded.size == 393_216


def test_sizes_below_one_and_other_towers_are_refused() -> None:
    with pytest.raises(ValueError, match="points is 0, expected at least 1"):
        mfuser.build("wildnet", backbone="tiny_resnet", points=0)
    with pytest.raises(ValueError, match="backbone `dinov2_s` is no ResNet; choose from"):
        mfuser.build("wildnet", backbone="dinov2_s")
