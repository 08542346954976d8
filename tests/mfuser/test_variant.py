"""The variant `sane`: what it changes in the whole model, one accident of the release a test. Its parts are tested with theirs:
test_fusion.py (steps and gate), test_text.py (SigLIP), test_decoder.py (alignment loss)."""

from __future__ import annotations

import json

import pytest
import torch
from golden_files import VARIANTS, AuthorsWeights, without_values

import mfuser
from mfuser.authors import load_authors_checkpoint, to_authors_state_dict
from mfuser.segmentor import Batch
from mfuser.towers.loading import fill
from mfuser.towers.vit import VisionEncoder

TINY = {"vfm": "tiny", "vlm": "tiny", "image_size": (64, 64)}


def batch() -> Batch:
    labels = torch.full((2, 64, 64), 255)
    labels[:, :32] = 0
    return Batch(torch.rand(2, 3, 64, 64), labels)


def test_the_release_is_the_default_and_another_function_than_sane():
    torch.manual_seed(0)
    default = mfuser.build("mfuser", **TINY).eval()
    torch.manual_seed(0)
    release = mfuser.build("mfuser", **TINY, variant="release").eval()
    sane = mfuser.build("mfuser", **TINY, variant="sane").eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(default(images), release(images))
        for adapter in default.adapters:
            adapter.scale.fill_(1.0)
        sane.load_state_dict(default.state_dict())  # neither has weights that the other has not
        assert not torch.allclose(default(images), sane(images), rtol=1e-3)
    assert default.options["variant"] == "release"


def test_every_adapter_and_the_enhancer_add_the_bias_and_gate_once():
    from mfuser.fusion import MVFuser

    for variant, expected in (("release", (True, True)), ("sane", (False, False))):
        model = mfuser.build("mfuser", **TINY, variant=variant, fuser="mvfuser_bidir")
        scans = [(m.double_bias, m.double_gate) for m in model.modules() if isinstance(m, MVFuser)]
        assert scans == [expected] * 4  # three blocks and MTEnhancer


def test_gamma_starts_at_a_ten_thousandth():
    assert torch.equal(mfuser.build("mfuser", **TINY, variant="sane").gamma.detach(), torch.full((64,), 1e-4))
    assert mfuser.build("mfuser", **TINY).gamma.abs().mean() > 0.3


def test_the_pixel_decoder_has_the_configured_width():
    for variant, width in (("release", 2048), ("sane", 1024)):
        model = without_values("eva02", variant)
        assert {layer.ffn[0].out_features for layer in model.pixel_decoder.layers} == {width}
        assert {layer.ffn[0].out_features for layer in model.mask_decoder.layers} == {2048}


def test_clips_class_embedding_is_added_once_and_no_path_is_dropped():
    assert without_values("clip").vlm.class_token_twice
    assert not without_values("clip", "sane").vlm.class_token_twice
    tower = VisionEncoder("clip", (64, 64), depth=3, embed_dim=64, num_heads=2, class_token_twice=False, drop_path=False)
    fill(tower)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.normal_(std=0.1)
    images = torch.rand(8, 3, 64, 64)
    # timm's own forward adds it once; in training, without stochastic depth, nothing is random
    expected = tower.eval().trunk.forward_features((images - tower.mean) / tower.std)
    tower.train()
    tokens = tower.embed(images)
    for i in range(3):
        tokens = tower.block(i, tokens)
    torch.testing.assert_close(tower.finish(tokens), expected)
    assert not [m for m in tower.modules() if type(m).__name__ == "DropPath"]


@pytest.mark.parametrize("vlm", [*sorted(VARIANTS.values()), "tiny"])
def test_weight_decay_spares_norms_by_type_and_the_scans_decay(vlm):
    model = (
        mfuser.build("mfuser", **TINY, variant="sane", fuser="mvfuser_bidir") if vlm == "tiny" else without_values(vlm, "sane")
    )
    spared = set()
    for path, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            full_name = f"{path}.{name}" if path else name
            of_a_norm = "Norm" in type(module).__name__
            of_a_scan = name in ("A_log", "D", "A_log_b", "D_b")
            of_a_level = path.rpartition(".")[2] in ("level_embed", "level_encoding", "query_embed")
            if of_a_norm or of_a_scan or of_a_level:
                spared.add(full_name)
    names = {id(p): n for n, p in model.named_parameters()}
    held = {names[id(p)]: group["weight_decay"] for group in model.groups(1e-4, 0.1) for p in group["params"]}
    assert set(held) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, decay in held.items() if decay == 0} == spared & set(held)
    # some of each kind that the release decays
    for part in (
        "fpn1.1.weight",
        "pixel_decoder.input_convs.0.gn.bias",
        "context_decoder.memory_proj.0.bias",
        "adapters.0.A_log",
        "adapters.0.D",
        "pixel_decoder.level_encoding.weight",
    ):
        assert held[part] == 0


def test_the_alignment_loss_is_over_labelled_pixels():
    torch.manual_seed(0)
    release, sane = (mfuser.build("mfuser", **TINY, variant=v).eval() for v in ("release", "sane"))
    given = batch()
    for model in (release, sane):
        score_map = model.training_outputs(given.images)[1] * model.logit_scale
        logits = torch.nn.functional.interpolate(score_map, (64, 64), mode="bilinear", align_corners=False)
        mean = torch.nn.functional.cross_entropy(logits, given.labels, ignore_index=255)
        # half of the pixels have a label
        expected = mean if model is sane else mean / 2
        torch.testing.assert_close(model.loss(given)["scr_map.loss_seg"], expected)


def test_siglip_has_its_context_first():
    assert (without_values("siglip").text.start, without_values("siglip", "sane").text.start) == (1, 0)
    assert (without_values("siglip").text.pad, without_values("siglip", "sane").text.pad) == (None, 1)


def test_it_trains_and_travels_with_the_checkpoint(tmp_path):
    model = mfuser.build("mfuser", **TINY, variant="sane", fuser="mvfuser_bidir").train()
    torch.stack(list(model.loss(batch()).values())).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    mfuser.save(model.eval(), tmp_path)
    again = mfuser.load(tmp_path).eval()
    assert (again.options["variant"], again.options["fuser"]) == ("sane", "mvfuser_bidir")
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images), again(images))


def test_a_checkpoint_from_before_there_were_variants_is_the_releases(tmp_path):
    mfuser.save(mfuser.build("mfuser", **TINY), tmp_path)
    content = json.loads((tmp_path / "model.json").read_text())
    del content["options"]["variant"]
    (tmp_path / "model.json").write_text(json.dumps(content))
    (tmp_path / "manifest.json").unlink()
    assert mfuser.load(tmp_path).options["variant"] == "release"


def test_the_authors_weights_are_refused():
    model = without_values("eva02", "sane")
    with pytest.raises(
        ValueError, match="those of variant `release`, not of `sane`, which leaves out known bugs .*; build .*release"
    ):
        load_authors_checkpoint(model, AuthorsWeights("eva"))
    assert all(p.is_meta for p in model.parameters())
    with pytest.raises(ValueError, match="not of `sane`"):
        to_authors_state_dict(model)


def test_an_unknown_variant_says_which_there_are():
    with pytest.raises(ValueError, match="variant `paper` is unknown; choose from release, sane"):
        mfuser.build("mfuser", **TINY, variant="paper")
