"""A model's training over several processes, such that its gradients are those of one process with the whole batch.

Losses and draws of the model itself go through `mfuser.processes`; here are its layers whose results depend on the rest of the
batch: dropout, whose draws are made for the whole batch, and BatchNorm, whose statistics are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from dgbench.engine.team import Team
from dgbench.errors import RecipeError
from mfuser.keyed_dropout import is_keyed, place_of
from mfuser.processes import even_rows, number_of_processes
from mfuser.segmentor import Batch, Segmentor

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import KwargsHandler


class Loss(nn.Module):
    """The model's loss as a forward pass, the form in which distributed training wraps a model."""

    def __init__(self, model: Segmentor) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the model's loss terms."""
        return self.model.loss(batch)


def settings() -> list[KwargsHandler]:
    """Return what `DistributedDataParallel` is told: the graph of every step is the same, buffers follow from the same steps."""
    from accelerate.utils import DistributedDataParallelKwargs

    return [DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=True)]


def prepared(
    accelerator: Accelerator, loss: Loss, optimizer: torch.optim.Optimizer, *, averaged: bool = False
) -> tuple[nn.Module, Any]:
    """Return both as accelerate prepares them for the device, the precision and the processes.

    Args:
        averaged: the backward pass averages gradients over the processes by itself, as CUDA graphs do; all processes begin with
            the weights of the first.
    """
    if averaged and number_of_processes() > 1:
        placed = accelerator.prepare_model(loss, evaluation_mode=True)  # which leaves DistributedDataParallel out
        _from_first(placed)
        return placed, accelerator.prepare_optimizer(optimizer)
    with warnings.catch_warnings():
        # renamed in PyTorch 2.13; accelerate and PyTorch 2.11 know the old name
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        found: tuple[nn.Module, Any] = accelerator.prepare(loss, optimizer)
    return found


@torch.no_grad()
def _from_first(model: nn.Module) -> None:
    """Give every process the first one's parameters and buffers, in place, as `DistributedDataParallel` begins."""
    for tensor in (*model.parameters(), *model.buffers()):
        value = tensor.clone(memory_format=torch.contiguous_format)
        dist.broadcast(value.view(-1).view(torch.uint8), src=0)  # bytes: not every exchange knows every type
        tensor.copy_(value)


def with_norms(model: Segmentor, team: Team, device: torch.device, *, local: bool) -> tuple[Segmentor, str | None]:
    """Return a model in training mode whose BatchNorm takes the statistics of the whole batch, and what to say about it.

    Args:
        local: let each process take the statistics of its own part.

    Raises: RecipeError if statistics cannot be exchanged on this device, and local ones were not accepted.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training]
    if team.world == 1 or not norms:
        return model, None
    if local:
        return model, f"{len(norms)} BatchNorm layers take statistics of each process's part of a batch: not as one process would"
    if device.type != "cuda":
        raise RecipeError(
            f"`{model.method}` has {len(norms)} BatchNorm layers, for whose statistics {team.world} processes need GPUs",
            "train in one process, or on GPUs; or with --local-batchnorm: each process takes those of its part of a batch",
        )
    synchronized: Segmentor = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return (
        synchronized,
        f"{len(norms)} BatchNorm layers take statistics over all processes (SyncBatchNorm): as one process, but for rounding",
    )


@contextmanager
def dropping_as_one(model: nn.Module, images: int) -> Iterator[None]:
    """Let dropout draw for the whole batch within the block, and use the part of these images.

    The block holds the backward pass, too: activations that are computed again there are dropped as the first time. In compiled
    blocks, dropout is told of which images its part is (`mfuser.keyed_dropout`). Of a part, it is within `part_of`.
    """
    from timm.layers import DropPath

    kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, DropPath)
    changed = [module for module in model.modules() if type(module) in kinds and module.training and not is_keyed(module)]
    place = place_of(model)
    here = nullcontext() if place is None else place.of(even_rows(images), next(model.parameters()).device)
    try:
        for module in changed:
            module.forward = _drawn_together(type(module).forward.__get__(module), images)
        with here:
            yield
    finally:
        for module in changed:
            del module.forward


def _drawn_together(drop: Callable[[Tensor], Tensor], images: int) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        if len(x) % images:  # no rows of images: the same for all processes
            return drop(x)
        with torch.no_grad():
            factors = even_rows(len(x)).of(lambda rows: drop(_ones_like(x, rows)))
        return x * factors

    return forward


def _ones_like(x: Tensor, rows: int) -> Tensor:
    """Return ones of another number of rows, in the memory order of `x`, in which generators fill a tensor."""
    ones = x.new_ones((rows, *x.shape[1:]))
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return ones.contiguous(memory_format=torch.channels_last) if last else ones
