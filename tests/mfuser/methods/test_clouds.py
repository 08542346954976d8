"""CLOUDS: its head against the authors' numbers, its checkpoints' names, its two stages."""

from __future__ import annotations

import copy

import pytest
import torch
from golden_files import noise, numbers, relative_error
from named_weights import named_tensor
from torch import Tensor, nn
from torch.nn import functional as F

import mfuser
from dgbench.engine.scoring import score
from dgbench.protocol import lookup
from dgbench.recipe import load_recipe
from mfuser.authors import load_authors_checkpoint, read_authors, recognise, release_of, sources_of, to_authors_state_dict
from mfuser.decoder.open_vocabulary import PooledMaskDecoder, mask_pooling, text_logits
from mfuser.decoder.queries import LearnedQueries
from mfuser.releases.clouds import RELEASES
from mfuser.segmentor import Batch

SIZE = (64, 96)
WORDS = [1] * 17 + [2, 1]  # of the golden's classes


def tiny(variant: str = "release", **options: object) -> mfuser.Segmentor:
    torch.manual_seed(0)
    return mfuser.build("clouds", backbone="tiny_cnn", variant=variant, image_size=SIZE, **options)


def batch(**extra: Tensor) -> Batch:
    generator = torch.Generator().manual_seed(1)
    labels = torch.full((2, *SIZE), 255)
    labels[:, :32], labels[0, 32:, :48] = 0, 13
    return Batch(torch.rand(2, 3, *SIZE, generator=generator), labels, extra)


def by_the_authors_names(module: nn.Module, part: str) -> None:
    for name, parameter in module.named_parameters():
        source = RELEASES[0].source(f"head.{part}.{name}")
        assert source is not None
        parameter.data = torch.from_numpy(named_tensor(source.keys[0], tuple(parameter.shape)))


# ---- the authors' numbers


def test_class_and_mask_logits_of_every_output_equal_the_authors() -> None:
    goldens = numbers("clouds")
    decoder = PooledMaskDecoder(24, dim=32, layers=3, heads=4, ffn_dim=64).eval()
    queries = LearnedQueries(7, 32)
    by_the_authors_names(decoder, "mask_decoder")
    by_the_authors_names(queries, "queries")
    nn.init.constant_(decoder.logit_scale, torch.tensor(1 / 0.07).log().item())
    maps = [noise(f"clouds/feat{i}", 2, 32, side, side + 1) for i, side in enumerate((3, 6, 12))]
    features = noise("clouds/mask_features", 2, 32, 24, 25)
    text = torch.cat([F.normalize(noise("clouds/text_classifier", 20, 24), dim=-1), F.normalize(noise("clouds/void", 1, 24))])
    outputs = decoder(maps, features, *queries(2))
    assert len(outputs) == 4
    for i, (embedded, masks) in enumerate(outputs):
        logits = text_logits(embedded, text, WORDS, decoder.logit_scale)
        assert relative_error(goldens, "pred_logits" if i == 3 else f"aux{i}.logits", logits) < 1e-5
        if i < 3:
            assert relative_error(goldens, f"aux{i}.masks_q0", masks[:, 0]) < 1e-5
    assert relative_error(goldens, "pred_masks", outputs[-1][1][:, :, ::2, ::2]) < 1e-5
    assert relative_error(goldens, "mask_pooling", mask_pooling(features, outputs[-1][1])) < 1e-5
    logits = text_logits(noise("clouds/x", 2, 7, 24), text, WORDS, decoder.logit_scale)
    assert relative_error(goldens, "cls_logits_head", logits) < 1e-5


def test_the_scale_of_the_logits_is_at_most_a_hundred() -> None:
    text = F.normalize(torch.randn(3, 8), dim=-1)
    found = [text_logits(torch.ones(1, 2, 8), text, [1, 1], torch.tensor(scale)) for scale in (9.0, 99.0)]
    assert torch.equal(*found)
    assert found[0].abs().max() <= 100


# ---- the authors' checkpoints


@pytest.fixture(scope="module")
def meta() -> mfuser.Segmentor:
    return mfuser.build("clouds", weights="meta")


def test_the_full_size_model_has_the_weights_of_the_release(meta: mfuser.Segmentor) -> None:
    # open_clip's whole CLIP of 351.8 M; what is behind its maps is not built
    held = {name: sum(p.numel() for p in part.parameters()) for name, part in meta.named_children()}
    behind = 2 * 1536 + (1536 * 1536 + 1536 + 768 * 1536) + 1
    assert held["encoder"] + held["prompts"] + behind == 351_772_609
    # Mask2Former's 20,565,204 for four maps of 1,024 channels, and what differs
    maps = 256 * (192 + 384 + 768 + 1536 - 4 * 1024)
    words = (2 * 256 + 256 * 256 + 256) + (2 * (256 * 256 + 256) + 256 * 768 + 768) + 1 - (256 * 20 + 20)
    assert held["head"] == 20_565_204 + maps + words
    trained = sum(p.numel() for p in meta.parameters() if p.requires_grad)
    assert trained == held["head"] + 768 == 20_644_801


def test_every_tensor_of_an_authors_checkpoint_is_used_or_known_to_be_dead(meta: mfuser.Segmentor) -> None:
    import open_clip

    with torch.device("meta"):
        clip = open_clip.create_model("convnext_large_d_320", pretrained=None, load_weights=False, device="meta").state_dict()
    release = release_of(meta)
    used = [key for source in sources_of(meta, release, meta.state_dict()).values() for key in source.keys]
    assert len(used) == len(set(used)) == len(meta.state_dict())
    theirs = {f"backbone.clip_model.{key}" for key in clip}
    assert {key for key in used if key.startswith("backbone.")} == {key for key in theirs if not release.is_dead(key)}
    # as detectron2's Mask2Former and the release name them
    expected = {
        "sem_seg_head.pixel_decoder.input_proj.2.1.bias",
        "sem_seg_head.pixel_decoder.transformer.encoder.layers.5.linear2.weight",
        "sem_seg_head.pixel_decoder.transformer.encoder.layers.0.norm2.weight",
        "sem_seg_head.pixel_decoder.transformer.level_embed",
        "sem_seg_head.pixel_decoder.adapter_1.weight",
        "sem_seg_head.pixel_decoder.layer_1.norm.bias",
        "sem_seg_head.pixel_decoder.mask_features.bias",
        "sem_seg_head.predictor.transformer_cross_attention_layers.8.multihead_attn.in_proj_weight",
        "sem_seg_head.predictor.transformer_self_attention_layers.0.norm.weight",
        "sem_seg_head.predictor.transformer_ffn_layers.3.linear1.bias",
        "sem_seg_head.predictor._mask_pooling_proj.0.weight",
        "sem_seg_head.predictor.class_embed.layers.2.weight",
        "sem_seg_head.predictor.mask_embed.layers.1.bias",
        "sem_seg_head.predictor.logit_scale",
        "sem_seg_head.predictor.query_feat.weight",
        "void_embedding.weight",
    }
    assert expected <= set(used)


def test_a_checkpoint_as_detectron2_writes_it_is_recognised_and_comes_back(tmp_path, monkeypatch) -> None:
    first, second = tiny(), tiny()
    # the release's backbone by another name: its map of names knows no sizes
    from dataclasses import replace

    from mfuser.methods import clouds

    monkeypatch.setattr(clouds, "RELEASES", (replace(RELEASES[0], options={"backbone": "tiny_cnn"}),))
    monkeypatch.setattr("mfuser.releases.clouds.RELEASES", clouds.RELEASES)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    state = to_authors_state_dict(first) | {"criterion.empty_weight": torch.ones(20)}
    state["backbone.clip_model.visual.trunk.stem.0.weight"] = torch.ones(1)  # of a ConvNeXt, which this one is not
    torch.save({"model": state, "iteration": 39999, "optimizer": {"state": {}}}, tmp_path / "model_final.pth")
    read = read_authors(tmp_path / "model_final.pth")
    assert [name for name, _ in recognise(read)] == ["clouds"]
    del read["backbone.clip_model.visual.trunk.stem.0.weight"]
    report = load_authors_checkpoint(second, read)
    assert report.dead == ("criterion.empty_weight",)
    images = torch.rand(1, 3, *SIZE)
    with torch.no_grad():
        assert torch.equal(first.eval()(images), second.eval()(images))


# ---- inference


def test_an_image_of_any_size_is_padded_with_the_mean_and_scored() -> None:
    model = tiny().eval()
    images = torch.rand(1, 3, 50, 70)
    padded = model.encoder.mean.expand(1, 3, 64, 96).clone()  # type: ignore[operator,union-attr]
    padded[..., :50, :70] = images
    with torch.no_grad():
        torch.testing.assert_close(model(images), model(padded)[..., :50, :70], rtol=1e-4, atol=1e-5)


def test_the_protocol_of_the_paper_scores_whole_images_as_the_method_does() -> None:
    model = tiny().eval()
    images = torch.rand(1, 3, 40, 70)
    with torch.no_grad():
        torch.testing.assert_close(score(model, [images], (40, 70), lookup("clouds")), model(images))


# ---- training


def test_every_loss_term_counts_and_moves_a_parameter() -> None:
    model = tiny("stage 1 only").train()
    terms = model.loss(batch())
    assert len(terms) == 3 * 4  # of each output of three layers and before them
    for name, term in terms.items():
        assert term.item() > 0, name
        model.zero_grad()
        term.backward(retain_graph=True)
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters()), name


def test_the_groups_are_detectron2s_norms_and_embeddings_do_not_decay() -> None:
    model = tiny()
    free = [
        p
        for module in model.modules()
        if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.BatchNorm2d | nn.Embedding)
        for p in module.parameters(recurse=False)
        # a bare parameter in detectron2's pixel decoder
        if p.requires_grad and p is not model.head.pixel_decoder.level_encoding.weight  # type: ignore[union-attr]
    ]
    decaying, rest = model.groups(1e-3, 0.05)
    assert (decaying["weight_decay"], rest["weight_decay"]) == (0.05, 0.0)
    assert {id(p) for p in rest["params"]} == {id(p) for p in free}
    assert len(decaying["params"]) + len(free) == sum(p.requires_grad for p in model.parameters())


def test_the_first_stage_needs_no_generated_images_and_says_that_it_is_alone() -> None:
    model = tiny("stage 1 only")
    model.enter_training()
    assert not model.extras
    assert "training_only" not in model._modules
    assert load_recipe("streets/clouds").method.variant == "tiny_cnn, stage 1 only"
    assert load_recipe("clouds/convnext-gta").method.variant == "convnext_l_clip"


def test_the_teacher_follows_the_head_every_hundred_steps() -> None:
    model = tiny()
    model.enter_training()
    teacher = model.training_only["teacher"]
    before = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in model.head.parameters():  # type: ignore[operator,union-attr]
            parameter.add_(1.0)
    for step in (0, 1, 99, 101):
        model.before_step(step, 1000, None)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), before.parameters(), strict=True))
    model.before_step(100, 1000, None)  # type: ignore[arg-type]
    for now, then in zip(teacher.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(now, 0.999 * then + 0.001 * (then + 1), rtol=1e-5, atol=1e-6)


def test_the_second_stage_learns_from_the_teachers_labels_of_generated_images() -> None:
    model = tiny().train()
    model.enter_training()
    given = batch(generated=torch.rand(2, 3, *SIZE))
    given.labels.fill_(255)  # the source says nothing
    terms = model.loss(given)
    assert terms["decode.loss_mask"] > 0
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is None for p in model.training_only.parameters())


def test_a_frozen_tower_keeps_its_statistics_and_has_no_graph() -> None:
    model = tiny("stage 1 only", freeze_towers=True).train()
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}  # type: ignore[union-attr]
    torch.stack(list(model.loss(batch()).values())).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.encoder.state_dict().items())  # type: ignore[union-attr]
    assert {n.partition(".")[0] for n, p in model.named_parameters() if p.grad is not None} == {"void_embedding", "head"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"backbone": "dinov2_s"}, "`dinov2_s` is no convolutional network with a text tower; choose from .*convnext_l_clip"),
        ({"variant": "sane"}, "variant `sane` is unknown; choose from release, stage 1 only"),
        ({"variant": "stage 1 only", "segments": True}, "segments belong to generated images"),
        ({"templates": 15}, "templates is 15, expected 1 to 14"),
    ],
)
def test_options_that_do_not_fit_are_named(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        mfuser.build("clouds", weights="random", **options)
