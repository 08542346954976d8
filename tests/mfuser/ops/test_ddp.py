"""The operators under DistributedDataParallel: two processes with half the batch each get the gradients of one with all."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from mfuser.fusion import MVFuser
from mfuser.ops import compiled, ms_deform_attn

PROCESSES = 2
CELLS, WIDTH, HEADS = 6, 24, 2


class Both(nn.Module):
    """MVFuser's block, then attention over its tokens as a 2 x 3 map, with places and weights that are learned."""

    def __init__(self) -> None:
        super().__init__()
        self.fuser = MVFuser(WIDTH, state=4, dropout=0.0, backend="cuda")
        nn.init.ones_(self.fuser.scale)
        self.locations = nn.Parameter(torch.rand(CELLS, HEADS, 1, 2, 2))
        self.weights = nn.Parameter(torch.rand(CELLS, HEADS, 1, 2))

    def forward(self, joint: Tensor) -> Tensor:
        images = len(joint)
        value = (joint + self.fuser.mix(joint)).unflatten(-1, (HEADS, -1))
        locations, weights = (t.expand(images, *t.shape) for t in (self.locations, self.weights))
        return ms_deform_attn(value, [(2, 3)], locations, weights, backend="cuda")


def batch() -> Tensor:
    return torch.randn(2 * PROCESSES, CELLS, WIDTH, generator=torch.Generator().manual_seed(1))


def model() -> Both:
    torch.manual_seed(0)
    return Both()


def work(rank: int, library: str, folder: str) -> None:
    """One of the processes; the first keeps its gradients."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    try:
        with compiled.use(Path(library)):
            wrapped = DistributedDataParallel(model())
            mine = batch().chunk(PROCESSES)[rank]
            wrapped(mine).square().mean().backward()
        if rank == 0:
            torch.save({name: p.grad for name, p in wrapped.module.named_parameters()}, f"{folder}/gradients.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_get_the_gradients_of_one(emulated, tmp_path):
    spawn(work, args=(str(emulated), str(tmp_path)), nprocs=PROCESSES)
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    with compiled.use(emulated):
        whole = model()
        whole(batch()).square().mean().backward()
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
