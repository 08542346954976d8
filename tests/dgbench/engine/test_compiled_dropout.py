"""Dropout in compiled blocks: gradients of several processes, and of a batch's parts, are those of one process with all of it."""

from __future__ import annotations

import os
from pathlib import Path

import processes
import pytest
import torch
from recorders import Again
from timm.layers import DropPath
from torch import Tensor, nn

from dgbench.engine import step
from dgbench.engine.device import accelerator_on
from dgbench.engine.parallel import Loss, prepared
from dgbench.engine.team import join
from dgbench.launch import launched
from dgbench.recipe.training import TrainSpec
from mfuser.keyed_dropout import is_keyed
from mfuser.segmentor import Batch, Segmentor
from mfuser.training_graphs import TrainingGraphs

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a fork")

CPU = torch.device("cpu")
IMAGES = 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop, self.path = nn.Linear(8, 8), nn.Dropout(0.4), DropPath(0.4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.path(self.drop(self.linear(x)))
        return out


class Dropping(Segmentor):
    """Compiled blocks with dropouts, which text passes as well, and a dropout that is in none."""

    method, image_size = "dropping", (16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.outside = nn.Dropout(0.4)
        self.texts = nn.Parameter(torch.randn(5, 8))

    def training_outputs(self, images: Tensor) -> Tensor:
        x, texts = images.view(len(images), -1, 8), self.texts
        for block in self.blocks:
            x, texts = block(x), block(texts)
        out: Tensor = self.outside(x) @ texts.T
        return out

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.training_outputs(batch.images).square().mean()}


def trained(file: Path, accumulate: int, graphs: bool) -> None:
    """Keep losses and gradients of three steps, of which two have the same data and other seeds, and the number of graphs."""
    import torch._inductor.config as inductor
    from torch._dynamo.utils import counters

    inductor.compile_threads = 1  # no processes of a fork's
    team = join(launched(), CPU)
    spec = TrainSpec(steps=3, batch_size=IMAGES, compile="blocks", accumulate=accumulate)
    torch.manual_seed(0)
    model = Dropping().train()
    speed = step.prepare(model, spec, team)
    assert speed.compiled == len(model.blocks)
    assert [is_keyed(module) for module in (model.blocks[1].drop, model.blocks[1].path, model.outside)] == [True, True, False]
    if graphs:
        model.training_outputs = TrainingGraphs(model, Again)
    accelerator = accelerator_on(CPU, "no", team=team)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loss_of, _ = prepared(accelerator, Loss(model), optimizer, averaged=graphs)
    found: list[dict[str, Tensor]] = []
    for at in range(3):
        images = torch.rand(IMAGES, 3, 16, 16, generator=torch.Generator().manual_seed(at // 2))
        own = slice(IMAGES // team.world * team.rank, IMAGES // team.world * (team.rank + 1))
        batch = Batch(images[own], torch.zeros(IMAGES, 16, 16, dtype=torch.long)[own])
        loss, _ = step.gradients(accelerator, loss_of, model, batch, spec=spec, team=team, seed=at)
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": torch.tensor(team.mean([float(loss)])), **grads})
        optimizer.zero_grad(set_to_none=True)
        if at == 0:
            found[0]["graphs"] = torch.tensor(counters["stats"]["unique_graphs"])
    assert counters["stats"]["unique_graphs"] == found[0]["graphs"]
    torch.save(found, f"{file}.{team.rank}")
    team.leave()


def of(folder: Path, world: int = 1, accumulate: int = 1, *, graphs: bool = False) -> list[dict[str, Tensor]]:
    """What the first process kept, which is what all did."""
    file = folder / f"{world}-{accumulate}-{graphs}"
    ended = processes.together(lambda: trained(file, accumulate, graphs), world, folder, DGBENCH_CACHE=str(folder / "cache"))
    assert [one.status for one in ended] == [0] * world, ended
    first, *others = [torch.load(f"{file}.{rank}", weights_only=True) for rank in range(world)]
    for other in others:
        for own, wanted in zip(other, first, strict=True):
            assert all(torch.equal(value, wanted[name]) for name, value in own.items())
    return first


def test_parts_and_processes_draw_what_one_process_with_the_batch_does(tmp_path: Path) -> None:
    expected = of(tmp_path)
    assert expected[0].keys() == {
        "loss",
        "texts",
        "graphs",
        *(f"blocks.{i}.linear.{name}" for i in (0, 1) for name in ("weight", "bias")),
    }
    assert (expected[0]["loss"] - expected[1]["loss"]).abs() > 1e-3  # other draws
    for how in ({"accumulate": 2}, {"world": 2}, {"world": 2, "graphs": True}):
        for found, wanted in zip(of(tmp_path, **how), expected, strict=True):
            assert found.keys() == wanted.keys()  # of which one is the number of graphs
            for name, value in found.items():
                torch.testing.assert_close(
                    value, wanted[name], rtol=1e-4, atol=1e-6, msg=lambda text, k=name, h=how: f"{h} {k}: {text}"
                )
