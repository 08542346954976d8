"""On a GPU: CUDA graphs replay what the plain pass computes, for as many sizes as are kept, and count the operators they run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mfuser
from mfuser import fast, methods, ops
from mfuser.decoder.pixel_decoder import sine_encoding
from mfuser.deformable import extents
from mfuser.fast import graphs

pytestmark = pytest.mark.gpu


def build(name: str) -> mfuser.Segmentor:
    torch.manual_seed(0)
    options = {**methods.module(name).BACKBONES[-1], "image_size": (64, 64), "weights": "random"}
    return mfuser.build(name, **options).cuda().eval()


def images(count: int = 2, size: tuple[int, int] = (64, 64)) -> Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(count)).cuda()


@pytest.mark.parametrize("name", methods.names())
def test_a_replay_gives_what_the_plain_pass_gives(name):
    model = build(name)
    ready = fast.prepare(model, compile=False)
    first, replayed, again = ready(images()), ready(images()), ready(images())
    assert len(ready._kept) == 1, "captured where a size comes a second time"
    torch.testing.assert_close(replayed, first, rtol=1e-2, atol=1e-2 * float(first.abs().max()))
    assert torch.equal(replayed, again)
    with torch.no_grad():
        expected = model(images())
    assert (replayed.argmax(1) == expected.argmax(1)).float().mean() > 0.95


def test_results_of_a_replay_are_left_alone_by_the_next():
    ready = fast.prepare(build("linear"), compile=False)
    for _ in range(2):
        ready(images())
    before = ready(images())
    kept = before.clone()
    ready(images() * 0.5)
    assert torch.equal(before, kept)


def test_sizes_that_are_forgotten_are_captured_anew(monkeypatch):
    monkeypatch.setattr(graphs, "_MOST_GRAPHS", 2)
    ready = fast.prepare(build("linear"), compile=False)
    expected = {count: ready(images(count)) for count in (1, 2, 3)}
    for _ in range(3):
        for count, scores in expected.items():
            torch.testing.assert_close(ready(images(count)), scores, rtol=1e-2, atol=1e-2 * float(scores.abs().max()))
    assert len(ready._kept) == 2


def test_tables_that_a_graph_reads_outlive_other_sizes():
    ready = fast.prepare(build("mfuser"), compile=False)
    expected = [ready(images()) for _ in range(2)][-1]
    for side in range(1, 200):  # each forgets an older one
        sine_encoding(side, 1, 64, device=expected.device)
        extents(((side, 1),), device=expected.device)
    torch.full((1 << 24,), torch.nan, device=expected.device)  # into memory that has become free
    assert torch.equal(ready(images()), expected)


def test_what_cannot_be_captured_goes_on_without_a_graph():
    kept = graphs.Graphs()

    def asks(given: Tensor) -> Tensor:
        return given * given.sum().item()

    expected = kept.run("asks", asks, images())
    with pytest.warns(RuntimeWarning, match="without a CUDA graph for asks of 2x3x64x64: "):
        torch.testing.assert_close(kept.run("asks", asks, images()), expected)
    torch.testing.assert_close(kept.run("asks", asks, images()), expected)
    assert len(kept) == 0
    assert "asks of 2x3x64x64" in kept.refused
    torch.rand(3, device="cuda")  # the generator is not left in the capture
    for factor in (2.0, 3.0, 4.0):  # nor the memory
        for _ in range(3):
            found = kept.run(f"times {factor}", lambda given, factor=factor: given * factor, images())
        assert torch.equal(found, images() * factor)
    assert len(kept) == 3


def test_a_replay_counts_its_operators():
    ready = fast.prepare(build("mfuser"), compile=False)
    for _ in range(2):
        ready(images())
    before = ops.tally()
    ready(images())
    assert set(ops.ran_since(before)) >= {"ms_deform_attn", "mvfuser"}


def test_compiled_and_replayed_the_towers_are_one_graph_and_agree():
    from torch._dynamo.utils import counters

    model = build("mfuser")
    ready = fast.prepare(model)
    torch._dynamo.reset()
    counters.clear()
    found = [ready(images()) for _ in range(3)][-1]
    assert not counters["graph_break"]
    with torch.no_grad():
        expected = model(images())
    assert (found.argmax(1) == expected.argmax(1)).float().mean() > 0.95


def test_windows_fill_the_memory_that_there_is():
    ready = fast.prepare(build("linear"), compile=False)
    assert ready.at_once(18) == 18
    large = images(1, (100, 200))
    found = mfuser.slide(ready, large, (64, 64), (42, 42))
    torch.testing.assert_close(found, mfuser.slide(ready, large, (64, 64), (42, 42), windows_at_once=2), rtol=2e-2, atol=2e-2)
