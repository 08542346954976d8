"""Prepared copies against their models: scores, one graph for all layers of a kind, windows, and what stays as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import mfuser
from mfuser import fast, methods
from mfuser.fast.blocks import Block
from mfuser.fast.compiled import keep_in
from mfuser.pairs import paired

TINY = {name: methods.module(name).BACKBONES[-1] for name in mfuser.method_names()}


def build(name: str, **options: object) -> mfuser.Segmentor:
    """A tiny model whose vectors (scales, biases) are no zeros and ones, which would hide what they scale."""
    torch.manual_seed(0)
    model = mfuser.build(name, **{**TINY[name], "image_size": (64, 64), **options})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() <= 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def images(count: int = 2, size: tuple[int, int] = (64, 64)) -> Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(1))


def exact(model: mfuser.Segmentor, given: Tensor) -> Tensor:
    with torch.no_grad():
        return model(given)


@pytest.mark.parametrize("name", mfuser.method_names())
def test_a_copy_in_fp32_equals_its_model_to_rounding(name):
    model = build(name)
    expected = exact(model, images())
    found = fast.prepare(model, dtype=torch.float32, compile=False)(images())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=3e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("name", mfuser.method_names())
def test_a_copy_in_bf16_agrees_with_its_model(name):
    model = build(name)
    expected = exact(model, images())
    found = fast.prepare(model, compile=False)(images())
    assert found.dtype is torch.float32
    # random models are nearly undecided between classes: trained ones agree on more pixels
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    assert (found.argmax(1) == expected.argmax(1)).float().mean() > 0.97


@pytest.mark.parametrize(
    "options",
    [
        {"fuser": "none"},
        {"fuser": "mvfuser_bidir"},
        {"fuser": "bi_deform_attn"},
        {"fuser": "selfattn_concat"},
        {"enhancer": "none"},
        {"image_tower": "vfm"},
        {"image_tower": "vlm"},
        {"variant": "sane"},
        {"vfm": "mini_vfm", "vlm": "mini_vlm"},
    ],
    ids=lambda options: ",".join(map(str, options.values())),
)
def test_every_form_of_mfuser_is_equal(options):
    model = build("mfuser", **options)
    expected = exact(model, images())
    found = fast.prepare(model, dtype=torch.float32, compile=False)(images())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_model_that_was_paired_for_training_is_paired_anew():
    model = build("mfuser")
    assert len(paired(model)) == len(model.adapters)
    expected = exact(model, images())
    ready = fast.prepare(model, dtype=torch.float32, compile=False)
    assert "pairs" in ready.rewritten
    assert all(isinstance(pair.vfm, Block) for pair in ready._model.pairs)
    torch.testing.assert_close(ready(images()), expected, rtol=1e-4, atol=1e-5)


def test_the_model_stays_as_it_is():
    model = build("mfuser")
    model.enter_training()
    before, trained = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    fast.prepare(model.train(), compile=False)(images())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [p.requires_grad for p in model.parameters()] == trained
    assert model.training


def test_masks_are_those_of_the_model():
    model = build("rein")
    with torch.no_grad():
        expected = model.masks(images())
    found = fast.prepare(model, dtype=torch.float32, compile=False).masks(images())
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-4, atol=1e-4)
    assert fast.prepare(build("linear"), compile=False).masks(images()) is None


def test_sizes_are_checked_as_the_model_does():
    with pytest.raises(ValueError, match="was built for images of"):
        fast.prepare(build("linear"), compile=False)(images(size=(32, 64)))


def test_a_method_that_cannot_is_named():
    model = build("linear")
    model.no_fast = "it waits for the host"
    with pytest.raises(ValueError, match="`linear` has no fast inference: it waits for the host; score it in exact mode"):
        fast.prepare(model)


def test_another_type_is_refused():
    with pytest.raises(ValueError, match="dtype is torch.float16; fast inference takes bfloat16, float32"):
        fast.prepare(build("linear"), dtype=torch.float16)


def test_class_texts_are_computed_once_and_bit_equal():
    model = build("tqdm")
    expected, ran = exact(model, images()), []
    model.text.tower.register_forward_pre_hook(lambda *_: ran.append(1))
    model.text.tower.transformer.register_forward_pre_hook(lambda *_: ran.append(1))
    exact(model, images())
    assert ran, "the tower is seen to run"
    assert fast.hold_texts(model)
    ran.clear()
    assert torch.equal(exact(model, images()), expected)
    assert not ran
    assert not fast.hold_texts(build("linear"))


def test_windows_go_through_in_parts_of_one_size():
    ready = fast.prepare(build("linear"), compile=False)
    assert [ready.at_once(windows) for windows in (1, 7, 16, 17, 18, 40)] == [1, 8, 16, 9, 9, 8]
    assert len({ready.at_once(windows) for windows in range(1, 500)}) < 10, "each number is compiled and captured"
    seen: list[int] = []

    class Watched:
        mixes_batch = False
        at_once = staticmethod(ready.at_once)

        def __call__(self, given: Tensor) -> Tensor:
            seen.append(len(given))
            return ready(given)

    large = images(1, (64, 64 + 16 * 16))
    found = mfuser.slide(Watched(), large, (64, 64), (16, 16))
    assert seen == [9, 9], "17 windows, the last one shown twice"
    torch.testing.assert_close(found, mfuser.slide(ready, large, (64, 64), (16, 16), windows_at_once=4))


def test_slide_over_a_copy_agrees_with_slide_over_the_model():
    model, large = build("mfuser"), images(2, (80, 150))
    expected = mfuser.slide(model, large, (64, 64), (42, 42))
    found = mfuser.slide(fast.prepare(model, compile=False), large, (64, 64), (42, 42))
    assert found.dtype is torch.float32
    assert (found.argmax(1) == expected.argmax(1)).float().mean() > 0.97


def test_all_blocks_of_a_tower_are_one_graph():
    model = build("source-only", backbone="tiny")
    assert model.get_submodule("encoder").depth > 1
    ready = fast.prepare(model)
    torch._dynamo.reset()
    counters.clear()
    found = ready(images())
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert fast.seconds() > 0
    again = ready(images())
    assert counters["stats"]["unique_graphs"] == 1
    assert torch.equal(found, again)
    expected = exact(model, images())
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_both_towers_and_the_fuser_of_every_step_are_one_graph():
    model = build("mfuser")
    ready = fast.prepare(model)
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        d, v = ready._model.vfm.embed(images()), ready._model.vlm.embed(images())
        for step in range(len(ready._model.pairs)):
            d, v = ready._model.pair(step, d, v, ready._model.vfm.rope(), ready._model.vlm.rope())
    assert len(ready._model.pairs) > 1
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.fixture
def graphs():
    """Count graphs without compiling them."""
    torch._dynamo.reset()
    counters.clear()
    with torch.compiler.set_stance("default", force_backend="eager"):
        yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["mfuser", "tqdm", "rein"])
def test_every_layer_is_traced_whole_and_once(name, graphs):
    ready = fast.prepare(build(name))
    first = ready(images())
    traced = graphs()
    assert traced > 1
    assert not counters["graph_break"]
    assert torch.equal(ready(images()), first)
    with torch.inference_mode():  # as `slide` and `dgbench eval` call it: their tensors are of another kind
        assert torch.equal(ready(images().clone()), first)
    assert graphs() == traced
    expected = exact(build(name), images())
    assert (first.argmax(1) == expected.argmax(1)).float().mean() > 0.97


def test_the_first_16_numbers_of_windows_are_compiled(graphs):
    model = build("linear")
    ready = fast.prepare(model)
    for count in range(1, 17):
        ready(images(count))
        assert graphs() == count
    last = ready(images(17))
    assert graphs() == 16
    assert (last.argmax(1) == exact(model, images(17)).argmax(1)).float().mean() > 0.97


def test_images_of_other_sizes_are_compiled_when_they_come_again(graphs):
    model = build("ibaformer")
    assert model.any_size
    ready = fast.prepare(model)
    for side in (64, 96, 128, 96):
        ready(images(1, (64, side)))
    assert ready._sizes == {(1, 3, 64, 64), (1, 3, 64, 96)}


def test_graphs_are_kept_apart_by_the_vector_instructions_of_the_cpu(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    folder = keep_in(tmp_path)
    assert folder.parent == tmp_path
    assert torch.backends.cpu.get_cpu_capability().lower() in folder.name
    assert torch.__version__ in folder.name
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    assert str(keep_in(tmp_path)) == "elsewhere"
