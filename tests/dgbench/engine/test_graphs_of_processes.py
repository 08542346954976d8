"""Graphs of a training's pass in two processes: gradients, without `DistributedDataParallel`, are those with it.

On a CPU, a recorder does the calls again in place of CUDA graphs; `tests/test_processes.py` trains with those on GPUs.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

import processes
import pytest
import torch
from recorders import Again
from torch import Tensor, nn

import mfuser
from dgbench.engine import step
from dgbench.engine.device import accelerator_on
from dgbench.engine.parallel import Loss, prepared, with_norms
from dgbench.engine.team import ALONE, join
from dgbench.errors import RecipeError
from dgbench.launch import launched
from dgbench.recipe.training import TrainSpec
from mfuser.segmentor import Batch, Segmentor
from mfuser.training_graphs import TrainingGraphs

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a fork")

CPU = torch.device("cpu")


class Small(Segmentor):
    """Without BatchNorm: dropout, layouts of several kinds, a weight without a gradient, one of 16 bits, and a frozen one.

    extra: the loss has a weight of its own: before what is captured, or behind.
    """

    method, image_size = "small", (64, 64)

    def __init__(self, extra: str = "") -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(8, 3, 1, bias=False))
        self.scale, self.unused = nn.Parameter(torch.ones(3, 1, 1)), nn.Parameter(torch.ones(5))
        self.narrow = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        self.frozen = nn.Parameter(torch.ones(3, 1, 1, dtype=torch.bfloat16), requires_grad=False)
        self.register_buffer("known", torch.tensor(True))
        self.own = nn.Parameter(torch.ones(1), requires_grad=bool(extra))
        self.extra = extra

    def training_outputs(self, images: Tensor) -> Tensor:
        # in the layout of the mean's gradient, in which its own is then summed as without graphs
        return (self.body(images) * self.scale * self.narrow * self.frozen).contiguous()

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        before = {"before": self.own.square().sum()} if self.extra == "before" else {}
        terms = {"loss": self.training_outputs(batch.images).square().mean()}
        return terms | before | ({"behind": self.own.square().sum()} if self.extra == "behind" else {})


def build(name: str, seed: int) -> Segmentor:
    torch.manual_seed(seed)
    if name.startswith("small"):
        made: Segmentor = Small(name.partition(" ")[2])
    else:
        made = mfuser.build(name, vfm="tiny", image_size=(64, 64), weights="random", freeze_towers=True)
    made.enter_training()
    return made.train()


def batch(at: int, rank: int, world: int) -> Batch:
    """One process's part of four images."""
    numbers = torch.Generator().manual_seed(at)
    pixels, labels = torch.rand(4, 3, 64, 64, generator=numbers), torch.randint(0, 19, (4, 64, 64), generator=numbers)
    own = slice(4 // world * rank, 4 // world * (rank + 1))
    return Batch(pixels[own].contiguous(memory_format=torch.channels_last), labels[own])


def trained(name: str, file: Path, *, graphs: bool, own: bool = False, steps: int = 3) -> None:
    """Keep the gradients of some steps with other data each.

    Args:
        own: each process begins with weights of its own, in place of which it gets the first one's.
    """
    team = join(launched(), CPU)
    spec = TrainSpec(steps=steps, batch_size=4)
    accelerator = accelerator_on(CPU, "no", team=team)
    model = build(name, team.rank if own else 0)
    if graphs:
        model.training_outputs = TrainingGraphs(model, Again)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model.to(memory_format=torch.channels_last)
    loss_of, optimizer = prepared(accelerator, Loss(model), optimizer, averaged=graphs)
    found = []
    for at in range(steps):
        # each process's loss is of its part; the mean over both is the whole batch's
        loss, _ = step.gradients(accelerator, loss_of, model, batch(at, team.rank, team.world), spec=spec, team=team, seed=at)
        grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        assert all(p.grad.stride() == p.stride() for p in model.parameters() if p.grad is not None)
        found.append({"loss": torch.tensor(team.mean([float(loss)])), **grads})
        accelerator.clip_grad_norm_(model.parameters(), 1e-2)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    found.append(dict(model.state_dict()))
    torch.save(found, f"{file}.{team.rank}")
    team.leave()


def of(name: str, folder: Path, world: int, **how: bool) -> list[list[dict[str, Tensor]]]:
    """What each process kept."""
    file = folder / f"{world}-{how}"
    ended = processes.together(lambda: trained(name, file, **how), world, folder)
    assert [one.status for one in ended] == [0] * world, ended
    return [torch.load(f"{file}.{rank}", weights_only=True) for rank in range(world)]


@pytest.mark.parametrize("name", ["small", "rein"])
def test_gradients_are_those_of_ddp_and_of_one_process_with_the_whole_batch(name: str, tmp_path: Path) -> None:
    """Bit for bit those of DDP, whose weights they begin with as well; buckets or not, two numbers have one sum."""
    graphs = of(name, tmp_path, 2, graphs=True, own=True)
    plain = of(name, tmp_path, 2, graphs=False, own=True)
    assert graphs[0][0].keys() > {"loss"}
    for own, other in zip((*graphs[0], *graphs[1]), (*plain[0], *plain[1]), strict=True):
        assert own.keys() == other.keys()
        assert [key for key, value in own.items() if not torch.equal(value, other[key])] == []
    (whole,) = of(name, tmp_path, 1, graphs=False)
    largest = max(float(value.norm()) for key, value in whole[0].items() if key != "loss")
    for key, value in whole[0].items():
        found = graphs[0][0][key]
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5 * largest, msg=lambda text, k=key: f"{k}: {text}")


@pytest.mark.parametrize("where", ["before", "behind"])
def test_trained_weights_outside_of_what_is_captured_are_refused(where: str, tmp_path: Path) -> None:
    """Nobody would average their gradients."""

    def refused() -> None:
        with pytest.raises(RecipeError, match=r"train.graphs: `small` cannot be captured: its loss has trained weights outside"):
            trained(f"small {where}", tmp_path / "never", graphs=True)

    ended = processes.together(refused, 2, tmp_path)
    assert [one.status for one in ended] == [0, 0], ended


def test_statistics_by_gloo_are_refused() -> None:
    """A GPU that processes share has gloo, which cannot be captured."""
    model = mfuser.build("mfuser", vfm="tiny", vlm="tiny", image_size=(64, 64), weights="random").train()
    spec, team = TrainSpec(steps=1, batch_size=4, graphs=True), copy.copy(ALONE)
    team.world, team.backend = 2, "gloo"
    synchronized, _ = with_norms(model, team, torch.device("cuda"), local=False)
    with pytest.raises(RecipeError, match=r"train.graphs: 2 processes exchange .* of \d+ BatchNorm layers by gloo") as caught:
        step.prepare(synchronized, spec, team, torch.device("cuda"))
    assert caught.value.hint == "--set train.graphs=false, or a GPU for each process"
    team.backend = "nccl"
    assert step.prepare(synchronized, spec, team, torch.device("cuda")).said == "CUDA graphs"
