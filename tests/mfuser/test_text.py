from __future__ import annotations

import copy

import pytest
import torch
from golden_files import VARIANTS, description

from mfuser.pretrained import fill
from mfuser.segmentor import CITYSCAPES
from mfuser.text import TextEncoder, tokenize


@pytest.mark.parametrize("variant", ["eva", "clip"])
def test_class_names_become_the_authors_token_ids(variant):
    assert tokenize(VARIANTS[variant], CITYSCAPES) == description(f"layout_{variant}")["tokens"]


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
def test_sane_siglip_has_its_context_first_and_is_read_at_the_last_word(name):
    pad = {"siglip": 1, "siglip2": 0}[name]
    ids = torch.tensor([[7, pad, pad, pad, pad], [9, 11, 5, pad, pad], [9, 11, 5, 4, 8]])
    encoder = TextEncoder(name, ids, sane=True)
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


def test_sane_changes_no_tower_with_a_start_token():
    ids = torch.tensor(tokenize("tiny", CITYSCAPES))
    torch.manual_seed(0)
    released = TextEncoder("tiny", ids, dim=32).eval()
    torch.manual_seed(0)
    context = torch.randn(1, 5, 64)
    sane = TextEncoder("tiny", ids, dim=32, sane=True).eval()
    sane.load_state_dict(released.state_dict())
    assert torch.equal(released(context), sane(context))
