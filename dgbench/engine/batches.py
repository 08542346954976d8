"""The batches of a training: those of its steps, and those that a method may ask for before a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dgbench.data.dataset import SegDataset
from dgbench.data.extra import Stream, WithExtras
from dgbench.data.sampling import UniformSampler, sampler_of
from dgbench.data.transforms import Augmentation, StepBatches, TrainView, to_model
from dgbench.data.union import Union
from dgbench.data.workers import worker_init
from dgbench.errors import RecipeError
from dgbench.progress import Progress
from dgbench.recipe import Recipe
from dgbench.resources import usable_cores
from mfuser.decoder.matching import present_classes
from mfuser.segmentor import CITYSCAPES, Batch

Samples = tuple[Tensor, Tensor, dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Place:
    """Index of this process, number of processes, and the device."""

    rank: int
    world: int
    device: torch.device


def of_steps(
    recipe: Recipe, dataset: SegDataset | Union, streams: Sequence[Stream], start: int, place: Place, progress: Progress
) -> DataLoader[Samples]:
    """Return the loader of the steps from `start` on.

    Raises: DataError if no label holds a class; RecipeError if a batch cannot be divided among the processes.
    """
    data, spec = recipe.data, recipe.train
    sampler = sampler_of(data, dataset, spec.seed, progress)
    per_process, rest = divmod(spec.batch_size, place.world)
    if rest:
        raise RecipeError(
            f"train.batch_size {spec.batch_size} cannot be divided among {place.world} processes",
            "set train.batch_size to a multiple of the number of processes",
        )
    view = TrainView(dataset, sampler, augmentation(recipe), spec.seed)
    positions = StepBatches(start, spec.steps, per_process, place.rank, place.world)
    return _loader(recipe, WithExtras(view, streams, spec.seed), positions, place)


def augmentation(recipe: Recipe) -> Augmentation:
    """Return the augmentation of training crops."""
    data = recipe.data
    return Augmentation(data.crop, data.scale, data.cat_max_ratio, data.flip, data.preset, data.resize)


def batch_of(samples: Samples, device: torch.device, step: int, steps: int) -> Batch:
    """Return a loader's output, on the CPU, as a batch on a device: images in [0, 1], labels int64."""
    images, labels, extra = samples
    present = present_classes(labels, len(CITYSCAPES))
    images, labels = to_model(images, labels, device)
    moved = {}
    for name, tensor in extra.items():
        is_image = tensor.dim() == 4
        moved[name] = to_model(tensor, labels, device)[0] if is_image else tensor.to(device, non_blocking=True).long()
    return Batch(images, labels, moved, step, steps, present)


def on_device(loader: Iterable[Samples], device: torch.device, start: int, steps: int) -> Iterator[Batch]:
    """Yield the batches of the steps from `start` on; to a GPU, each is copied while the step before it is computed."""
    numbered = enumerate(loader, start)
    if device.type != "cuda":
        for step, samples in numbered:
            yield batch_of(samples, device, step, steps)
        return
    copying = torch.cuda.Stream(device)
    ready: Batch | None = None
    for step, samples in numbered:
        with torch.cuda.stream(copying):
            copied = batch_of(samples, device, step, steps)
            there = copying.record_event()
        if ready is not None:
            yield ready
        torch.cuda.current_stream(device).wait_event(there)
        for tensor in (copied.images, copied.labels, *copied.extra.values()):
            # its memory, the copying stream's, is used by this stream from now on
            tensor.record_stream(torch.cuda.current_stream(device))
        ready = copied
    if ready is not None:
        yield ready


@dataclass(frozen=True, slots=True)
class Images:
    """The training images, as a method's `before_step` may ask for them: `mfuser.segmentor.TrainingData`."""

    recipe: Recipe
    dataset: SegDataset | Union
    streams: Sequence[Stream]
    place: Place

    def batches(self, seed: int, *, augmented: bool = False) -> Iterator[Batch]:
        """Yield every training image once, in an order given by `seed`: the same batches on every process.

        Args:
            augmented: as in training; otherwise crops of the training size at the images' own scale.
        """
        how = augmentation(self.recipe)
        if not augmented:
            how = replace(how, scale=(1.0, 1.0), cat_max_ratio=1.0, flip=0.0, photometric="none", resize=None)
        count = len(self.dataset)
        by = self.recipe.train.batch_size // self.place.world
        view = TrainView(self.dataset, UniformSampler(count, seed), how, seed)
        positions = [list(range(first, min(first + by, count))) for first in range(0, count, by)]
        for number, samples in enumerate(_loader(self.recipe, WithExtras(view, self.streams, seed), positions, self.place)):
            yield batch_of(samples, self.place.device, number, len(positions))


def _loader(recipe: Recipe, view: WithExtras, positions: Iterable[list[int]], place: Place) -> DataLoader[Samples]:
    workers = min(recipe.train.workers, usable_cores())  # more would only wait; samples do not depend on the worker
    return DataLoader(
        view,
        batch_sampler=positions,
        num_workers=workers,
        pin_memory=place.device.type == "cuda",
        persistent_workers=False,
        prefetch_factor=4 if workers else None,
        worker_init_fn=worker_init,
    )
