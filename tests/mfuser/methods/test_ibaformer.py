"""IBAFormer: attention to other images, written out image by image; evaluation; what is said of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import mfuser
from dgbench.recipe import load_recipe
from mfuser import methods
from mfuser.methods.ibaformer import IntraBatchAttention, intra_batch
from mfuser.segmentor import Batch, Segmentor
from mfuser.towers.key_rules import MIT_FILE
from mfuser.towers.loading import fill, load_tower, published
from mfuser.towers.mit import Attention, MiTEncoder
from mfuser.towers.table import TOWERS, HubFile


def built(**options: object) -> Segmentor:
    torch.manual_seed(0)
    return mfuser.build("ibaformer", backbone="tiny_mit", image_size=(64, 64), **options)


def attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of one image, (heads, N, d), by its formula."""
    weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
    return weights @ value


def parts() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(4, 2, 6, 5), torch.randn(4, 2, 3, 5), torch.randn(4, 2, 3, 5)


def test_attention_by_element_is_the_mean_of_the_attentions_to_each_other_image() -> None:
    query, key, value = parts()
    found = intra_batch(query, key, value, by="element")
    for b in range(4):
        others = [attended(query[b], key[o], value[o]) for o in range(4) if o != b]
        torch.testing.assert_close(found[b], torch.stack(others).mean(0))


def test_attention_by_mean_is_to_the_mean_keys_and_values_of_the_other_images() -> None:
    query, key, value = parts()
    found = intra_batch(query, key, value, by="mean")
    for b in range(4):
        rest = [o for o in range(4) if o != b]
        torch.testing.assert_close(found[b], attended(query[b], key[rest].mean(0), value[rest].mean(0)))


@pytest.mark.parametrize("attention", ["element", "mean"])
@pytest.mark.parametrize("combine", ["mean", "sum", "learned"])
def test_in_training_an_image_sees_the_others_and_in_evaluation_it_does_not(attention: str, combine: str) -> None:
    own, others = torch.randn(1, 6, 8), torch.randn(2, 6, 8)
    layer = IntraBatchAttention(8, 2, 1, by=attention, combine=combine)
    if combine == "learned":
        torch.nn.init.ones_(layer.share)
    a, b = torch.cat([own, others[:1]]), torch.cat([own, others[1:]])
    with torch.no_grad():
        assert not torch.allclose(layer(a, (2, 3))[0], layer(b, (2, 3))[0])
        layer.eval()
        torch.testing.assert_close(layer(a, (2, 3))[0], layer(b, (2, 3))[0])


def test_evaluation_is_that_of_a_plain_mit() -> None:
    model = built(combine="learned")
    plain = MiTEncoder("tiny_mit").eval()
    own = {name: value for name, value in model.encoder.state_dict().items() if not name.endswith(".share")}
    plain.load_state_dict(own)
    images = torch.rand(2, 3, 50, 70)
    with torch.no_grad():
        for found, expected in zip(model.encoder(images), plain(images), strict=True):
            assert torch.equal(found, expected)


def test_a_learned_share_begins_at_none_and_moves() -> None:
    model = built(combine="learned").train()
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith(".share"))
    model.loss(Batch(torch.rand(3, 3, 64, 64), torch.randint(0, 19, (3, 64, 64))))["loss_seg"].backward()
    grads = [p.grad for name, p in model.named_parameters() if name.endswith(".share")]
    assert len(grads) == 4
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)


@pytest.mark.parametrize("head", ["daformer", "segformer"])
def test_the_loss_moves_all_parameters_with_either_head(head: str) -> None:
    model = built(head=head).train()
    model.loss(Batch(torch.rand(2, 3, 64, 64), torch.randint(0, 19, (2, 64, 64))))["loss_seg"].backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert not still


def test_published_weights_have_no_learned_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = MiTEncoder("tiny_mit").trunk.state_dict()
    source = published("mit_b5", "trunk")
    save_file({source(name).keys[0]: value for name, value in plain.items()}, tmp_path / "model.safetensors")
    weights = HubFile("somebody/mit", "model.safetensors", 0.001)
    monkeypatch.setitem(TOWERS, "tiny_mit", dataclasses.replace(TOWERS["tiny_mit"], weights=weights, keys=MIT_FILE))
    model = mfuser.build("ibaformer", backbone="tiny_mit", combine="learned", weights="meta", image_size=(64, 64))
    load_tower("tiny_mit", tmp_path / "model.safetensors", {"trunk": model.encoder.trunk})
    for name, value in model.encoder.trunk.state_dict().items():
        assert value.is_meta if name.endswith(".share") else torch.equal(value, plain[name])
    fill(model)
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith(".share"))


def test_full_size_has_the_parameters_of_mit_b5_and_daformers_head() -> None:
    model = mfuser.build("ibaformer", weights="meta")
    assert sum(p.numel() for p in model.parameters()) == 81_443_008 + 3_712_275


def test_it_is_called_reconstructed() -> None:
    assert methods.constants("ibaformer")["TITLE"] == "IBAFormer (reconstructed)"
    assert methods.constants("ibaformer")["FIDELITY"] == "reconstructed"
    assert not methods.releases("ibaformer")
    assert load_recipe("streets/ibaformer").method.variant == "tiny_mit, reconstructed"  # the label of its records
    assert load_recipe("streets/shade-mit").method.variant == "tiny_mit"


def test_unknown_choices_are_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="attention `each` is unknown; choose from element, mean"):
        built(attention="each")
    with pytest.raises(ValueError, match="backbone `resnet50` is no MiT; choose from mit_b5, tiny_mit"):
        mfuser.build("ibaformer", backbone="resnet50")


def test_plain_attention_is_pytorchs() -> None:
    layer, theirs = Attention(8, 2, 1), torch.nn.MultiheadAttention(8, 2, batch_first=True)
    theirs.in_proj_weight.data = torch.cat([layer.q.weight, layer.kv.weight]).detach()
    theirs.in_proj_bias.data = torch.cat([layer.q.bias, layer.kv.bias]).detach()
    theirs.out_proj.load_state_dict(layer.proj.state_dict())
    x = torch.randn(2, 6, 8)
    torch.testing.assert_close(layer(x, (2, 3)), theirs(x, x, x)[0])
