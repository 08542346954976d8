"""tqdm: its parts against numbers of the authors' code, what its regularisers hold on to, its variants, its optimizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden_files import fill_by_name, noise, numbers, relative_error
from named_weights import named_labels, named_tensor
from open_clip.model import CLIPTextCfg, _build_text_tower
from open_clip.tokenizer import SimpleTokenizer
from torch.nn import functional as F

import mfuser
from dgbench.engine.optim import optimizer_of
from dgbench.recipe import load_recipe
from mfuser.decoder.context_decoder import ContextDecoder
from mfuser.decoder.criterion import alignment_loss
from mfuser.decoder.mask_decoder import class_scores
from mfuser.methods.tqdm import PROMPT, TEMPERATURE, score_map, textual_loss
from mfuser.segmentor import CITYSCAPES, Batch
from mfuser.towers.meta import unfilled
from mfuser.towers.table import TOWERS
from mfuser.towers.text import TextEncoder, tokenize


@pytest.fixture(scope="module")
def goldens():
    return numbers("tqdm")


def tiny(variant: str = "release", **options) -> mfuser.Segmentor:
    return mfuser.build("tqdm", vlm="tiny", variant=variant, image_size=(64, 64), **options)


def full(vlm: str = "eva02", variant: str = "release", **options) -> mfuser.Segmentor:
    with unfilled():
        return mfuser.build("tqdm", vlm=vlm, variant=variant, weights="meta", **options)


def batch() -> Batch:
    labels = torch.full((2, 64, 64), 255)
    labels[:, :32] = 0
    labels[0, 32:, :32] = 13
    return Batch(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)), labels)


def count(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.fixture(scope="module")
def texts(goldens):
    """What the context decoder adds to the texts of the goldens, and those texts refined."""
    decoder = ContextDecoder(48, dim=32, heads=4, layers=3).eval()
    fill_by_name(decoder, "context_decoder")
    text = noise("tqdm/text", 2, 19, 48)
    with torch.no_grad():
        added = decoder(text, noise("tqdm/visual_context", 2, 37, 48))
    return added, text + torch.from_numpy(named_tensor("gamma", (48,))) * added


def test_the_context_decoder_equals_the_authors(goldens, texts):
    for name, value in zip(("context_decoder.text_diff", "text_emb"), texts, strict=True):
        assert relative_error(goldens, name, value) < 1e-5, name


def test_the_text_tower_with_and_without_context_equals_the_authors(goldens):
    ids = goldens["text_tower.tokens"].long()
    encoder = TextEncoder("tiny", ids)
    settings = CLIPTextCfg(context_length=13, vocab_size=64, width=32, heads=4, layers=2)
    encoder.tower = _build_text_tower(48, settings, quick_gelu=True)
    fill_by_name(encoder.tower, "text_encoder")
    for block in encoder.tower.transformer.resblocks:
        block.attn.in_proj_weight.data /= 2  # as the weights by name had it when these numbers were recorded
    contexts = torch.from_numpy(named_tensor("contexts", (1, 8, 32)))
    with torch.no_grad():
        assert relative_error(goldens, "text_tower.out", encoder(contexts)) < 1e-5
        assert relative_error(goldens, "text_tower.no_context", encoder.sentences(F.pad(ids, (0, 8)))) < 1e-5


def test_the_score_map_and_its_loss_equal_the_authors_formulas(goldens, texts):
    scores = score_map(noise("tqdm/visual", 2, 48, 6, 6).flatten(2).mT, texts[1]).unflatten(2, (6, 6))
    assert relative_error(goldens, "score_map", scores) < 1e-5
    labels = torch.from_numpy(named_labels("tqdm/labels", (2, 96, 96), cell=16)).long()
    for name, over_all in (("loss.scr_map", True), ("loss.scr_map_mean_over_valid", False)):
        assert relative_error(goldens, name, alignment_loss(scores / TEMPERATURE, labels, count_ignored=over_all)) < 1e-5


def test_the_other_regularisers_equal_the_authors_formulas(goldens, texts):
    clean = F.normalize(noise("tqdm/T0", 19, 48), dim=-1)
    assert relative_error(goldens, "loss.textual", textual_loss(texts[1], clean)) < 1e-5
    apart = F.mse_loss(noise("tqdm/global", 2, 1, 48), noise("tqdm/global0", 2, 1, 48))
    assert relative_error(goldens, "loss.visual", apart) < 1e-5


def test_masks_are_mixed_before_they_are_enlarged(goldens):
    classes, masks = noise("tqdm/cls_logits", 1, 19, 20), noise("tqdm/mask_logits", 1, 19, 8, 8)
    scores = class_scores(classes, masks)
    assert relative_error(goldens, "semantic.quarter", scores) < 1e-5
    enlarged = F.interpolate(scores, (16, 16), mode="bilinear", align_corners=False)
    assert relative_error(goldens, "semantic.full16", enlarged) < 1e-5
    assert relative_error(goldens, "semantic.rein_order_full16", enlarged) > 1e-3
    model = tiny()
    images = batch().images
    with torch.no_grad():
        mixed = class_scores(*model.masks(images))
        torch.testing.assert_close(model(images), F.interpolate(mixed, (64, 64), mode="bilinear", align_corners=False))


@pytest.mark.parametrize(
    ("vlm", "tower", "head"), [("eva02", 305_170_112, 25_717_716), ("clip_b", 86_828_544, 25_324_500)], ids=["EVA02-L", "CLIP-B"]
)
def test_parameters_are_as_many_as_the_authors(vlm, tower, head):
    model = full(vlm)
    assert count(model.vlm, model.embedding) == tower
    assert count(model.pixel_decoder, model.mask_decoder) == head
    frozen = {name.partition(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"text"}
    if vlm == "eva02":
        assert (count(model.fpn1, model.fpn2), count(model.context_decoder)) == (12_588_032, 3_750_912)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 347_233_684
        # FFNs of 1024 in place of 2048, as configured
        sane = full(variant="sane")
        assert count(sane.pixel_decoder, sane.mask_decoder) == head - 6 * (2 * 1024 * 256 + 1024)


@pytest.mark.parametrize(("vlm", "taps"), [("eva02", (7, 11, 15, 23)), ("clip_b", (3, 5, 7, 11))])
def test_maps_are_taken_at_the_authors_blocks(vlm, taps):
    assert full(vlm).taps == taps


@pytest.mark.parametrize(("vlm", "length"), [("eva02", 13), ("clip_b", 10)])
def test_the_clean_sentences_fit_into_the_text_tower(vlm, length):
    assert 5 + TOWERS[vlm].text.contexts == length
    sentences = [PROMPT.format(name) for name in CITYSCAPES]
    ids, whole = tokenize(vlm, sentences, length), tokenize(vlm, sentences, 77)
    assert [line + [0] * (77 - length) for line in ids] == whole
    tokenizer = SimpleTokenizer()
    read = [tokenizer.decode([i for i in line if i]) for line in ids]
    assert read == [f"<start_of_text>a clean origami of a {name} <end_of_text>" for name in CITYSCAPES]


def test_a_sentence_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="`tiny` reads sentences of at most 10 tokens; got 11 tokens"):
        tiny().text.sentences(torch.zeros(19, 11, dtype=torch.long))


def test_every_term_is_above_zero_and_moves_a_parameter():
    torch.manual_seed(0)
    model, given = tiny(), batch()
    model.enter_training()
    with torch.no_grad():
        model.embedding.head.weight.mul_(1.1)  # at the start the tower is where the visual term wants it
    terms = model.train().loss(given)
    assert {"reg.textual.loss", "reg.visual.loss", "scr_map.loss_seg", "decode.loss_cls", "decode.d0.loss_dice"} <= set(terms)
    assert len(terms) == 3 * 4 + 3
    trained = [p for p in model.parameters() if p.requires_grad]
    for name, term in terms.items():
        assert term > 0, name
        grads = torch.autograd.grad(term, trained, retain_graph=True, allow_unused=True)
        assert any(grad is not None and bool(grad.abs().sum() > 0) for grad in grads), name


def test_the_visual_term_is_zero_at_the_start_and_pulls_the_tower_back():
    model, given = tiny(variant="sane"), batch()
    model.enter_training()
    assert float(model.loss(given)["reg.visual.loss"].detach()) == 0
    with torch.no_grad():
        model.embedding.head.bias.add_(2)
    assert float(model.loss(given)["reg.visual.loss"].detach()) == pytest.approx(4, rel=1e-5)


def test_the_tower_at_the_start_stays_as_it_is_and_out_of_the_model_file(tmp_path):
    model, given = tiny(), batch()
    model.enter_training()
    start = {name: value.clone() for name, value in model.named_parameters() if name.startswith("training_only.start.")}
    assert start
    optimizer = torch.optim.AdamW(model.train().groups(1e-2, 0.1))
    for _ in range(2):
        torch.stack(list(model.loss(given).values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in start.items())
    assert not torch.equal(after["vlm.trunk.norm.bias"], start["training_only.start.vlm.trunk.norm.bias"])
    again = mfuser.load(mfuser.save(model.eval(), tmp_path))
    assert not hasattr(again, "training_only")
    again.enter_training()  # as a resumed training does, of the trained weights
    again.load_training_state(model.training_state())
    state = again.training_state()
    assert all(torch.equal(state[name], value) for name, value in start.items())


def test_the_clean_texts_are_of_unit_length_and_read_by_the_towers_own_tokenizer():
    model = tiny()
    model.enter_training()
    clean = model.training_only["texts"].embeddings
    torch.testing.assert_close(clean.norm(dim=-1), torch.ones(19))
    with torch.no_grad():
        ids = torch.tensor(tokenize("tiny", [PROMPT.format("traffic light")], 10))
        torch.testing.assert_close(clean[6], F.normalize(model.text.sentences(ids), dim=-1)[0])


def test_the_copy_of_the_tower_is_in_training_mode_in_the_release_alone():
    for variant, training in (("release", True), ("sane", False)):
        model = tiny(variant)
        model.enter_training()
        assert model.train().training_only["start"].training == training
        assert model.vlm.training


def test_a_frozen_text_tower_stays_in_evaluation_mode():
    model = tiny(freeze_text=True).train()
    assert not model.text.training
    assert not any(p.requires_grad for p in model.text.parameters())


def test_gamma_starts_as_noise_in_the_release_and_small_in_sane():
    assert tiny().gamma.detach().abs().mean() > 0.3
    assert torch.equal(tiny("sane").gamma.detach(), torch.full((64,), 1e-4))


def test_clips_class_embedding_is_added_twice_in_the_release_alone():
    assert full("clip_b").vlm.class_token_twice
    assert not full("clip_b", "sane").vlm.class_token_twice


def test_sane_counts_labelled_pixels_alone():
    given = batch()
    given.labels[:] = 255
    given.labels[:, :16] = 0
    release, sane = tiny(), tiny("sane")
    sane.load_state_dict(release.state_dict())
    values = []
    for model in (release, sane):
        model.enter_training()
        with torch.no_grad():
            values.append(float(model.loss(given)["scr_map.loss_seg"]))
    assert values[0] == pytest.approx(values[1] / 4, rel=1e-5)


@pytest.mark.parametrize("vlm", ["siglip", "dinov2_b", "nothing"])
def test_a_tower_without_text_or_of_another_kind_is_refused(vlm):
    with pytest.raises(ValueError, match=f"vlm `{vlm}` is no tower of CLIP's kind with a text tower; choose from .*eva02"):
        mfuser.build("tqdm", vlm=vlm)


def test_an_unknown_variant_says_which_there_are():
    with pytest.raises(ValueError, match="variant `paper` is unknown; choose from release, sane"):
        tiny("paper")


def rows(name: str, step: int, *changes: str):
    """Of each trained parameter, the learning rate of a step and the weight decay, as a recipe has them."""
    recipe = load_recipe(name, changes)
    options = {**recipe.method.options, "image_size": recipe.data.crop}
    with unfilled():
        model = mfuser.build("tqdm", **options, weights="meta")
    names = {id(p): n for n, p in model.named_parameters()}
    optimizer, rates = optimizer_of(model, recipe.optim)
    return {
        names[id(p)]: (rate.at(step, recipe.train.steps, recipe.optim), row["weight_decay"])
        for row, rate in zip(optimizer.param_groups, rates, strict=True)
        for p in row["params"]
    }


def theirs(name: str) -> bool:
    """Whether a parameter of ours is one of the authors' `backbone`."""
    return name.startswith(("vlm.", "embedding.", "fpn1.", "fpn2."))


@pytest.mark.parametrize("step", [1500, 10_000, 19_999])
def test_on_gta5_the_towers_rate_is_the_floor_from_the_warm_up_on(step):
    found = rows("tqdm/eva02-gta", step)
    others = 9e-6 * (1 - (step - 1500) / 18_500) ** 0.9 + 1e-6
    assert {name: rate for name, (rate, _) in found.items()} == pytest.approx(
        {name: 1e-6 if theirs(name) else others for name in found}
    )


@pytest.mark.parametrize(
    ("recipe", "decay", "spared"),
    [
        ("tqdm/eva02-gta", 1e-4, ()),
        ("tqdm/clip_b-gta", 1e-4, ()),
        ("tqdm/eva02-city", 1e-5, ("level_embed", "query_embed")),
    ],
)
def test_weight_decay_is_as_the_authors_optimizer_divides_it(recipe, decay, spared):
    found = rows(recipe, 0)
    # their key `backbone` is longer than `norm` and comes first
    undecayed = {n for n in found if not theirs(n) and any(key in n for key in ("norm", *spared))}
    expected = {name: 0.0 if name in undecayed else decay for name in found}
    assert {name: row[1] for name, row in found.items()} == pytest.approx(expected)
    assert expected["vlm.trunk.blocks.0.norm1.weight"] == decay
    assert expected["mask_decoder.layers.0.norm1.weight"] == 0


def test_sane_spares_the_towers_norms_where_the_recipe_leaves_them_to_it():
    found = rows("tqdm/eva02-gta", 0, "method.variant=sane", "optim.groups.vlm.weight_decay=null")
    assert found["vlm.trunk.blocks.0.norm1.weight"][1] == found["fpn1.1.weight"][1] == 0
    assert found["vlm.trunk.blocks.0.attn.proj.weight"][1] == 1e-4


def test_the_module_is_not_taken_for_the_progress_bars():
    import tqdm

    assert Path(tqdm.__file__).parent.name == "tqdm"
    assert Path(mfuser.methods.module("tqdm").__file__).parent.name == "methods"
