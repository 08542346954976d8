"""TLDR: network, style transfer and texture losses by recorded numbers, and what its training keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from golden_files import FOLDER, fill_by_name, noise, numbers
from named_weights import is_named, named_input, named_tensor, sample_index
from torch import Tensor, nn
from typer.testing import CliRunner

import mfuser
from dgbench import cli
from mfuser.authors import load_authors_checkpoint, recognise, release_of, sources_of, to_authors_state_dict
from mfuser.methods.tldr import PIXEL, TLDR, changed, distance, generalisation, gram, regularisation
from mfuser.segmentor import Batch
from mfuser.style_transfer import PhotoWCT, pixel_wct, wct

GOLDENS = numbers("tldr")
SIZES = ((8, 16), (16, 8), (24, 4), (32, 4))  # channels and side of the recorded maps
LAYOUT = {f"model.{key}": tuple(shape) for key, (shape, _) in json.loads((FOLDER / "layout_tldr_r101.json").read_text()).items()}


def maps(role: str, factor: float) -> list[Tensor]:
    return [factor * noise(f"tldr.{role}.{i}", 2, c, side, side).clamp(min=0) for i, (c, side) in enumerate(SIZES)]


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def begun(**options: object) -> TLDR:
    torch.manual_seed(0)
    model = mfuser.build("tldr", backbone="tiny_resnet", image_size=(64, 64), **{"variant": PIXEL, **options})
    assert isinstance(model, TLDR)
    model.enter_training()
    model.train()
    return model


def batch() -> Batch:
    style = {"style": torch.rand(2, 3, 64, 64)}
    return Batch(torch.rand(2, 3, 64, 64), torch.randint(0, 19, (2, 64, 64)), style, step=1, steps=10)


def test_parameters_are_as_many_as_the_authors() -> None:
    model = mfuser.build("tldr", weights="meta")
    assert (parameters(model), parameters(model.encoder)) == (60_217_315, 42_519_392)
    assert all(p.requires_grad for p in model.parameters())
    assert parameters(PhotoWCT()) == 8_349_948


def test_names_and_shapes_are_those_of_the_authors_checkpoints() -> None:
    model = mfuser.build("tldr", weights="meta")
    sources = sources_of(model, release_of(model), model.state_dict())
    assert {source.keys[0]: tuple(model.state_dict()[name].shape) for name, source in sources.items()} == LAYOUT


@pytest.mark.parametrize("backbone", ["resnet101_v1c", "resnet50_v1c"])
def test_a_checkpoint_is_known_and_its_teacher_and_transfer_are_unused(backbone: str) -> None:
    model = mfuser.build("tldr", backbone=backbone, weights="meta")
    beside = ("imnet_model.backbone.stem.0.weight", "p_wct.e1.conv0.weight")
    theirs = to_authors_state_dict(model) | {name: torch.zeros(1) for name in beside}
    ((method, release),) = recognise(theirs)
    assert (method, release.options) == ("tldr", {"backbone": backbone})
    assert load_authors_checkpoint(model, theirs).dead == beside


def test_a_checkpoint_with_a_tensor_too_many_is_refused() -> None:
    theirs = {name: torch.empty(shape, device="meta") for name, shape in LAYOUT.items()} | {"model.aux.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"0 tensors missing \(\), 1 unknown \(model.aux.weight\)"):
        load_authors_checkpoint(mfuser.build("tldr", weights="meta"), theirs)


@pytest.mark.full
def test_every_stage_with_weights_by_name_equals_the_authors() -> None:
    model = mfuser.build("tldr", weights="meta")
    state = {}
    for name, shape in LAYOUT.items():
        bare = name.removeprefix("model.")
        state[name] = torch.from_numpy(named_tensor(bare, shape)) if is_named(bare) else torch.zeros(shape, dtype=torch.int64)
    assert len(load_authors_checkpoint(model, state).used) == len(LAYOUT)
    goldens = numbers("tldr_r101")
    with torch.no_grad():
        found = model.encoder.maps(model.encoder.stem(torch.from_numpy(named_input("net.image", (2, 3, 64, 96)))))
        logits = model.decoder(found[0], found[3])
    torch.testing.assert_close(logits[:, :, ::2, ::2], goldens["eval.logits_stride4"], rtol=1e-4, atol=2e-4)
    for i, value in enumerate(found, 1):
        samples = value.flatten()[torch.from_numpy(sample_index(f"net.c{i}", value.numel(), 4096))]
        torch.testing.assert_close(samples, goldens[f"eval.c{i}"], rtol=1e-4, atol=1e-4)


def test_gram_matrices_and_masks_are_the_authors() -> None:
    for i, (source, stylised) in enumerate(zip(maps("source", 1.0), maps("stylized", 1.2), strict=True)):
        torch.testing.assert_close(gram(source), GOLDENS[f"gram.source.{i}"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gram(stylised), GOLDENS[f"gram.stylized.{i}"], rtol=1e-5, atol=1e-6)
        assert torch.equal(changed(gram(stylised), gram(source), 0.1), GOLDENS[f"mask.{i}"].bool())


def test_texture_losses_are_the_authors() -> None:
    source, stylised, style, taught = (
        maps(role, factor) for role, factor in (("source", 1.0), ("stylized", 1.2), ("style", 1.1), ("imagenet", 0.9))
    )
    each = torch.stack([distance(gram(x) - gram(y)) for x, y in zip(source, taught, strict=True)])
    torch.testing.assert_close(each, GOLDENS["tr.per_layer"], rtol=1e-5, atol=1e-6)
    left = 1 - 10_000 / 40_000
    torch.testing.assert_close(left * regularisation(source, taught), GOLDENS["tr.total_iter10000"][0], rtol=1e-5, atol=0)
    found = left * generalisation(style[:2], stylised, source, 0.1)
    torch.testing.assert_close(found, GOLDENS["tg.total_iter10000"][0], rtol=1e-5, atol=0)


def test_the_transfer_network_is_the_authors() -> None:
    network = PhotoWCT()
    for level in (1, 2, 3, 4):
        fill_by_name(network.get_submodule(f"e{level}"), f"e{level}")
        fill_by_name(network.get_submodule(f"d{level}"), f"d{level}")
    image = torch.from_numpy(named_input("wct.image", (1, 3, 32, 40), "image"))
    with torch.no_grad():
        for level in (1, 2, 3, 4):
            found, pooled = network.get_submodule(f"e{level}")(image)
            assert list(found[-1].shape) == GOLDENS[f"vgg.e{level}.shape"].tolist()
            samples = found[-1].flatten()[torch.from_numpy(sample_index(f"vgg.e{level}", found[-1].numel(), 2048))]
            torch.testing.assert_close(samples, GOLDENS[f"vgg.e{level}.samples"], rtol=1e-5, atol=1e-5)
            back = network.get_submodule(f"d{level}")(found[-1], pooled)
            torch.testing.assert_close(back, GOLDENS[f"vgg.d{level}"], rtol=1e-5, atol=1e-5)


def test_whitening_and_colouring_is_the_authors() -> None:
    eye = torch.eye(8)
    content = (0.5 * noise("wct.mixc", 2, 8, 8) + eye) @ noise("wct.content", 2, 8, 100) + 0.5
    style = (0.4 * noise("wct.mixs", 2, 8, 8) + 0.7 * eye) @ noise("wct.style", 2, 8, 80) - 0.3
    torch.testing.assert_close(wct(content, style), GOLDENS["wct.out"], rtol=2e-4, atol=2e-4)


def test_pixels_get_mean_and_covariance_of_the_styles_colours() -> None:
    content, style = torch.rand(2, 3, 16, 16, dtype=torch.float64), torch.rand(2, 3, 12, 20, dtype=torch.float64).pow(3)
    found = pixel_wct(content, style)
    assert found.shape == content.shape
    for one, other in zip(found.flatten(2), style.flatten(2), strict=True):
        torch.testing.assert_close(one.mean(1), other.mean(1))
        torch.testing.assert_close(torch.cov(one), torch.cov(other))


@pytest.mark.parametrize(
    ("term", "moved"),
    [
        ("loss_seg", "decoder.classify.weight"),
        ("loss_stylised", "decoder.classify.weight"),
        ("loss_regularisation", "encoder.trunk.layer4.0.downsample.0.weight"),
        ("loss_generalisation", "encoder.trunk.layer2.0.downsample.0.weight"),
    ],
)
def test_each_term_is_positive_and_moves_a_parameter(term: str, moved: str) -> None:
    model = begun(threshold=0.001)
    loss = model.loss(batch())[term]
    assert loss.item() > 0
    loss.backward()
    grad = model.get_parameter(moved).grad
    assert grad is not None
    assert grad.abs().sum() > 0


def test_texture_losses_fade_linearly_and_the_others_do_not() -> None:
    model = begun(fade_steps=8)
    model.decoder.dropout.p = 0.0
    given = batch()
    given.step = 0
    first = model.loss(given)
    for step, left in ((2, 0.75), (8, 0.0), (9, 0.0)):
        given.step = step
        terms = model.loss(given)
        for name, value in terms.items():
            expected = first[name] * (left if name in ("loss_regularisation", "loss_generalisation") else 1)
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-7)


def test_the_transfer_network_is_read_from_a_file_and_kept_frozen(tmp_path: Path) -> None:
    model, other = begun(variant="release"), PhotoWCT()
    torch.save(other.state_dict(), tmp_path / "photo_wct.pth")
    model.take_file("transfer", tmp_path / "photo_wct.pth")
    mine = model.training_only["transfer"]
    assert all(torch.equal(value, mine.state_dict()[name]) for name, value in other.state_dict().items())
    assert not mine.training
    assert not any(p.requires_grad for p in mine.parameters())
    assert not any("transfer" in name for name in model.model_state())
    torch.save({"e1.conv0.weight": torch.zeros(3, 3, 1, 1)}, tmp_path / "photo_wct.pth")
    with pytest.raises(ValueError, match=r"photo_wct.pth is no PhotoWCT of 8,349,948 parameters: \S+ is missing"):
        model.take_file("transfer", tmp_path / "photo_wct.pth")


def test_a_training_without_the_file_is_refused_before_it_begins() -> None:
    asked = ["train", "streets/tldr", "--set", "method.variant=release", "--out", "unused"]
    done = CliRunner().invoke(cli.app, asked, prog_name="dgbench")
    assert done.exit_code == 1
    assert "`tldr` trains with the weights of PhotoWCT" in done.stderr
    assert "hint: --set data.extra.transfer=PATH; or --set method.variant=stm=pixel, another method" in done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"variant": "pixel"}, "variant `pixel` is unknown; choose from release, stm=pixel"),
        ({"original_weight": 1.5}, "original_weight is 1.5, expected 0 to 1"),
        ({"fade_steps": 0}, "fade_steps is 0, expected at least 1"),
        ({"backbone": "dinov2_s"}, "backbone `dinov2_s` is no ResNet"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        mfuser.build("tldr", **options)
