from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_files import VARIANTS, description

import mfuser
from mfuser.segmentor import CITYSCAPES
from mfuser.towers.loading import fill
from mfuser.towers.table import TOWERS, HubFile, with_text
from mfuser.towers.text import TextEncoder, tokenize
from mfuser.towers.weights import WeightsNotFound


@pytest.mark.parametrize("variant", ["eva", "clip"])
def test_class_names_become_the_authors_token_ids(variant):
    assert tokenize(VARIANTS[variant], CITYSCAPES) == description(f"layout_{variant}")["tokens"]


def siglip_vocabulary(path: Path) -> None:
    """A file as SigLIP's on the Hub: SentencePiece's unigrams with T5's end of line, in small."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    words = sorted({word for name in CITYSCAPES for word in name.split()} - {"motorcycle", "sidewalk"})
    pieces = ["▁side", "walk", "▁motor", "cycle", "▁a", *(f"▁{word}" for word in words), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -float(i)) for i, piece in enumerate(pieces, 1))]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.normalizer = normalizers.Replace(" {2,}", " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(path))


@pytest.fixture
def vocabulary(tmp_path, monkeypatch):
    """SigLIP's vocabulary in the Hub cache, as far as `tokenize` can tell: ids by piece."""
    from tokenizers import Tokenizer

    file = tmp_path / "tokenizer.json"
    siglip_vocabulary(file)
    monkeypatch.setattr(HubFile, "where", property(lambda row: file if row == TOWERS["siglip"].files[1] else None))
    return Tokenizer.from_file(str(file)).get_vocab()


@pytest.mark.parametrize("pad", [1, 0])
def test_siglips_lines_are_cleaned_ended_padded_and_cut(pad, vocabulary, monkeypatch):
    row = TOWERS["siglip"]
    monkeypatch.setitem(TOWERS, "siglip", replace(row, text=replace(row.text, pad=pad)))
    a, road, side, walk, traffic, light = (vocabulary[p] for p in ("▁a", "▁road", "▁side", "walk", "▁traffic", "▁light"))
    assert tokenize("siglip", ["road", "sidewalk", "Traffic_LIGHT!", " A  road. ", "a road a road a road", ""]) == [
        [road, 1, pad, pad, pad],
        [side, walk, 1, pad, pad],
        [traffic, light, 1, pad, pad],
        [a, road, 1, pad, pad],
        [a, road, a, road, 1],
        [1, pad, pad, pad, pad],
    ]
    ids = tokenize("siglip", CITYSCAPES)
    assert (len(ids), {len(line) for line in ids}) == (19, {5})
    assert not any(2 in line for line in ids)


@pytest.mark.parametrize("name", sorted(with_text()))
def test_a_vocabulary_that_open_clip_looks_for_on_the_hub_is_a_file_of_ours(name):
    import open_clip

    row = TOWERS[name].text
    rule = open_clip.get_model_config(row.open_clip)["text_cfg"] if row.open_clip else {}
    repo = row.tokenizer.repo if isinstance(row.tokenizer, HubFile) else None
    assert repo == rule.get("hf_tokenizer_name")
    assert repo is None or rule["tokenizer_kwargs"] == {"clean": "canonicalize"}


def test_siglips_names_are_cleaned_as_open_clip_cleans_them(vocabulary):
    from open_clip.tokenizer import canonicalize_text

    names = ["Traffic_Light", "PERSON rider!", "a\tcar,  a bus", "side-walk"]
    assert tokenize("siglip", names) == tokenize("siglip", [canonicalize_text(name) for name in names])
    assert tokenize("siglip", ["person &amp; rider"]) == tokenize("siglip", ["person rider"])


def test_a_missing_or_damaged_tokenizer_says_what_to_do(vocabulary, tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(WeightsNotFound, match=r"tokenizer\.json is damaged: .*; delete it and run: dgbench download siglip"):
        tokenize("siglip", CITYSCAPES)
    monkeypatch.setattr(HubFile, "where", None)
    with pytest.raises(WeightsNotFound) as caught:
        tokenize("siglip", CITYSCAPES)
    assert caught.value.message == (
        "the tokenizer of `siglip` is not on this machine: timm/ViT-B-16-SigLIP/tokenizer.json (2.4 MB)"
    )
    assert "run: dgbench download siglip (the files go to" in caught.value.hint
    assert "or give the ids: token_ids=[[...], ...], (19, 5)" in caught.value.hint


def test_context_rows_stand_where_words_would():
    # open_clip's own tower, reading the words whose embeddings are given as context, must say the same
    ids = torch.tensor(tokenize("tiny", CITYSCAPES))
    encoder = TextEncoder("tiny", ids, dim=32).eval()
    word = torch.tensor([[320, 1929, 539, 518, 1153]])  # any five words
    longer = torch.cat([ids[:, :1], word.expand(19, -1), ids[:, 1:]], 1)
    context = encoder.tower.token_embedding(word).detach()
    torch.testing.assert_close(encoder(context), encoder.tower(longer), rtol=1e-4, atol=1e-5)


def test_siglips_tower_reads_its_last_position_and_sees_both_ways():
    ids = torch.tensor(description("layout_siglip")["tokens"])[:2]
    encoder = TextEncoder("siglip", ids)
    # one of its 24 layers shows it
    encoder.tower.transformer.resblocks = encoder.tower.transformer.resblocks[:1]
    fill(encoder)
    assert encoder.tower.positional_embedding.shape == (10, 1024)
    context = torch.randn(1, 5, 1024)
    expected = encoder(context)
    encoder.token_ids[:, -1] = 7  # the last piece: read directly
    assert not torch.allclose(encoder(context), expected)


@pytest.mark.parametrize("name", ["tiny"])
def test_gradients_reach_the_context_through_a_frozen_tower(name):
    encoder = TextEncoder(name, torch.tensor(tokenize(name, CITYSCAPES)), dim=32).requires_grad_(False)
    context = torch.randn(1, encoder.contexts, encoder.width, requires_grad=True)
    encoder(context).square().sum().backward()
    assert context.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["siglip", "siglip2"])
def test_siglip_has_its_context_first_and_is_read_at_the_last_word_where_asked(name):
    pad = {"siglip": 1, "siglip2": 0}[name]
    ids = torch.tensor([[7, pad, pad, pad, pad], [9, 11, 5, pad, pad], [9, 11, 5, 4, 8]])
    encoder = TextEncoder(name, ids, context_first=True, skip_padding=True)
    encoder.tower.transformer.resblocks = encoder.tower.transformer.resblocks[:1]
    with torch.no_grad():
        encoder.tower.token_embedding = torch.nn.Embedding(20, encoder.width)
        fill(encoder)
        for parameter in encoder.tower.parameters():
            parameter.normal_(std=0.05)
    words = torch.tensor([[12, 13, 14, 15, 16]])
    actual = encoder(encoder.tower.token_embedding(words))
    # open_clip's own tower, which reads its last position: of the same sentence, its positions turned until the word is last
    for row, last, given in zip(ids, (5, 7, 9), actual, strict=True):
        sentence = torch.cat([words[0], row])
        turn = torch.roll(torch.arange(10), 9 - last)
        tower = copy.deepcopy(encoder.tower)
        tower.positional_embedding.data = tower.positional_embedding.data[turn]
        torch.testing.assert_close(tower(sentence[turn][None])[0], given, rtol=1e-3, atol=1e-4)


def test_a_tower_with_a_start_token_has_its_context_and_its_end_where_they_are():
    ids = torch.tensor(tokenize("tiny", CITYSCAPES))
    torch.manual_seed(0)
    released = TextEncoder("tiny", ids, dim=32).eval()
    torch.manual_seed(0)
    context = torch.randn(1, 5, 64)
    asked = TextEncoder("tiny", ids, dim=32, context_first=True, skip_padding=True).eval()
    asked.load_state_dict(released.state_dict())
    assert torch.equal(released(context), asked(context))


ONES = [[1] * 5] * 19


@pytest.mark.parametrize(
    "given",
    [ONES, tuple(map(tuple, ONES)), np.array(ONES), np.array(ONES, np.uint16), torch.tensor(ONES), torch.tensor(ONES).int()],
    ids=lambda given: f"{type(given).__name__} {getattr(given, 'dtype', '')}",
)
def test_ids_of_the_classes_are_lists_or_an_array(given, tmp_path):
    model = mfuser.build("mfuser", vfm="tiny", vlm="tiny", image_size=(32, 32), token_ids=given)
    assert model.options["token_ids"] == ONES
    assert {type(i) for line in model.options["token_ids"] for i in line} == {int}
    assert torch.equal(model.text.token_ids, torch.tensor(ONES))
    assert mfuser.load(mfuser.save(model, tmp_path)).options["token_ids"] == ONES


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (np.ones((19, 5)), TypeError, "token_ids are float64, expected (19, 5) integers: a line for each class"),
        ([[1.0] * 5] * 19, TypeError, "token_ids are float64"),
        (torch.ones(19, 5, dtype=torch.bool), TypeError, "token_ids are bool"),
        ([["road"] * 5] * 19, TypeError, "token_ids are <U4"),
        (np.ones((18, 5), int), ValueError, "token_ids are (18, 5), expected (19, 5)"),
        (np.ones((19, 6), int), ValueError, "token_ids are (19, 6)"),
        ([], ValueError, "token_ids are (0,)"),
        ([[1] * 5] * 18 + [[1]], ValueError, "token_ids are lines of different lengths"),
        (-np.ones((19, 5), int), ValueError, "token_ids hold -1, and ids begin at 0"),
        (np.full((19, 5), 49408), ValueError, "token_ids hold 49408, and `tiny` knows the words 0..49407"),
    ],
    ids=str,
)
def test_ids_of_another_form_are_refused(given, error, says):
    with pytest.raises(error, match=re.escape(says)):
        mfuser.build("mfuser", vfm="tiny", vlm="tiny", image_size=(32, 32), token_ids=given)
