"""One step: losses and gradients of a batch, or of its parts one after the other, and what makes it fast or small.

`train.frozen`, `compile`, `graphs`, `checkpoint_activations` and `accumulate` of a recipe are here; docs/training.md says what
each changes in numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from dgbench.data.places import cache_root
from dgbench.engine.device import peak_gib
from dgbench.engine.parallel import dropping_as_one
from dgbench.engine.team import Team
from dgbench.errors import RecipeError
from dgbench.recipe.training import TrainSpec
from mfuser import blocks, fast, training_graphs
from mfuser.cuda_graphs import CaptureError
from mfuser.processes import PartError, part_of
from mfuser.segmentor import Batch, Segmentor

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Speed:
    """How a model was prepared.

    frozen: its frozen weights, where they are held in 16 bits.    compiled: number of its blocks that are.
    said: in words, for records; "" where nothing was asked for.    graphs: those of its pass before the loss.
    """

    frozen: blocks.FrozenWeights | None
    compiled: int
    said: str
    graphs: training_graphs.TrainingGraphs | None = None

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Give the model all its weights as they were built or loaded within the block, for saving it."""
        with nullcontext() if self.frozen is None else self.frozen.whole():
            yield

    def peak_gib(self, device: torch.device) -> float:
        """Return the training's peak GiB as `engine.device.peak_gib` does, with what its graphs keep to themselves."""
        peak = peak_gib(device)
        if self.graphs is None:
            return peak
        before, idle = (size / 2**30 for size in self.graphs.memory)
        return max(before, peak + idle)

    def release(self) -> None:
        """Free the graphs after the last step: processes that exchange by NCCL cannot part while those live."""
        if self.graphs is not None:
            self.graphs.release()


def prepare(
    model: Segmentor, spec: TrainSpec, team: Team, device: torch.device | None = None, *, local_norms: bool = False
) -> Speed:
    """Change how a model in training mode computes, in place, as its recipe asks.

    Args:
        device: where it will be trained; by default a CPU.
        local_norms: BatchNorm may take the statistics of each part of a batch.

    Raises: RecipeError for what this model, or several processes, cannot do.
    """
    if spec.accumulate > 1:
        _check_parts(model, spec, team, local_norms)
    if spec.graphs:
        _check_graphs(model, team, device)
    frozen = blocks.FrozenWeights(model, device=device or torch.device("cpu")) if spec.frozen else None
    if frozen is not None and not len(frozen):
        raise RecipeError(f"train.frozen: `{model.method}` has no frozen weights of products", "--set train.frozen=null")
    compiled = 0
    if spec.compile:
        fast.keep_in(cache_root() / "compiled")
        compiled = blocks.compile_blocks(model)
        if not compiled:
            raise RecipeError(f"train.compile: `{model.method}` has no blocks", "--set train.compile=null")
    if spec.checkpoint_activations and not blocks.recompute_blocks(model):
        raise RecipeError(
            f"train.checkpoint_activations: the towers of `{model.method}` have no blocks",
            "--set train.checkpoint_activations=false",
        )
    # when it is first called, with its blocks compiled
    graphs = training_graphs.capture(model) if spec.graphs else None
    said = [
        f"frozen {spec.frozen}" if spec.frozen else "",
        f"{frozen.padded} MLPs padded" if frozen is not None and frozen.padded else "",
        f"{compiled} blocks compiled" if compiled else "",
        "CUDA graphs" if spec.graphs else "",
        "activations checkpointed" if spec.checkpoint_activations else "",
        f"{spec.accumulate} parts of a batch" if spec.accumulate > 1 else "",
    ]
    return Speed(frozen, compiled, ", ".join(filter(None, said)), graphs)


def _check_parts(model: Segmentor, spec: TrainSpec, team: Team, local_norms: bool) -> None:
    own = spec.batch_size // spec.accumulate
    if team.world > 1:
        raise RecipeError(
            f"train.accumulate is {spec.accumulate}, and there are {team.world} processes, which share a batch already",
            "start more processes, or one with train.accumulate",
        )
    if own < model.min_batch:
        raise RecipeError(
            f"train.accumulate leaves {own} images a part, but `{model.method}` needs at least {model.min_batch}",
            f"--set train.accumulate={max(1, spec.batch_size // model.min_batch)}, or a larger train.batch_size",
        )
    norms = [name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    if norms and not local_norms:
        raise RecipeError(
            f"train.accumulate: `{model.method}` has {len(norms)} BatchNorm layers, which take statistics of the whole batch",
            "train in several processes on GPUs; or with --local-batchnorm: they take those of each part",
        )


def _check_graphs(model: Segmentor, team: Team, device: torch.device | None) -> None:
    without = "--set train.graphs=false"
    if device is None or device.type != "cuda":
        raise RecipeError(
            f"train.graphs: CUDA graphs need a GPU, and this is a {device or 'cpu'}", f"{without}, or --device cuda"
        )
    if not training_graphs.captures(model):
        raise RecipeError(f"train.graphs: the loss of `{model.method}` has no part of fixed shapes to capture", without)
    norms = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm) and module.training]
    if norms and team.backend == "gloo":
        raise RecipeError(
            f"train.graphs: {team.world} processes exchange the statistics of {len(norms)} BatchNorm layers by gloo, "
            "which no CUDA graph can hold",
            f"{without}, or a GPU for each process",
        )


def gradients(
    accelerator: Accelerator,
    loss_of: Callable[[Batch], dict[str, Tensor]],
    model: Segmentor,
    batch: Batch,
    *,
    spec: TrainSpec,
    team: Team,
    seed: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add a batch's gradients to those of the parameters, and return its loss and the loss's terms, without graphs.

    The gradients of parts are averaged. They equal the whole batch's but for rounding: divisors and draws are those of the whole.

    Args:
        loss_of: the model's loss as it was prepared.    seed: of the generators, before each part.

    Raises: RecipeError for a loss that parts cannot have, and for a block that cannot be compiled.
    """
    parts = _parts(batch, spec.accumulate)
    every = tuple(part.labels for part in parts)
    found: dict[str, Tensor] = {}
    for index, part in enumerate(parts):
        set_seed(seed)  # alike on every process, which takes its part of what is drawn
        shared = team.world * len(parts) > 1
        with (
            part_of(every, index) if len(parts) > 1 else nullcontext(),
            dropping_as_one(model, len(part.images)) if shared else nullcontext(),
            _explained(model, spec),
        ):
            terms = loss_of(part)
            loss = torch.stack(list(terms.values())).sum()
            accelerator.backward(loss if len(parts) == 1 else loss / len(parts))
        for name, value in terms.items():
            own = value.detach() if len(parts) == 1 else value.detach() / len(parts)
            found[name] = found[name] + own if name in found else own
    return torch.stack(list(found.values())).sum(), found


@contextmanager
def _explained(model: Segmentor, spec: TrainSpec) -> Iterator[None]:
    """Raise what a user can change in place of what the loss or the compiler says."""
    try:
        yield
    except CaptureError as error:
        raise RecipeError(f"train.graphs: `{model.method}` cannot be captured: {error}", "--set train.graphs=false") from error
    except PartError as error:
        raise RecipeError(f"train.accumulate: `{model.method}` cannot: {error}", "--set train.accumulate=1") from None
    except Exception as error:
        if spec.frozen and "same dtype" in str(error):
            raise RecipeError(
                f"train.frozen: `{model.method}` has a frozen part that computes in 32 bits under autocast, too: {error}",
                "--set train.frozen=null",
            ) from error
        if spec.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise RecipeError(
                f"train.compile: a block of `{model.method}` cannot be compiled: {first}", "--set train.compile=null"
            ) from error
        raise


def _parts(batch: Batch, parts: int) -> list[Batch]:
    """Return equal parts of a batch, in order."""
    if parts == 1:
        return [batch]
    own = len(batch.images) // parts
    rows = [slice(first, first + own) for first in range(0, own * parts, own)]
    return [
        replace(
            batch,
            images=batch.images[row],
            labels=batch.labels[row],
            extra={name: tensor[row] for name, tensor in batch.extra.items()},
            present=None if batch.present is None else batch.present[row],
        )
        for row in rows
    ]


class FirstStep:
    """How long the compiler takes: the first step's time, which is said once."""

    def __init__(self, speed: Speed, tell: Callable[[str], None]) -> None:
        self._blocks, self._tell, self._begun = speed.compiled, tell, 0.0

    def begins(self) -> None:
        """Take the time of a step's begin."""
        if self._blocks:
            self._begun = time.perf_counter()

    def ends(self) -> None:
        """Say it, if blocks were compiled and it was not said before."""
        if self._blocks:
            from torch._dynamo.utils import counters

            graphs, seconds = counters["stats"]["unique_graphs"], time.perf_counter() - self._begun
            self._tell(f"{self._blocks} blocks compiled as {graphs} graphs: the first step took {seconds:.0f} s")
            self._blocks = 0
