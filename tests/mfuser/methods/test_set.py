"""SET against key names and counts of the authors' code; its tokens are compared in tests/mfuser/test_adapters.py."""

from __future__ import annotations

import pytest
import torch
from golden_files import description

import mfuser
from mfuser.authors import recognise, release_of, sources_of
from mfuser.segmentor import Batch


def small(**options: object) -> mfuser.Segmentor:
    torch.manual_seed(0)
    return mfuser.build("set", **{"vfm": "tiny", "image_size": (64, 64), **options})


def test_at_full_size_keys_and_counts_are_the_authors():
    model, layout = mfuser.build("set", weights="meta"), description("layout_set")
    assert sum(p.numel() for p in model.reins.parameters()) == 7_546_881
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 28_126_677
    state = model.state_dict()
    sources = sources_of(model, release_of(model), state)
    assert {source.keys[0]: list(state[name].shape) for name, source in sources.items()} == {
        key: list(shape) for key, shape in layout.items()
    }


def test_a_checkpoint_of_set_is_not_taken_for_one_of_rein():
    state = dict.fromkeys(description("layout_set"), torch.zeros(1))
    assert [name for name, _ in recognise(state)] == ["set"]


def test_as_released_an_images_scores_depend_on_its_batch_and_over_the_image_plane_they_do_not():
    images = torch.rand(3, 3, 64, 64)
    for variant in ("release", "sane"):
        model = small(variant=variant).eval()
        model.reins.scale.data.fill_(0.5)
        with torch.no_grad():
            together, alone = model(images)[1:2], model(images[1:2])
        assert model.mixes_batch == (variant == "release")
        assert torch.allclose(together, alone, rtol=1e-3, atol=1e-4) != model.mixes_batch


def test_tokens_of_phase_and_amplitude_have_no_weight_decay():
    model = small()
    spared = {id(p) for group in model.groups(1e-4, 0.05) if not group["weight_decay"] for p in group["params"]}
    for name in ("learnable_tokens_a", "learnable_tokens_b", "learnable_tokens2", "scale"):
        assert id(getattr(model.reins, name)) in spared


@pytest.mark.parametrize("variant", ["release", "sane"])
def test_every_loss_term_moves_the_tokens_of_phase_and_of_amplitude(variant):
    model = small(variant=variant, freeze_towers=True).train()
    labels = torch.zeros(2, 64, 64, dtype=torch.long)
    labels[:, 32:, :32] = 13
    terms = model.loss(Batch(torch.rand(2, 3, 64, 64), labels))
    tokens = [model.reins.learnable_tokens_a, model.reins.learnable_tokens2]
    assert len(terms) == 12
    for name, term in terms.items():
        gradients = torch.autograd.grad(term, tokens, retain_graph=True, allow_unused=True)
        assert term > 0, name
        assert gradients[0].any(), name
    total = torch.stack(list(terms.values())).sum()
    assert torch.autograd.grad(total, tokens)[1].any()


def test_a_variant_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="variant `paper` is unknown; choose from release, sane"):
        small(variant="paper")
