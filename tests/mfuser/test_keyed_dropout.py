"""Dropout that follows from a seed and an element's place in the whole batch: its distribution, its parts, compiled or not."""

from __future__ import annotations

import copy
from itertools import combinations

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from dgbench.engine.parallel import dropping_as_one
from mfuser.keyed_dropout import Place, factors, is_keyed, key, place_of
from mfuser.processes import part_of

SEEDS = torch.randint(2**62, (24,), generator=torch.Generator().manual_seed(0))
EXPECTED = [[1, 0, 1, 0, 1, 0, 0, 0, 1, 1, 0, 1], [1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0, 1]]


def keyed(drop: nn.Module) -> nn.Module:
    assert key(drop, Place()) == 1
    return drop.train()


def in_parts(drop: nn.Module, x: Tensor, images: int, parts: int) -> list[Tensor]:
    """What is left of each part, with the seed of the whole."""
    model, labels, found = nn.Sequential(nn.Linear(1, 1), drop), torch.zeros(images, 1, 1).chunk(parts), []
    for index, part in enumerate(x.chunk(parts)):
        torch.manual_seed(0)
        with part_of(labels, index), dropping_as_one(model, images // parts):
            found.append(drop(part))
    return found


def deviations(keep: float) -> dict[str, Tensor]:
    """Sums over (8, 64, 512) elements for each seed, in standard deviations of independent draws."""
    drawn = torch.stack([factors(torch.Size((8, 64, 512)), seed, keep) for seed in SEEDS])
    assert set(drawn.unique().tolist()) == {0, 1}
    x = (drawn - keep) / (keep * (1 - keep)) ** 0.5
    flat = x.flatten(1)
    found = {"share": flat.sum(1) / flat.shape[1] ** 0.5}
    for lag in (1, 2, 3, 7, 64, 512, 64 * 512):
        found[f"distance {lag}"] = (flat[:, lag:] * flat[:, :-lag]).sum(1) / (flat.shape[1] - lag) ** 0.5
    pairs = [(first * second).sum() / len(first) ** 0.5 for first, second in combinations(flat, 2)]
    near = [factors(x[0].shape, SEEDS[0] ^ (1 << bit), keep).flatten() for bit in range(0, 62, 3)]
    pairs += [((other - keep) * flat[0]).sum() / (keep * (1 - keep) * len(other)) ** 0.5 for other in near]
    found["seeds"] = torch.stack(pairs)
    for name, dims in (("rows", (2, 3)), ("columns", (1, 2))):
        sums = x.sum(dims) / (64 * 512 if name == "rows" else 8 * 64) ** 0.5
        found[name] = (sums.square().mean(1) - 1) * (sums.shape[1] / 2) ** 0.5
    return found


@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_draws_are_independent_and_as_many_are_kept_as_asked_for(keep):
    for name, found in deviations(keep).items():
        assert float(found.abs().max()) < 5, name
        assert 0.4 < float(found.square().mean()) < 2, name


def test_numbers_stay_as_they_are():
    """A resumed run of another version would go on with others."""
    assert factors(torch.Size((2, 12)), torch.tensor(2**61 + 12345), 0.5).int().tolist() == EXPECTED


@pytest.mark.parametrize(
    ("drop", "shape"),
    [
        (nn.Dropout(0.3), (4, 5, 6)),
        (nn.Dropout2d(0.3), (4, 5, 3, 3)),
        (DropPath(0.5), (4, 5, 6)),
        (DropPath(0.5, scale_by_keep=False), (4, 5)),
    ],
    ids=["elements", "channels", "paths", "unscaled paths"],
)
def test_a_modules_draws_are_of_its_kind_and_parts_are_those_of_the_whole(drop, shape):
    drop = keyed(drop)
    x = torch.rand(shape).add(1).requires_grad_()
    p = drop.drop_prob if isinstance(drop, DropPath) else drop.p
    scale = 1 if getattr(drop, "scale_by_keep", True) is False else 1 / (1 - p)
    seen = []
    for seed in range(20):
        torch.manual_seed(seed)
        out = drop(x)
        kept = out != 0
        torch.testing.assert_close(out, torch.where(kept, x * scale, 0))
        (grad,) = torch.autograd.grad(out.sum(), x)
        torch.testing.assert_close(grad, kept * torch.tensor(float(scale)))
        groups = kept.flatten(0 if isinstance(drop, nn.Dropout) else 2 if isinstance(drop, nn.Dropout2d) else 1)
        if not isinstance(drop, nn.Dropout):
            assert (groups.all(-1) | ~groups.any(-1)).all()
        seen.append(kept)
    assert 0.3 < torch.stack(seen).float().mean() < 0.85
    torch.manual_seed(0)
    whole = drop(x)
    for parts in (1, 2, 4):
        assert torch.equal(torch.cat(in_parts(drop, x, 4, parts)), whole)


def test_rows_that_are_no_images_are_dropped_alike_by_all():
    drop, texts = keyed(nn.Dropout(0.5)), torch.ones(19, 8)
    model = nn.Sequential(nn.Linear(1, 1), drop)
    torch.manual_seed(0)
    whole, found = drop(texts), []
    for index in range(2):
        torch.manual_seed(0)
        with part_of(torch.zeros(4, 1, 1).chunk(2), index), dropping_as_one(model, 2):
            found.append(drop(texts))
    assert torch.equal(found[0], whole)
    assert torch.equal(found[1], whole)


def test_in_evaluation_and_at_a_rate_of_0_nothing_is_drawn():
    x = torch.rand(2, 3)
    before = torch.get_rng_state()
    for drop in (keyed(nn.Dropout(0.5)).eval(), keyed(nn.Dropout(0.0))):
        assert drop(x) is x
    assert torch.equal(torch.get_rng_state(), before)
    assert not keyed(nn.Dropout(1.0))(x).any()


def test_16_bits_are_rounded_once():
    drop, x = keyed(nn.Dropout(0.1)), torch.randn(64, 64).bfloat16()
    out = drop(x)
    assert out.dtype is torch.bfloat16
    assert torch.equal(out, torch.where(out != 0, (x.double() / 0.9).bfloat16(), 0))


def test_a_copy_draws_as_torch_does():
    drop = nn.Sequential(nn.Linear(2, 2), keyed(nn.Dropout(0.5)))
    assert key(drop, Place()) == 0  # it is already
    assert place_of(drop) is not None
    copied = copy.deepcopy(drop)
    assert is_keyed(drop[1])
    assert not is_keyed(copied[1])
    assert place_of(copied) is None
    x = torch.ones(64)
    torch.manual_seed(0)
    expected = nn.Dropout(0.5)(x)
    torch.manual_seed(0)
    assert torch.equal(copied[1](x), expected)


class Block(nn.Module):
    """Both kinds, and a layer between them."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.linear, self.path = nn.Dropout(0.2), nn.Linear(8, 8), DropPath(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.path(self.drop(self.linear(x)).sin())


def test_compiled_it_is_the_same_in_one_graph_that_keeps_no_draws():
    from torch._dynamo.utils import counters

    torch.manual_seed(0)
    blocks, place = [Block().train() for _ in range(3)], Place()
    x = torch.randn(4, 128, 8).requires_grad_()
    for block in blocks:
        key(block, place)

    def run(parts: int) -> list[Tensor]:
        found = []
        for index, part in enumerate(x.chunk(parts)):
            torch.manual_seed(1)
            with part_of(torch.zeros(4, 1, 1).chunk(parts), index), dropping_as_one(nn.ModuleList(blocks), 4 // parts):
                out = part
                for block in blocks:
                    out = block(out)
                found.append([out.detach(), *torch.autograd.grad(out.square().sum(), x)])
        return [torch.cat([out for out, _ in found]), torch.stack([grad for _, grad in found]).sum(0)]

    expected, halves = run(1), run(2)
    for block in blocks:
        block.compile(dynamic=False, fullgraph=True)
    torch._dynamo.reset()
    counters.clear()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compiled = run(1)
    assert counters["stats"]["unique_graphs"] == 1
    large = [tensor for tensor in kept if tensor.numel() >= x.numel()]
    assert {tensor.dtype for tensor in large} == {torch.float32}
    assert len(large) == 2 * len(blocks) + 1  # a product's input, what its sine is of, and what is squared
    for found in (halves, compiled, run(2), run(2)):
        for actual, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2  # one more for a part's size


class Twice(nn.Module):
    """One dropout of two tensors of one shape, as a fuser drops what it adds to both towers' tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.drop(2 * x), self.drop(3 * x)


@pytest.mark.parametrize("backend", ["aot_eager_decomp_partition", "inductor"])
def test_compiled_each_call_of_one_dropout_draws_anew(backend):
    """A compiler may take two draws that are asked for alike for one."""
    block, x = Twice().train(), torch.ones(4, 64, requires_grad=True)
    key(block, Place())
    torch.manual_seed(1)
    expected = block(x)
    torch.manual_seed(1)
    found = torch.compile(block, fullgraph=True, backend=backend)(x)
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found[0] > 0, found[1] > 0)


@pytest.mark.gpu
def test_a_gpu_draws_what_a_cpu_does_compiled_or_not():
    shape, part = torch.Size((2, 301, 257)), torch.tensor(3)
    expected = factors(shape, SEEDS[0], 0.9, part)
    for draw in (factors, torch.compile(factors, dynamic=False, fullgraph=True)):
        assert torch.equal(draw(shape, SEEDS[0].cuda(), 0.9, part.cuda()).cpu(), expected)
