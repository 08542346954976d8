"""SoMA against numbers recorded from the authors' code (tests/goldens/README.md), its average, and the authors' files."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from golden_files import numbers, relative_error
from named_weights import named_input, named_tensor
from safetensors.torch import load_file, save_file
from torch import Tensor

import mfuser
from dgbench.cost.counted import Subject, made_now
from dgbench.engine import checkpoints
from dgbench.engine.train import train
from dgbench.progress import Silent
from dgbench.recipe import load_method, load_recipe
from mfuser.authors import load_authors_checkpoint, recognise, sources_of, to_authors_state_dict
from mfuser.decoder.neck import bilinear_scales
from mfuser.decoder.sizes import SIZES
from mfuser.lowrank import LowRankLinear, add_low_rank
from mfuser.methods import releases
from mfuser.segmentor import Batch
from mfuser.towers.loading import fill
from mfuser.towers.table import TOWERS, HubFile
from mfuser.towers.vit import VisionEncoder

MASK_TOKEN = 1024  # the authors count DINOv2's, which no image reaches and this tower has not


def small(**options: object) -> mfuser.Segmentor:
    torch.manual_seed(0)
    return mfuser.build("soma", **{"vfm": "tiny", "image_size": (64, 64), **options})


def labelled() -> Batch:
    labels = torch.zeros(2, 64, 64, dtype=torch.long)
    labels[:, 32:, :32], labels[:, :, 48:] = 13, 255
    return Batch(torch.rand(2, 3, 64, 64), labels)


# ---- the authors' toy model


def named(prefix: str, name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of ours by the authors' names, who have queries, keys and values apart."""
    if "qkv" not in name:
        return torch.from_numpy(named_tensor(prefix + name, shape))
    return torch.cat([named(prefix, name.replace("qkv", part), (shape[0] // 3, *shape[1:])) for part in "qkv"])


def adapted() -> tuple[VisionEncoder, dict[str, LowRankLinear]]:
    """Their tower, and its adapted layers by name; the terms are zero."""
    encoder = VisionEncoder("dinov2_s", (64, 64), patch=16, embed_dim=32, depth=4, num_heads=2).eval()
    fill(encoder)
    for name, parameter in encoder.trunk.named_parameters():
        parameter.data = named("backbone.", name, tuple(parameter.shape))
    add_low_rank(encoder.trunk.blocks[1:], 4, 4.0)
    encoder.requires_grad_(False)
    return encoder, {name: layer for name, layer in encoder.trunk.named_modules() if isinstance(layer, LowRankLinear)}


def maps(encoder: VisionEncoder) -> list[Tensor]:
    images = torch.from_numpy(named_input("soma/image", (1, 3, 64, 64))) * encoder.std + encoder.mean
    return encoder.tapped(images, range(4))


def test_in_the_papers_order_training_begins_with_the_published_tower():
    goldens = numbers("soma")
    encoder, layers = adapted()
    for layer in layers.values():
        layer.take_components(layer.weights())
        layer.weight -= layer.term()
    found = maps(encoder)
    for i, (one, resized) in enumerate(zip(found, bilinear_scales(found), strict=True)):
        assert relative_error(goldens, f"model.feat{i}", one) < 1e-5
        assert relative_error(goldens, f"model.out{i}", resized) < 1e-5
    for name, part in {"attn.q": slice(32), "attn.proj": slice(None), "mlp.fc1": slice(None), "mlp.fc2": slice(None)}.items():
        term = layers[f"blocks.2.{name.replace('attn.q', 'attn.qkv')}"].term()[part]
        assert relative_error(goldens, f"model.block2.{name}.delta", term) < 1e-5, name


def test_in_the_released_order_it_begins_with_parts_of_random_weights_beside_the_published():
    goldens = numbers("soma")
    encoder, layers = adapted()
    for name, layer in layers.items():
        layer.take_components(named("random.", f"{name}.weight", tuple(layer.weight.shape)).chunk(layer.parts))
    for i, one in enumerate(maps(encoder)):
        assert relative_error(goldens, f"repo_order.feat{i}", one) < 1e-5


def test_released_factors_and_biases_over_the_published_tower_give_the_authors_maps():
    goldens = numbers("soma")
    encoder, layers = adapted()
    source = releases("soma")[0].source
    for name, layer in layers.items():
        for ours, tensor in layer.named_parameters():
            if ours == "weight":
                continue
            # the toy's adapted blocks are 1 to 3; those of the release have two digits, too
            keys = source(f"vfm.trunk.{name.replace('blocks.', 'blocks.2')}.{ours}").keys
            values = [key.replace("blocks.2", "blocks.") for key in keys]
            shape = (len(tensor) // len(keys), *tensor.shape[1:])
            value = torch.cat([torch.from_numpy(named_tensor(key, shape)) for key in values])
            tensor.copy_(value if ours == "bias" else 0.5 * value)
    for i, one in enumerate(maps(encoder)):
        assert relative_error(goldens, f"released.feat{i}", one) < 1e-5


# ---- the model


@pytest.fixture(scope="module")
def full_size() -> mfuser.Segmentor:
    return mfuser.build("soma", weights="meta")


def test_at_full_size_as_many_parameters_learn_as_the_authors(full_size):
    learns = {name: p.numel() for name, p in full_size.named_parameters() if p.requires_grad}
    tower = {name: n for name, n in learns.items() if name.startswith("vfm.")}
    assert sum(n for name, n in tower.items() if "lora" in name) == 4_718_592
    assert sum(n for name, n in tower.items() if name.endswith(".bias")) == 147_456
    assert sum(tower.values()) + MASK_TOKEN == 4_867_072
    assert sum(n for name, n in learns.items() if name.startswith("decoder.")) == 20_565_204


def test_at_full_size_the_blocks_from_the_eighth_on_learn_in_every_linear_layer(full_size):
    layers = {name for name, layer in full_size.vfm.trunk.named_modules() if isinstance(layer, LowRankLinear)}
    assert layers == {f"blocks.{i}.{kind}" for i in range(8, 24) for kind in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}


def test_the_groups_of_the_optimizer_are_the_authors(full_size):
    from dgbench.engine.optim import groups

    recipe = load_recipe("soma/dinov2_l-gta", check_method=False)
    rows, _ = groups(full_size, recipe.optim)
    assert sorted((row["lr"], row["weight_decay"]) for row in rows) == [(5e-5, 0.05), (1e-4, 0.0), (1e-4, 0.05)]
    names = {id(p): name for name, p in full_size.named_parameters()}
    spared = {names[id(p)] for row in rows if not row["weight_decay"] for p in row["params"]}
    assert {f"decoder.queries.query_{kind}.weight" for kind in ("feat", "embed")} < spared
    assert "decoder.pixel_decoder.level_encoding.weight" not in spared


@pytest.mark.parametrize("vfm", ["dinov2_s", "dinov2_b", "eva02_l_mim", "dinov3_l"])
def test_every_adapted_layer_of_a_tower_takes_part(vfm):
    model = mfuser.build("soma", vfm=vfm, weights="meta").to("meta")
    layers = [layer for layer in model.modules() if isinstance(layer, LowRankLinear)]
    called = []
    for layer in layers:
        layer.register_forward_hook(lambda layer, *_: called.append(layer))
    with torch.no_grad():
        model.features(torch.empty(1, 3, 512, 512, device="meta"))
    assert {id(layer) for layer in called} == {id(layer) for layer in layers} != set()


def test_the_tower_is_frozen_but_for_terms_and_biases_unless_it_starts_from_nothing():
    frozen = small(freeze_towers=True).train()
    learns = {name for name, p in frozen.vfm.named_parameters() if p.requires_grad}
    assert all(re.search(r"blocks\.[12]\.(attn|mlp)\..*\.(lora_[ab]|bias)$", name) for name in learns)
    assert not frozen.vfm.training
    whole = small().train()
    assert all(p.requires_grad for name, p in whole.vfm.named_parameters() if not name.startswith("trunk.norm."))
    assert whole.vfm.training


def test_every_loss_term_moves_the_terms_beside_the_tower():
    model = small(freeze_towers=True).train()
    terms = model.loss(labelled())
    assert len(terms) == 12
    first = model.layers[0]
    for name, term in terms.items():
        # the classes of the queries as they are learned, of which no image knows
        moved = [model.decoder.queries.query_feat.weight] if name == "decode.d0.loss_cls" else [first.lora_a, first.lora_b]
        assert term > 0, name
        assert all(gradient.any() for gradient in torch.autograd.grad(term, moved, retain_graph=True)), name


def test_the_variants_begin_as_they_say():
    plain = small(variant="sane")
    changed = small()
    for ours, theirs in zip(plain.layers, changed.layers, strict=True):
        whole = ours.weight + ours.term()
        torch.testing.assert_close(whole, theirs.weight, msg="the same tower was drawn")
        for matrix, term in zip(whole.chunk(ours.parts), ours.term().chunk(ours.parts), strict=True):
            values = torch.linalg.svdvals(matrix)
            torch.testing.assert_close(torch.linalg.svdvals(term)[:16], values[-16:], rtol=1e-3, atol=1e-5)
        # of a random matrix, uniform in +-1 / sqrt(in)
        drawn = torch.linalg.svdvals(torch.empty(1000, theirs.in_features).uniform_(-1, 1) / theirs.in_features**0.5)
        assert 0 < torch.linalg.matrix_norm(theirs.term(), 2) < drawn[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"variant": "paper"}, "variant `paper` is unknown; choose from release, sane"),
        ({"ema_momentum": 0.0}, "ema_momentum 0 is not in 0..1"),
        ({"first_block": 3}, "first_block 3 leaves none of the 3 blocks of `tiny` to adapt"),
        ({"rank": 100}, "rank 100 is not one of 1..64"),
    ],
)
def test_options_that_make_no_model_are_refused(options, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        small(**options)


# ---- merged


def test_a_merged_model_gives_the_same_scores_and_is_not_saved(tmp_path: Path):
    model = small()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        apart = model(images)
        assert model.merge()
        torch.testing.assert_close(model(images), apart, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="save the model before merge"):
        mfuser.save(model, tmp_path / "model")


def test_a_profile_counts_the_merged_tower_and_the_terms_among_the_parameters():
    ours = made_now(Subject(load_method("soma", {"vfm": "tiny"}), (64, 64)))
    plain = made_now(Subject(load_method("mask2former", {"vfm": "tiny"}), (64, 64)))
    assert ours.counted.total == plain.counted.total
    terms = sum(p.numel() for name, p in small().named_parameters() if "lora" in name)
    assert ours.held[0].parameters == plain.held[0].parameters + terms


# ---- the moving average

SMALL = [
    "method.vfm=tiny",
    "data.size=[64, 128]",
    "data.crop=[64, 64]",
    "data.train_images=4",
    "train.batch_size=2",
    "train.steps=4",
]


class _Stopped(Silent):
    left = 3

    def advance(self, n: int = 1, **_: float) -> None:
        self.left -= n
        if not self.left:
            raise KeyboardInterrupt


def test_a_training_scores_its_average_and_goes_on_from_its_weights_bit_for_bit(tmp_path: Path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        settings = [*SMALL, "train.checkpoint_every=1", "method.ema_start=1", "method.ema_momentum=0.25"]
        recipe = load_recipe("streets/soma", settings)
        train(recipe, tmp_path / "whole", progress=Silent(), device="cpu")
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "part", progress=_Stopped(), device="cpu")
        assert checkpoints.newest(tmp_path / "part")[1] < 4
        train(recipe, tmp_path / "part", progress=Silent(), device="cpu", resume=True)
        plain = load_recipe("streets/soma", [*SMALL, "train.checkpoint_every=1"])
        train(plain, tmp_path / "plain", progress=Silent(), device="cpu")
    finally:
        torch.set_num_threads(threads)
    whole, part, unaveraged = (checkpoints.folder_of(tmp_path / run) for run in ("whole", "part", "plain"))
    for name in ("model.safetensors", "training.safetensors"):
        assert (whole / name).read_bytes() == (part / name).read_bytes(), name
    scored, trained = load_file(whole / "model.safetensors"), load_file(whole / "training.safetensors")
    raw = load_file(unaveraged / "model.safetensors")
    assert torch.equal(trained["training_only.average.values.0"], next(iter_trained(raw)))
    assert not torch.equal(next(iter_trained(scored)), next(iter_trained(raw)))
    assert scored.keys() == raw.keys()


def iter_trained(state: dict[str, Tensor]):
    """The tensors of a tiny model's state that are trained, in its order of parameters."""
    return (state[name] for name, p in small().named_parameters() if p.requires_grad)


# ---- the authors' files


def written(model: mfuser.Segmentor, which: int) -> dict[str, Tensor]:
    """The keys of a release's files, with the shapes of a model's tensors."""
    state = model.state_dict()
    found: dict[str, Tensor] = {}
    for name, source in sources_of(model, releases("soma")[which], state).items():
        found |= source.write(state[name])
    return found


@pytest.mark.parametrize("which", [0, 2], ids=["apart", "in one"])
def test_a_released_file_holds_factors_biases_and_head(full_size, which):
    keys = set(written(full_size, which))
    factors = {key for key in keys if ".lora_" in key}
    layers = ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert factors == {
        f"backbone.model.blocks.{i}.{layer}.lora_{part}.weight" for i in range(8, 24) for layer in layers for part in "AB"
    }
    tower = {key for key in keys - factors if key.startswith("backbone.")}
    assert all(key.startswith("backbone.model.") and key.endswith(".bias") for key in tower)
    assert {"backbone.model.patch_embed.proj.bias", "backbone.model.norm.bias", "backbone.model.blocks.23.attn.k.bias"} < tower
    assert ("backbone.model.blocks.0.attn.k.bias" in tower) == (which == 0)
    head = keys - factors - tower
    assert all(key.startswith("decode_head.") for key in head)
    assert "decode_head.query_feat.weight" in head


@pytest.mark.parametrize("which", range(4))
def test_every_kind_of_file_is_told_and_used_to_the_last_tensor(full_size, which):
    release = releases("soma")[which]
    theirs = written(full_size, which) | {"backbone.model.mask_token": torch.empty(1, 1024, device="meta")}
    assert recognise(theirs) == [("soma", release)]
    if not release.absent:
        model = mfuser.build("soma", weights="meta")
        report = load_authors_checkpoint(model, theirs)
        assert set(report.used) == theirs.keys() - {"backbone.model.mask_token"}
        assert report.dead == ("backbone.model.mask_token",)


def test_a_released_file_is_added_to_the_published_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The tower is DINOv2-L with few channels, saved as the Hub has it."""
    size = {"embed_dim": 32, "num_heads": 2}
    row = replace(TOWERS["dinov2_l"], options=size, width=32, weights=HubFile("made/small", "model.safetensors", 0.001))
    monkeypatch.setitem(TOWERS, "dinov2_l", row)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    published = timm.create_model("vit_large_patch14_dinov2", num_classes=0, img_size=64, patch_size=16, **size).state_dict()
    for place in ("refs", "snapshots/any"):
        (tmp_path / "models--made--small" / place).mkdir(parents=True)
    (tmp_path / "models--made--small" / "refs" / "main").write_text("any")
    save_file(published, tmp_path / "models--made--small" / "snapshots" / "any" / "model.safetensors")

    model = mfuser.build("soma", image_size=(64, 64), **SIZES["tiny"])
    theirs = {key: torch.randn(value.shape) / 10 for key, value in written(model, 0).items()}
    report = load_authors_checkpoint(model, theirs)
    assert set(report.used) == theirs.keys()
    model.merge()
    for ours, keys in (("mlp.fc1", ["mlp.fc1"]), ("attn.qkv", ["attn.q", "attn.k", "attn.v"])):
        layer = model.vfm.trunk.get_submodule(f"blocks.9.{ours}")
        names = [f"backbone.model.blocks.9.{key}" for key in keys]
        added = [theirs[f"{name}.lora_B.weight"] @ theirs[f"{name}.lora_A.weight"] for name in names]
        torch.testing.assert_close(layer.weight, published[f"blocks.9.{ours}.weight"] + torch.cat(added))
        assert torch.equal(layer.bias, torch.cat([theirs[f"{name}.bias"] for name in names]))
    assert torch.equal(model.vfm.trunk.blocks[3].norm1.bias, theirs["backbone.model.blocks.3.norm1.bias"])
    assert torch.equal(model.vfm.trunk.blocks[3].norm1.weight, published["blocks.3.norm1.weight"])


def test_an_adapted_models_tensors_are_written_by_the_authors_names(full_size):
    assert to_authors_state_dict(full_size).keys() == written(full_size, 0).keys()


def test_released_factors_are_not_put_beside_weights_that_they_were_taken_out_of():
    model = mfuser.build("soma", variant="sane", weights="meta")
    with pytest.raises(ValueError, match="those of variant `release`, not of `sane`, from whose tower"):
        to_authors_state_dict(model)
