"""Words in sentences, embedded by a text tower."""

from __future__ import annotations

import copy

import open_clip
import torch
from torch.nn import functional as F

from mfuser.segmentor import CITYSCAPES
from mfuser.towers.prompts import SYNONYMS, TEMPLATES, PromptEncoder
from mfuser.towers.text import prompt_tower


def test_every_class_has_its_words_and_the_first_is_its_name() -> None:
    assert tuple(words[0] for words in SYNONYMS) == CITYSCAPES
    assert (sum(map(len, SYNONYMS)), len(TEMPLATES)) == (59, 14)
    assert [len(words) for words in SYNONYMS] == [2, 2, 6, 6, 2, 2, 2, 2, 5, 10, 2, 1, 1, 2, 2, 2, 5, 2, 3]


def test_embeddings_are_the_prompt_ensemble_of_open_clips_own_forward() -> None:
    words = ["road", "traffic light", "freight train"]
    encoder = PromptEncoder("tiny_cnn", words, dim=32).eval()
    # open_clip's forward reads all 77 places of its tokenizer's lines
    theirs = prompt_tower("tiny_cnn", length=77, dim=32).eval()
    state = encoder.tower.state_dict()
    length = len(state["positional_embedding"])
    assert length < 20
    state["positional_embedding"] = F.pad(state["positional_embedding"], (0, 0, 0, 77 - length), value=9.0)
    theirs.load_state_dict(state)
    tokenizer = open_clip.get_tokenizer("convnext_large_d_320")
    expected = []
    with torch.no_grad():
        for word in words:
            each = F.normalize(theirs(tokenizer([template.format(word) for template in TEMPLATES])), dim=-1)
            expected.append(F.normalize(each.mean(0), dim=0))
        torch.testing.assert_close(encoder(), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_a_frozen_tower_reads_once_and_again_when_other_weights_are_loaded() -> None:
    encoder = PromptEncoder("tiny_cnn", ["car", "bus"], TEMPLATES[:2]).requires_grad_(False)
    with torch.inference_mode():
        first = encoder()
    assert encoder() is first
    assert not first.is_inference(), "a training may go on with it"
    assert "kept" not in encoder.state_dict()
    other = PromptEncoder("tiny_cnn", ["car", "bus"], TEMPLATES[:2]).requires_grad_(False)
    twin = copy.deepcopy(encoder)
    encoder.load_state_dict(other.state_dict())
    torch.testing.assert_close(encoder(), other())
    assert not torch.equal(encoder(), first)
    assert torch.equal(twin(), first)


def test_a_trained_tower_reads_every_time() -> None:
    encoder = PromptEncoder("tiny_cnn", ["car", "bus"], TEMPLATES[:2])
    encoder().sum().backward()
    assert encoder.tower.token_embedding.weight.grad is not None
    assert encoder.kept is None
