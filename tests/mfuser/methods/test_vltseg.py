"""VLTSeg against its re-implementation: the tower's numbers, keys and shapes of its checkpoints, what is trained and how."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from golden_files import description, numbers
from named_weights import named_input, named_tensor
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import mfuser
from dgbench.engine.convert import convert
from dgbench.engine.optim import Rate, groups
from dgbench.recipe import load_recipe
from mfuser import methods
from mfuser.authors import load_authors_checkpoint, recognise, to_authors_state_dict
from mfuser.decoder.neck import four_scales, upsampling
from mfuser.decoder.sizes import SIZES
from mfuser.keys import Source
from mfuser.segmentor import Batch, Segmentor
from mfuser.towers.loading import fill
from mfuser.towers.table import TOWERS, HubFile
from mfuser.towers.vit import VisionEncoder

RELEASE = methods.releases("vltseg")[0]
EVA02, CLIP_B = "eva02_large_patch14_clip_224", "vit_base_patch16_clip_quickgelu_224"
SMALL = {"embed_dim": 64, "depth": 2, "num_heads": 2}
SIZE = (112, 112)
STATE = dict[str, Tensor]


def built(**options: object) -> Segmentor:
    return mfuser.build("vltseg", **{"weights": "random", "image_size": SIZE, **SIZES["tiny"], "backend": "torch", **options})


def source_of(name: str) -> Source:
    found = RELEASE.source(name)
    assert found is not None
    return found


def by_the_authors_names(module: nn.Module, prefix: str) -> None:
    """Give a part of the model values by the names of its tensors in a checkpoint."""
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            key = source_of(f"{prefix}.{name}").keys[0]
            value.copy_(torch.from_numpy(named_tensor(key, tuple(value.shape))).reshape(value.shape))


@pytest.mark.parametrize(("golden", "patch", "side", "more"), [("p14", 14, 70, 0), ("p16", 16, 80, 0), ("p14", 14, 70, 2)])
def test_tower_and_neck_give_the_re_implementations_numbers(golden: str, patch: int, side: int, more: int) -> None:
    expected = numbers("eva02_backbone")
    shape = (1 if more else 2, 3, side + more, side + more)
    encoder = VisionEncoder("eva02_l_224", shape[2:], patch=patch, embed_dim=64, depth=4, num_heads=4, ref_feat_shape=(4, 4))
    encoder.trunk.norm = nn.Identity()
    fill(encoder)
    neck = dict(zip(("fpn1", "fpn2"), upsampling(64), strict=True))
    for prefix, module in {"vfm.trunk": encoder.trunk, **neck}.items():
        by_the_authors_names(module.eval(), prefix)
    images = torch.from_numpy(named_input(f"eva02/{golden}" + ("_72" if more else ""), shape)) * encoder.std + encoder.mean
    with torch.no_grad():
        found = four_scales(encoder.tapped(images, (0, 1, 2, 3)), neck["fpn1"], neck["fpn2"])
    if more:  # pixels beyond the last whole patch are dropped
        torch.testing.assert_close(found[2], expected[f"{golden}.in72.feat2"], rtol=1e-5, atol=1e-5)
        return
    found[0] = found[0][:1, ::4]  # as the golden keeps it
    for i, one in enumerate(found):
        wanted = expected[f"{golden}.feat{i}"]
        assert (one - wanted).norm() / wanted.norm() < 1e-5, i
    sin, cos = encoder.rope().chunk(2, -1)
    torch.testing.assert_close(sin, expected[f"{golden}.rope_sin"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cos, expected[f"{golden}.rope_cos"], rtol=1e-5, atol=1e-6)


def test_keys_and_shapes_are_those_of_the_re_implementations_checkpoints() -> None:
    layout = description("layout_vltseg_eva02")
    written = to_authors_state_dict(mfuser.build("vltseg", weights="meta"))
    assert {key: list(value.shape) for key, value in written.items()} == {
        key: shape for key, shape in layout.items() if not RELEASE.is_dead(key)
    }
    assert {key.rpartition(".")[2] for key in layout if RELEASE.is_dead(key)} == {"freqs_cos", "freqs_sin"}
    at_1024 = mfuser.build("vltseg", weights="meta", image_size=(1024, 1024))
    assert to_authors_state_dict(at_1024)["backbone.pos_embed"].shape == (1, 5330, 1024)


def test_its_checkpoints_are_told_from_those_of_other_methods() -> None:
    assert recognise(dict.fromkeys(description("layout_vltseg_eva02"), torch.empty(0))) == [("vltseg", RELEASE)]


def test_everything_is_trained_and_counts_as_in_the_re_implementation() -> None:
    model = mfuser.build("vltseg", weights="meta")
    head = sum(p.numel() for p in model.decoder.parameters())
    assert head == 20_565_204
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 316_919_744 + head
    assert all(p.requires_grad for p in model.parameters())


def test_rates_and_weight_decay_are_those_of_the_re_implementations_optimizer() -> None:
    model, optim = mfuser.build("vltseg", weights="meta"), load_recipe("vltseg/eva02-gta").optim
    names = {id(p): name for name, p in model.named_parameters()}
    rows, _ = groups(model, optim)
    for row in rows:
        for parameter in row["params"]:
            for key in source_of(names[id(parameter)]).keys:
                part, _, rest = key.partition(".")
                if part == "backbone":
                    spared = rest == "pos_embed" or any(f".{norm}." in rest for norm in ("norm1", "norm2"))
                else:
                    spared = any(word in rest for word in ("norm", ".gn.", "query_embed", "query_feat", "level_embed"))
                assert row["lr"] == (1e-5 if part == "backbone" else 1e-4), key
                assert row["weight_decay"] == (0.0 if spared else 0.05), key


@pytest.mark.parametrize(("name", "steps"), [("vltseg/eva02-gta", 5000), ("vltseg/eva02-city", 20_000)])
def test_the_rate_is_constant_for_500_steps_and_then_decays_to_0(name: str, steps: int) -> None:
    recipe = load_recipe(name)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-4)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps - 500, power=0.9)
    found = [Rate(1e-4, recipe.optim.min_lr).at(step, recipe.train.steps, recipe.optim) for step in range(steps)]
    assert found[:500] == [1e-4] * 500
    for step in range(500, steps):
        assert found[step] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6), step
        optimizer.step()
        schedule.step()


def test_paths_are_dropped_with_the_published_towers_alone() -> None:
    blocks = mfuser.build("vltseg", weights="meta").vfm.trunk.blocks
    rates = [getattr(block.drop_path2, "drop_prob", 0.0) for block in blocks]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.2, 24))
    assert methods.options("vltseg")(vfm="tiny").drop_path == 0
    assert methods.options("vltseg")(drop_path=0.15).drop_path == 0.15
    with pytest.raises(ValueError, match="drop_path 1 is no chance"):
        methods.options("vltseg")(drop_path=1.0)


def test_every_term_of_the_loss_moves_a_parameter() -> None:
    torch.manual_seed(0)
    model = built(vfm="tiny", patch=16).train()
    labels = torch.zeros(2, *SIZE, dtype=torch.long)
    labels[:, :, 50:] = 11
    terms = model.loss(Batch(torch.rand(2, 3, *SIZE), labels))
    assert len(terms) == 3 * (SIZES["tiny"]["mask_layers"] + 1)
    for name, term in terms.items():
        gradients = torch.autograd.grad(term, list(model.parameters()), retain_graph=True, allow_unused=True)
        assert term > 0, name
        assert any(g is not None and g.any() for g in gradients), name


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., STATE]:
    """Make a published tower small, with a file in the Hub cache, and return what is in the file, by the names of timm."""
    from huggingface_hub import constants

    def make(name: str, model: str, prefix: str, **sizes: int) -> STATE:
        row, sizes = TOWERS[name], {**SMALL, **sizes}
        file = HubFile("made/tower", "model.safetensors", 0.001, "MIT")
        keys = {"trunk": [(r"^", prefix)]}
        monkeypatch.setitem(TOWERS, name, replace(row, options=row.options | sizes, weights=file, keys=keys))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        torch.manual_seed(1)
        made = timm.create_model(model, num_classes=0, **sizes)
        for parameter in made.parameters():
            nn.init.normal_(parameter, 0.5, 0.2)
        commit = hashlib.sha1(b"any").hexdigest()
        place = tmp_path / "cache" / "models--made--tower"
        (place / "snapshots" / commit).mkdir(parents=True)
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text(commit)
        state = made.state_dict()
        save_file({f"{prefix}{key}": value for key, value in state.items()}, place / "snapshots" / commit / "model.safetensors")
        return state

    return make


def resampled(table: Tensor, side: int, mode: str) -> Tensor:
    """A position table, the class's first, for a grid of other sides."""
    before = round((table.shape[1] - 1) ** 0.5)
    cells = table[:, 1:].transpose(1, 2).unflatten(2, (before, before))
    cells = F.interpolate(cells, (side, side), mode=mode, align_corners=False)
    return torch.cat([table[:, :1], cells.flatten(2).transpose(1, 2)], 1)


def test_the_release_draws_positions_anew_and_leaves_out_a_norm(small: Callable[..., STATE]) -> None:
    published = small("eva02_l_224", EVA02, "visual.trunk.")
    trunk = built(weights="published").vfm.trunk.state_dict()
    positions = trunk.pop("pos_embed")
    assert positions.mean().abs() < 0.002
    assert positions.std().item() == pytest.approx(0.02, rel=0.05)
    assert set(published) - set(trunk) == {"pos_embed", "norm.weight", "norm.bias"} | {
        f"blocks.{i}.attn.norm.{kind}" for i in (0, 1) for kind in ("weight", "bias")
    }
    for name, value in trunk.items():
        assert torch.equal(value, published[name]), name


def test_the_sane_variant_resamples_positions_and_keeps_the_norm(small: Callable[..., STATE]) -> None:
    published = small("eva02_l_224", EVA02, "visual.trunk.")
    trunk = built(weights="published", variant="sane").vfm.trunk.state_dict()
    torch.testing.assert_close(trunk.pop("pos_embed"), resampled(published["pos_embed"], 8, "bicubic"))
    assert set(published) - set(trunk) == {"pos_embed", "norm.weight", "norm.bias"}
    for name, value in trunk.items():
        assert torch.equal(value, published[name]), name


@pytest.mark.parametrize("variant", ["release", "sane"])
def test_the_reconstruction_with_clip_sees_what_clip_sees(small: Callable[..., STATE], variant: str) -> None:
    published = small("clip_b", CLIP_B, "visual.", depth=12)
    model = built(vfm="clip_b", weights="published", variant=variant)
    assert model.taps == (3, 5, 7, 11)
    theirs = timm.create_model(CLIP_B, num_classes=0, img_size=SIZE, **SMALL | {"depth": 12}).eval()
    theirs.load_state_dict(published | {"pos_embed": resampled(published["pos_embed"], 7, "bilinear")})
    images = torch.rand(1, 3, *SIZE)
    with torch.no_grad():
        normalised = (images - model.vfm.mean) / model.vfm.std
        expected = theirs.forward_intermediates(normalised, indices=list(model.taps), norm=False, intermediates_only=True)
        for one, other in zip(model.vfm.tapped(images, model.taps), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_maps_of_24_blocks_are_taken_after_9_14_19_and_23(small: Callable[..., STATE]) -> None:
    small("eva02_l_224", EVA02, "visual.trunk.", depth=24)
    model, seen = built(), {}
    for i, block in enumerate(model.vfm.trunk.blocks):
        block.register_forward_hook(lambda _, given, out, i=i: seen.update({i: model.vfm.as_map(out)}))
    model.fpn1.register_forward_hook(lambda _, given, out: seen.update(fpn1=given[0]))
    model.fpn2.register_forward_hook(lambda _, given, out: seen.update(fpn2=given[0]))
    model.decoder.register_forward_hook(lambda _, given, out: seen.update(decoder=given[0]))
    with torch.no_grad():
        model(torch.rand(1, 3, *SIZE))
    assert torch.equal(seen["fpn1"], seen[9])
    assert torch.equal(seen["fpn2"], seen[14])
    assert torch.equal(seen["decoder"][2], seen[19])
    assert torch.equal(seen["decoder"][3], F.max_pool2d(seen[23], 2))


def test_a_checkpoint_of_the_re_implementation_is_converted_whole(small: Callable[..., STATE], tmp_path: Path) -> None:
    small("eva02_l_224", EVA02, "visual.trunk.")
    model = built()
    for buffer in model.fpn1.buffers():
        buffer.add_(torch.ones((), dtype=buffer.dtype))
    tables = {
        f"backbone.{where}rope.freqs_{kind}": torch.rand(64, 32) for where in ("", "blocks.0.attn.") for kind in ("cos", "sin")
    }
    state = to_authors_state_dict(model) | tables
    torch.save({"meta": {"iter": 5000}, "state_dict": state}, tmp_path / "vltseg_checkpoint_gta_1.pth")
    sizes = json.dumps({"name": "vltseg", "vfm": "eva02_l_224", "backend": "torch", **SIZES["tiny"]})
    data = "{source: streets-game, targets: [streets-city], size: [112, 224], crop: [112, 112]}"
    recipe = tmp_path / "small.yaml"
    recipe.write_text(f"method: {sizes}\ndata: {data}\ntrain: {{steps: 20, batch_size: 2}}\noptim: {{lr: 0.001}}\n")
    done = convert(tmp_path / "vltseg_checkpoint_gta_1.pth", tmp_path / "run", recipe=str(recipe))
    assert (done.method, done.used, set(done.dead)) == ("vltseg", len(state) - 4, set(tables))
    loaded, images = mfuser.load(tmp_path / "run"), torch.rand(1, 3, *SIZE)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


def test_a_checkpoint_goes_into_the_release_alone_and_whole(small: Callable[..., STATE]) -> None:
    small("eva02_l_224", EVA02, "visual.trunk.")
    state = to_authors_state_dict(built())
    with pytest.raises(ValueError, match="those of variant `release`, not of `sane`, whose tower has one norm more"):
        load_authors_checkpoint(built(variant="sane"), state)
    with pytest.raises(ValueError, match=r"0 tensors missing .*1 unknown \(backbone.blocks.0.attn.inner_attn_ln.weight\)"):
        load_authors_checkpoint(built(), state | {"backbone.blocks.0.attn.inner_attn_ln.weight": torch.ones(64)})
