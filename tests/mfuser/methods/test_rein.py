"""Rein against numbers and key names of the authors' code (tests/goldens/README.md)."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from golden_files import description, fill_by_name, noise, numbers, relative_error
from named_weights import named_input

import mfuser
from mfuser.adapters import Reins
from mfuser.authors import load_authors_checkpoint, recognise, release_of, sources_of, to_authors_state_dict
from mfuser.decoder.neck import bilinear_scales
from mfuser.segmentor import Batch
from mfuser.towers.loading import fill, fitted
from mfuser.towers.vit import VisionEncoder

IMAGENET_MEAN, IMAGENET_STD = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def small(**options: object) -> mfuser.Segmentor:
    torch.manual_seed(0)
    return mfuser.build("rein", **{"vfm": "tiny", "image_size": (64, 64), **options})


def labelled() -> Batch:
    labels = torch.zeros(2, 64, 64, dtype=torch.long)
    labels[:, 32:, :32], labels[:, :, 48:] = 13, 255
    return Batch(torch.rand(2, 3, 64, 64), labels)


def test_a_refined_tower_gives_the_authors_maps():
    goldens = numbers("rein")
    encoder = VisionEncoder("dinov2_s", (64, 64), patch=16, embed_dim=32, depth=4, num_heads=2).eval()
    reins = Reins(4, 32, tokens=10, rank=4, query_dim=16)
    fill(encoder)
    fill_by_name(encoder.trunk, "backbone")
    fill_by_name(reins, "backbone.reins")
    images = torch.from_numpy(named_input("rein/image", (2, 3, 64, 64))) * IMAGENET_STD + IMAGENET_MEAN
    with torch.no_grad():
        found = bilinear_scales(encoder.tapped(images, range(4), reins))
    for i, feature in enumerate(found):
        assert relative_error(goldens, f"backbone.feat{i}", feature) < 1e-5
    assert relative_error(goldens, "backbone.queries", reins.queries()) < 1e-6


@pytest.mark.parametrize(("grid", "name"), [((32, 32), "convert.pos_embed_512"), ((64, 64), "convert.pos_embed_1024")])
def test_positions_are_resampled_as_the_authors_convert_them(grid, name):
    target = torch.empty(1, grid[0] * grid[1] + 1, 4)
    found = fitted("dinov2_l", "pos_embed", noise("rein/dinov2_pos_embed", 1, 1370, 4), target, 1, grid)
    assert relative_error(numbers("rein"), name, found) < 1e-6


def test_patch_kernels_are_resampled_as_the_authors_convert_them():
    given = noise("rein/dinov2_patch_w", 4, 3, 14, 14)
    found = fitted("dinov2_l", "patch_embed.proj.weight", given, torch.empty(4, 3, 16, 16), 1)
    assert relative_error(numbers("rein"), "convert.patch_embed_16", found) < 1e-6


@pytest.fixture(scope="module")
def full_size() -> mfuser.Segmentor:
    return mfuser.build("rein", weights="meta")


def test_at_full_size_as_many_parameters_learn_as_the_authors(full_size):
    count = partial(sum, start=0)
    assert count(p.numel() for p in full_size.reins.parameters()) == 2_990_081
    head = [*full_size.decoder.parameters(), *full_size.querys2feat.parameters()]
    assert count(p.numel() for p in head) == 20_579_796
    assert count(p.numel() for p in full_size.parameters() if p.requires_grad) == 23_569_877
    assert not any(p.requires_grad for p in full_size.vfm.parameters())


def test_at_full_size_every_key_of_the_authors_has_its_tensor(full_size):
    layout = description("layout_rein")
    state = full_size.state_dict()
    found = {}
    for name, source in sources_of(full_size, release_of(full_size), state).items():
        (key,) = source.keys
        found[key] = list(state[name].shape)
    assert {key: list(shape) for key, shape in found.items()} == {key: list(shape) for key, shape in layout.items()}


def test_weight_decay_spares_what_the_authors_spare(full_size):
    names = {id(p): name for name, p in full_size.named_parameters()}
    decay, spared = ({names[id(p)] for p in group["params"]} for group in full_size.groups(1e-4, 0.05))
    assert {name for name in spared if name.startswith("reins.")} == {
        *("reins.learnable_tokens_a", "reins.learnable_tokens_b", "reins.scale")
    }
    assert "decoder.mask_decoder.level_embed.weight" in spared
    assert {"decoder.pixel_decoder.level_encoding.weight", "reins.mlp_delta_f.bias", "querys2feat.weight"} <= decay
    assert all(".gn." in name or "norm" in name or "level_embed" in name for name in spared if name.startswith("decoder."))


def test_the_tower_is_frozen_in_evaluation_mode_unless_it_starts_from_nothing():
    frozen = mfuser.build("rein", vfm="eva02_l_mim", weights="meta").train()
    assert not frozen.vfm.training
    assert frozen.reins.training
    assert not any(p.requires_grad for p in frozen.vfm.parameters())
    assert small().train().vfm.training
    assert not any(p.requires_grad for p in small(freeze_towers=True).vfm.parameters())


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_every_loss_term_moves_the_tokens(adapter):
    model = small(adapter=adapter, freeze_towers=True).train()
    tokens = model.reins.learnable_tokens if adapter == "full" else model.reins.learnable_tokens_a
    terms = model.loss(labelled())
    assert len(terms) == 12
    for name, term in terms.items():
        (gradient,) = torch.autograd.grad(term, [tokens], retain_graph=True)
        assert term > 0, name
        assert gradient.any(), name


def test_an_adapter_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="adapter `none` is unknown; choose from lora, full"):
        small(adapter="none")


def test_a_file_of_the_adapter_alone_may_be_of_any_tower_and_one_with_the_tower_of_its_kind():
    alone = dict.fromkeys(description("layout_rein"), torch.zeros(1))
    assert {(name, release.options["vfm"]) for name, release in recognise(alone)} == {
        *(("rein", tower) for tower in ("dinov2_l", "eva02_l_mim", "dinov2_b", "dinov2_s"))
    }
    with_eva = {**alone, "backbone.blocks.0.attn.q_bias": torch.zeros(1)}
    assert [(release.options["vfm"], release.absent) for _, release in recognise(with_eva)] == [("eva02_l_mim", ())]


def test_a_checkpoint_with_the_tower_is_read_and_written_whole():
    """Every tensor of a full-size file with the tower has its place; on shapes alone."""
    model = mfuser.build("rein", vfm="eva02_l_mim", weights="meta")
    theirs = {key: torch.empty(shape, device="meta") for key, shape in description("layout_rein").items()}
    release = next(r for r in mfuser.methods.releases("rein") if r.options["vfm"] == "eva02_l_mim" and not r.absent)
    for name, tensor in model.state_dict().items():
        for key in release.source(name).keys:
            theirs.setdefault(key, torch.empty(tensor.shape, device="meta"))
    theirs["backbone.rope.freqs_cos"] = torch.empty(1024, 64, device="meta")
    report = load_authors_checkpoint(model, theirs)
    assert report.dead == ("backbone.rope.freqs_cos",)
    written = set(theirs) - set(report.dead)
    assert set(report.used) == written
    assert "backbone.blocks.3.mlp.ffn_ln.weight" in written
    assert to_authors_state_dict(model).keys() == description("layout_rein").keys()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        # after the masked cross-attention, the self-attention, the feed-forward
        ("mask_decoder.layers.8.norm1.weight", "transformer_decoder.layers.8.norms.0.weight"),
        ("mask_decoder.layers.8.norm2.weight", "transformer_decoder.layers.8.norms.1.weight"),
        ("mask_decoder.layers.8.norm3.weight", "transformer_decoder.layers.8.norms.2.weight"),
        ("pixel_decoder.layers.5.norm1.bias", "pixel_decoder.encoder.layers.5.norms.0.bias"),
        ("pixel_decoder.layers.5.norm3.bias", "pixel_decoder.encoder.layers.5.norms.1.bias"),
        ("mask_decoder.layers.0.cross_attn.in_proj_bias", "transformer_decoder.layers.0.cross_attn.attn.in_proj_bias"),
        ("mask_decoder.layers.0.self_attn.in_proj_bias", "transformer_decoder.layers.0.self_attn.attn.in_proj_bias"),
    ],
)
def test_tensors_of_one_shape_have_the_authors_order(ours, theirs):
    release = mfuser.methods.releases("rein")[0]
    assert release.source(f"decoder.{ours}").keys == (f"decode_head.{theirs}",)
