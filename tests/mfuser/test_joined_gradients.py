"""Buckets of gradients: when they are filled, with what, and that all processes have the same ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import processes
import pytest
import torch
from torch import Tensor, nn

from dgbench.engine.team import join
from dgbench.launch import launched
from mfuser import joined_gradients
from mfuser.cuda_graphs import CaptureError
from mfuser.joined_gradients import Joined, arrivals


class Chain(nn.Module):
    """Weights one behind the other, of which the second is used again at the end; one is of 16 bits, and one is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.shared, self.b = (nn.Parameter(torch.full((70,), value)) for value in (2.0, 3.0, 5.0))
        self.narrow, self.unused = nn.Parameter(torch.ones(70, dtype=torch.bfloat16)), nn.Parameter(torch.ones(3))

    def gradients(self, factor: float = 1.0) -> Sequence[Tensor | None]:
        x = torch.arange(70.0) * factor * self.a * self.shared * self.narrow * self.b * self.shared
        return torch.autograd.grad(x.sum(), list(self.parameters()), allow_unused=True)

    def order(self) -> list[int]:
        with arrivals(list(self.parameters())) as order:
            self.gradients()
        return order


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each weight fills a bucket."""
    monkeypatch.setattr(joined_gradients, "BUCKET", 1)


def test_each_gradient_arrives_once_the_last_layers_first():
    chain = Chain()
    names = [name for name, _ in chain.named_parameters()]
    order = [names[index] for index in chain.order()]
    assert sorted(order) == ["a", "b", "narrow", "shared"]
    assert order.index("b") < order.index("narrow") < order.index("a")
    assert order.index("b") < order.index("shared")  # its last use is done, and its first is not yet
    assert not any(p._backward_hooks for p in chain.parameters())


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("size", [1, 300, 2**20])
def test_they_are_the_passs_own(within, size, monkeypatch):
    monkeypatch.setattr(joined_gradients, "BUCKET", size)
    chain = Chain()
    parameters = list(chain.parameters())
    joined = Joined(parameters, chain.order(), within=within)
    for factor in (1.0, -2.0):
        found = joined.of(lambda f=factor: chain.gradients(f))
        joined.finish()
        for own, expected in zip(found, chain.gradients(factor), strict=True):
            assert (own is None) == (expected is None)
            assert own is None or (own.dtype == expected.dtype and torch.equal(own, expected))
    storages = {own.untyped_storage().data_ptr() for own in found if own is not None}
    assert len(storages) == (2 if not within or size == 2**20 else 4 if size == 1 else 3)


@pytest.mark.usefixtures("_small")
def test_a_bucket_has_its_gradients_before_the_pass_ends():
    chain = Chain()
    joined = Joined(list(chain.parameters()), chain.order(), within=True)
    views = joined.of(chain.gradients)
    expected = chain.gradients(3.0)
    seen = []
    hook = chain.a.register_hook(lambda _: seen.append(views[2].clone()))
    joined.of(lambda: chain.gradients(3.0))
    hook.remove()
    assert torch.equal(seen[0], expected[2])


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("within", [True, False])
def test_gradients_of_other_weights_than_at_first_are_refused(within):
    chain = Chain()
    joined = Joined(list(chain.parameters()), [0, 1, 2], within=within)
    with pytest.raises(CaptureError, match="gradients of other weights each"):
        joined.of(chain.gradients)


@pytest.mark.usefixtures("_small")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a fork")
@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("within", [True, False])
def test_processes_have_the_same_buckets_and_means(within, same, tmp_path: Path):
    """Within the pass, or behind it where their gradients come in other orders."""

    def means() -> None:
        team = join(launched(), torch.device("cpu"))
        chain = Chain()
        order = chain.order()
        joined = Joined(list(chain.parameters()), order if same or team.main else order[::-1], within=within)
        found = joined.of(lambda: chain.gradients(1.0 + 2 * team.rank))
        early = [None if own is None else own.clone() for own in found]
        joined.finish()
        pairs = zip(chain.gradients(1.0), chain.gradients(3.0), strict=True)
        expected = [None if one is None else one / 2 + other / 2 for one, other in pairs]
        assert _equal(found, expected)
        assert _equal(early, expected) == (within and same)
        team.leave()

    ended = processes.together(means, 2, tmp_path)
    assert [one.status for one in ended] == [0, 0], ended


def _equal(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(one is other if one is None or other is None else torch.equal(one, other) for one, other in pairs)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a fork")
def test_processes_with_gradients_of_other_weights_each_are_refused(tmp_path: Path):
    def refused() -> None:
        team = join(launched(), torch.device("cpu"))
        with pytest.raises(CaptureError, match="gradients of other weights each"):
            Joined(list(Chain().parameters()), [2, 1, 0][team.rank :], within=True)
        team.leave()

    ended = processes.together(refused, 2, tmp_path)
    assert [one.status for one in ended] == [0, 0], ended
