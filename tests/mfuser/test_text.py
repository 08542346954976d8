from __future__ import annotations

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
