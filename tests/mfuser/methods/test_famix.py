"""FAMix: network, patches, restyling, mixing and loss by recorded numbers; mining of styles, and what is trained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_files import FOLDER, noise, numbers
from named_weights import is_named, named_input, named_labels, named_tensor, sample_index
from torch import Tensor, nn
from torch.nn import functional as F

import mfuser
from mfuser.authors import load_authors_checkpoint, read_authors, recognise, release_of, sources_of, to_authors_state_dict
from mfuser.decoder.project_deeplab import ProjectDeepLabV3Plus
from mfuser.decoder.separable_deeplab import enlarged
from mfuser.methods.famix import SMOOTHING, FAMix
from mfuser.patch_styles import StyleBank, dominant, joined, mixed, patches, restyled, statistics
from mfuser.segmentor import CITYSCAPES, Batch
from mfuser.style_mining import STYLES, Miner

GOLDENS = numbers("famix")
LAYOUT = {key: tuple(shape) for key, (shape, _) in json.loads((FOLDER / "layout_famix_r101.json").read_text()).items()}
NONE = len(CITYSCAPES)


@dataclass
class Source:
    """Training data of noise, in batches of 8."""

    count: int = 5
    read: int = 0

    def batches(self, seed: int, *, augmented: bool = False) -> Iterator[Batch]:
        self.read += 1
        assert not augmented
        for _ in range(self.count):
            yield batch(8)


def batch(count: int = 2) -> Batch:
    labels = torch.zeros(count, 48, 48, dtype=torch.long)
    labels[:, 16:] = 13
    labels[:, 32:, 32:] = 255
    return Batch(torch.rand(count, 3, 48, 48), labels)


def begun(source: Source | None = None, **options: object) -> FAMix:
    torch.manual_seed(0)
    given = {"backbone": "tiny_clip_rn", "mining_steps": 2, "image_size": (48, 48)}
    model = mfuser.build("famix", **(given | options))
    assert isinstance(model, FAMix)
    model.enter_training()
    model.before_step(0, 10, source or Source())
    model.train()
    return model


def low() -> Tensor:
    return torch.from_numpy(named_input("famix.low", (2, 256, 192, 192), "image")).clamp(min=0)


def sampled(name: str, value: Tensor, count: int) -> Tensor:
    return value.flatten()[torch.from_numpy(sample_index(name, value.numel(), count))]


def test_parameters_are_as_many_as_the_authors_and_as_many_are_trained() -> None:
    model = mfuser.build("famix", weights="meta")
    count = {part: sum(p.numel() for p in module.parameters()) for part, module in model.named_children()}
    assert count == {"encoder": 42_519_392, "decoder": 16_253_299}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 20_715_891
    assert all(name.startswith(("encoder.trunk.layer4.2.", "decoder.")) for name in trained)
    assert not any(p.requires_grad for p in mfuser.build("famix", weights="meta", trained_from="none").encoder.parameters())


def test_names_and_shapes_are_those_of_the_authors_checkpoints() -> None:
    model = mfuser.build("famix", weights="meta")
    sources = sources_of(model, release_of(model), model.state_dict())
    assert {source.keys[0]: tuple(model.state_dict()[name].shape) for name, source in sources.items()} == LAYOUT


@pytest.mark.parametrize("backbone", ["clip_rn101", "clip_rn50"])
def test_a_checkpoint_is_known_and_all_of_it_is_used(backbone: str) -> None:
    model = mfuser.build("famix", backbone=backbone, weights="meta")
    theirs = to_authors_state_dict(model)
    ((method, release),) = recognise(theirs)
    assert (method, release.options) == ("famix", {"backbone": backbone})
    report = load_authors_checkpoint(model, theirs)
    assert (set(report.used), report.dead) == (theirs.keys(), ())
    with pytest.raises(ValueError, match=r"0 tensors missing \(\), 1 unknown \(backbone.attnpool.k_proj.bias\)"):
        load_authors_checkpoint(model, theirs | {"backbone.attnpool.k_proj.bias": torch.zeros(1)})


def test_a_file_of_the_authors_trainer_is_read(tmp_path: Path) -> None:
    state = {"backbone.bn3.weight": torch.ones(4)}
    content = {"cur_itrs": 3, "model_state": state, "optimizer_state": {"state": {}}, "best_score": np.float64(0.5)}
    torch.save(content, tmp_path / "best.pth")
    assert torch.equal(read_authors(tmp_path / "best.pth")["backbone.bn3.weight"], torch.ones(4))


@pytest.mark.full
def test_every_stage_with_weights_by_name_equals_the_authors() -> None:
    model = mfuser.build("famix", weights="meta")
    state = {
        name: torch.from_numpy(named_tensor(name, shape)) if is_named(name) else torch.zeros(shape, dtype=torch.int64)
        for name, shape in LAYOUT.items()
    }
    assert len(load_authors_checkpoint(model, state).used) == len(LAYOUT)
    goldens = numbers("famix_r101")
    image = torch.from_numpy(named_input("net.image", (2, 3, 64, 96)))
    with torch.no_grad():
        fine = model.encoder.from_normalised(image)
        coarse = model.encoder.high(fine)[-1]
        logits = enlarged(model.decoder(fine, coarse), image.shape[-2:])
    for name, value in (("low", fine), ("high", coarse)):
        torch.testing.assert_close(sampled(f"net.{name}", value, 4096), goldens[f"eval.{name}"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[:, :, ::8, ::8], goldens["eval.logits"], rtol=1e-4, atol=2e-4)


def test_the_decoder_is_the_authors() -> None:
    decoder = ProjectDeepLabV3Plus(256, 2048, NONE).eval()
    model = mfuser.build("famix", weights="meta")
    source = release_of(model).source
    state = {
        name: torch.from_numpy(named_tensor(source(f"decoder.{name}").keys[0], tuple(value.shape)))
        for name, value in decoder.state_dict().items()
        if value.dim()
    }
    decoder.load_state_dict(state, strict=False)
    with torch.no_grad():
        found = decoder(noise("head.low", 1, 256, 24, 24), noise("head.high", 1, 2048, 6, 6))
    torch.testing.assert_close(found, GOLDENS["head.out"], rtol=1e-4, atol=1e-5)


def test_restyled_patches_are_the_authors() -> None:
    # the recorded pin.mean and pin.std are those that the patches were given, not their own
    chosen = torch.cat(patches(low()))[[0, 4, 13]]
    found = sampled("pin.identity", restyled(chosen, *statistics(chosen)), 2048)
    torch.testing.assert_close(found, GOLDENS["pin.identity.samples"], rtol=1e-5, atol=1e-5)
    found = restyled(chosen, GOLDENS["pin.mean"][..., None, None], GOLDENS["pin.std"][..., None, None])
    torch.testing.assert_close(sampled("pin.restyled", found, 2048), GOLDENS["pin.restyled.samples"], rtol=1e-5, atol=1e-5)


def test_dominant_classes_are_the_authors() -> None:
    labels = torch.from_numpy(named_labels("famix.label", (2, 768, 768), 96)).long()
    assert torch.equal(dominant(labels, NONE), GOLDENS["mode.class"].long())


def test_mixed_styles_are_the_authors_also_of_a_class_without_any() -> None:
    bank = StyleBank(256)
    for number, name in enumerate((*CITYSCAPES, "255")):
        if name != "train":
            mean, deviation = noise(f"bank.{name}_mu", 1, 256), noise(f"bank.{name}_std", 1, 256).abs() + 0.1
            bank.add(mean, deviation, torch.tensor([number]))
    means, deviations, there = bank.drawn(GOLDENS["mix.patch_class"].long(), NONE)
    assert there.all()
    share = noise("mix.s", 2, 256)
    share = (share - share.min()) / (share.max() - share.min())
    found = mixed(low(), means, deviations, share)
    torch.testing.assert_close(sampled("mix", found, 4096), GOLDENS["mix.samples"], rtol=1e-5, atol=1e-5)
    found = mixed(low(), means, deviations, torch.zeros_like(share))
    torch.testing.assert_close(sampled("transfer", found, 4096), GOLDENS["transfer.samples"], rtol=1e-5, atol=1e-5)


def test_the_smoothed_loss_is_the_authors_over_labelled_pixels() -> None:
    logits = noise("famix.logits", 2, 19, 24, 24)
    labels = torch.from_numpy(named_labels("famix.lab", (2, 24, 24), 6)).long()
    total = F.cross_entropy(logits, labels, ignore_index=255, label_smoothing=SMOOTHING, reduction="sum")
    torch.testing.assert_close(total / (labels != 255).sum(), GOLDENS["ce.smoothed"][0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [(6, 9), (7, 11), (3, 5)])
def test_patches_of_every_size_join_to_the_map(size: tuple[int, int]) -> None:
    x = torch.rand(2, 4, *size)
    assert len(patches(x)) == 9
    assert torch.equal(joined(patches(x)), x)


def test_styles_are_drawn_of_the_class_that_is_wanted_and_missing_ones_are_told() -> None:
    bank = StyleBank(1)
    bank.add(torch.arange(6.0)[:, None], torch.ones(6, 1), torch.tensor([0, 1, 0, 1, 2, 0]))
    means, _, there = bank.drawn(torch.tensor([0, 1, 2] * 200).view(3, 200), none=NONE)
    assert there.all()
    wanted = torch.tensor([0, 1, 2] * 200)
    for number, styles in ((0, {0, 2, 5}), (1, {1, 3}), (2, {4})):
        assert set(means.flatten()[wanted == number].int().tolist()) == styles
    assert not bank.drawn(torch.tensor([7]), none=NONE)[2].any()


def test_each_batch_of_images_gives_a_style_for_each_class_of_its_patches() -> None:
    source = Source(count=5)
    bank = begun(source).training_only["bank"]
    assert source.read == 1
    assert bank.classes.tolist() == [0, 13, NONE] * 2  # 40 images: two times 16
    assert bank.means.shape == bank.deviations.shape == (6, 32)
    assert bank.means.isfinite().all()


def test_styles_are_mined_once() -> None:
    source = Source()
    model = begun(source)
    kept = model.training_only["bank"].means.clone()
    model.before_step(1, 10, source)
    assert source.read == 1
    assert torch.equal(model.training_only["bank"].means, kept)


def test_mining_brings_patches_nearer_to_the_texts() -> None:
    torch.manual_seed(0)
    model = mfuser.build("famix", backbone="tiny_clip_rn", image_size=(48, 48))
    miner = Miner("tiny_clip_rn", model.encoder.trunk, published=False)
    crops = [patch[:1] for patch in patches(miner.encoder.low(torch.rand(1, 3, 96, 96)))[:3]]
    texts = torch.stack([miner.read(f"{style} road", ["a photo of a {}."]) for style in STYLES[:3]])

    def nearness(steps: int) -> Tensor:
        means, deviations = miner.mined(crops, texts, steps)
        found = [
            restyled(crop, mean[None, :, None, None], deviation[None, :, None, None])
            for crop, mean, deviation in zip(crops, means, deviations, strict=True)
        ]
        embedded = miner.embedded(torch.cat([F.adaptive_avg_pool2d(x, (56, 56)) for x in found]))
        return F.cosine_similarity(embedded, texts).mean()

    assert nearness(20) > nearness(0) + 0.01
    assert all(torch.equal(a, b) for a, b in zip(model.encoder.parameters(), miner.encoder.parameters(), strict=True))


def test_the_loss_is_positive_and_moves_the_decoder_and_the_trained_blocks_alone() -> None:
    model = begun(trained_from="layer4")
    loss = model.loss(batch())["loss_seg"]
    assert loss.item() > 0
    loss.backward()
    moved = {
        name.partition(".layer")[2][:1] or name.partition(".")[0] for name, p in model.named_parameters() if p.grad is not None
    }
    assert moved == {"4", "decoder"}
    assert all(p.grad.abs().sum() > 0 for p in model.encoder.trunk.layer4[0].conv2.parameters())


def test_frozen_layers_keep_their_statistics() -> None:
    model = begun()
    norms = {name: m for name, m in model.encoder.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert {name.split(".")[1] for name, norm in norms.items() if not norm.training} == {"bn1", "bn2", "bn3", "layer1"}


def test_prompts_of_the_users_take_the_place_of_the_authors(tmp_path: Path) -> None:
    model = begun()
    assert len(model.styles) == 20
    (tmp_path / "styles.txt").write_text("snow style\n\nnight style\n")
    model.take_file("prompts", tmp_path / "styles.txt")
    assert model.styles == ("snow style", "night style")
    (tmp_path / "styles.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"styles.txt holds no line; write one style a line, such as `Ethereal Mist style`"):
        model.take_file("prompts", tmp_path / "styles.txt")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"trained_from": "layer1"},
            "trained_from is `layer1`; choose from none, layer2, layer3, layer4, or one of layer2.0,",
        ),
        ({"mining_steps": 0}, "mining_steps 0 must be at least 1"),
        ({"backbone": "resnet101"}, "backbone `resnet101` is no ResNet of CLIP's; choose from clip_rn50, clip_rn101"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        mfuser.build("famix", **({"backbone": "tiny_clip_rn"} | options))
