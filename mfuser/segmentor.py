"""Interface of a model to the benchmark: images to scores, a batch to losses, parameters to optimizer groups."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from mfuser.averaging import WeightAverage
from mfuser.ops import resolve
from mfuser.ops.dispatch import watched

CITYSCAPES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain"),
    *("sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)


@dataclass(frozen=True, slots=True)
class Extra:
    """A stream of further training images that a method declares; `data.extra` of a recipe gives their location.

    A step has as many of them as images of the source: `batch.extra[name]`, (B, 3, H, W) in [0, 1], and with `labels`
    `batch.extra[f"{name}_labels"]`, (B, H, W) train ids, 255 = ignore; with `segments`, `batch.extra[f"{name}_segments"]`,
    (B, H, W), the number of each pixel's segment, 255 = none, without a class. With `augmented`, they are mirrored and distorted
    like the source's images.
    """

    name: str
    size: Literal["crop"] | tuple[int, int] = "crop"  # (H, W), or that of the training crop
    labels: bool = False
    segments: bool = False  # in place of labels
    stretch: bool = False  # whole images, resized to the size whatever their aspect ratio, instead of crops
    augmented: bool = False

    @property
    def beside(self) -> str:
        """The folder beside the images, and what is behind the name in a batch: `labels`, `segments`, or "" for neither."""
        return "labels" if self.labels else "segments" if self.segments else ""


@dataclass(frozen=True, slots=True)
class ExtraFile:
    """A file that a method trains with, given by `data.extra` of a recipe: see `Segmentor.take_file`."""

    name: str
    what: str  # for messages: "the weights of ..."
    optional: bool = False
    instead: str = ""  # for messages: how the method is trained without it


@dataclass
class Batch:
    """Training images and their labels.

    images: (B, 3, H, W) in [0, 1].    labels: (B, H, W) train ids of any integer type, 255 = ignore.
    extra: the streams that the method declares, see `Extra`.
    step: which step this is, from 0, of `steps`.
    present: (B, K) on the CPU, which classes the labels show, where that is known: a GPU need not be asked then.
    """

    images: Tensor
    labels: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    steps: int = 1
    present: Tensor | None = None


class TrainingData(Protocol):
    """The training images, as `before_step` may ask for them."""

    def batches(self, seed: int, *, augmented: bool = False) -> Iterator[Batch]:
        """Yield every training image once, in an order given by `seed`: the same batches on every process.

        Args:
            augmented: as in training; otherwise crops of the training size at the images' own scale.
        """
        ...


# how far bicubic resizing can overshoot 0 and 1; images in 0..255, in -1..1 and normalised ones exceed it
_SLACK = 0.25


def check_images(images: Tensor, *, values: bool = True) -> None:
    """Refuse images that would silently give wrong scores.

    Args:
        values: check them, too, for which a CPU waits until its GPU has finished all previous work.

    Raises: TypeError for images that are not floating point; ValueError for another shape than (B, 3, H, W) and for values
        more than a quarter outside [0, 1].
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        given = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images are {given}, expected floating point in [0, 1]: convert those of 8 bits, and divide by 255")
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images are {tuple(images.shape)}, expected (B, 3, H, W)")
    # on the meta device and under a compiler, there are no values
    if not values or images.is_meta or watched() or not images.numel():
        return
    low, high = (float(value) for value in torch.aminmax(images.detach()))
    if not (low >= -_SLACK and high <= 1 + _SLACK):
        raise ValueError(
            f"images reach from {low:g} to {high:g}, expected [0, 1]: divide those of 8 bits by 255, and "
            "do not normalise them, which the model does"
        )


_TRAINING_ONLY = "training_only."


class Segmentor(nn.Module):
    """Base of all methods.

    Attributes:
        method: the name it is built by.    options: JSON-able arguments that rebuild its structure, no network needed.
        random_towers: it was built with towers that were drawn, in place of their published weights.
        classes: names of the K classes.    image_size: (H, W) that `forward` takes.
        ops: the operators of `mfuser.ops` that it runs.    backend: that of the operators, "auto" or a name.
        extras: streams of images that a training step needs besides its batch.    files: files that a training needs.
        any_size: `forward` takes every (H, W) whose sides are multiples of `size_step`; otherwise `image_size` alone.
        mixes_batch: scores of an image depend on the others of its batch: inference runs the model on one at a time.
        no_fast: why `mfuser.fast` cannot run it, for a message; "" where it can.
        drawn: dotted names of parameters that start with random values even where the tower's published file has them.
        min_batch: images that a training step needs at least, over all processes.
        eval_parts: dotted names of submodules that `train` leaves in evaluation mode.
        training_only: teachers, memory banks, dictionaries: what `enter_training` makes. They are not in the model file and
            not counted; their parameters and buffers are kept for resuming beside the optimizer.
    """

    method: str
    options: dict[str, Any]
    random_towers: bool = False
    classes: tuple[str, ...] = CITYSCAPES
    image_size: tuple[int, int]
    ops: tuple[str, ...] = ()
    backend: str = "auto"
    extras: tuple[Extra, ...] = ()
    files: tuple[ExtraFile, ...] = ()
    any_size: bool = False
    size_step: int = 1
    mixes_batch: bool = False
    no_fast: str = ""
    drawn: tuple[str, ...] = ()
    min_batch: int = 1
    eval_parts: tuple[str, ...] = ()
    training_only: nn.ModuleDict
    # parameters whose names contain one of these get no weight decay
    no_decay: tuple[str, ...] = ("norm",)
    # nor do the parameters of these modules, whatever their names
    no_decay_types: tuple[type[nn.Module], ...] = ()

    def forward(self, images: Tensor) -> Tensor:
        """Return class scores (B, K, H, W) of images (B, 3, H, W) in [0, 1]; argmax over K is the prediction."""
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def masks(self, images: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return class logits (B, Q, K + 1), the last "no object", and mask logits (B, Q, h, w), which `forward` combines.

        None for a method that scores pixels without masks.
        """
        return None

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return named loss terms, already weighted; their sum is minimised.

        Means over pixels or masks divide by `mfuser.processes.divisor`, draws for each image are made by its `even_rows`: then
        several processes train as one.
        """
        raise NotImplementedError(f"{type(self).__name__}.loss")

    def training_outputs(self, images: Tensor) -> Any:
        """Return all that `loss` needs of images (B, 3, H, W), tensors in tuples and lists, if the method has such a part.

        Their shapes follow from the images' alone, and the device is asked for no value on the way: CUDA graphs can hold it.
        """
        raise NotImplementedError(f"{type(self).__name__}.training_outputs")

    def enter_training(self) -> None:
        """Make `training_only` of the model as it is built or loaded, before the first step of a training or of its rest.

        A resumed training does it again, and then takes the tensors of its checkpoint.
        """

    def take_file(self, name: str, path: Path) -> None:
        """Read a file that the method declares in `files`, after `enter_training`.

        Raises: ValueError for a file that is not what it should be.
        """
        raise NotImplementedError(f"{type(self).__name__}.take_file")

    def before_step(self, step: int, steps: int, data: TrainingData) -> None:
        """Update the method before a step, such as its styles or its teacher. By default nothing.

        What it changes must be parameters or buffers, of the model or of `training_only`: those are what a resumed training
        starts from. The generators are seeded by the step, equally on every process.
        """

    def train(self, mode: bool = True) -> Segmentor:
        """Set training mode, except for `eval_parts`."""
        super().train(mode)
        for name in self.eval_parts:
            if not name.startswith(_TRAINING_ONLY) or "training_only" in self._modules:
                self.get_submodule(name).eval()
        return self

    def keep_average(self, start: int, momentum: float) -> None:
        """Keep a moving average of the trained weights in `training_only`, after `enter_training`: as `WeightAverage`.

        The model file then has the averages in place of the weights, and the training's state has the weights.

        Raises: ValueError for a model that keeps one already.
        """
        if self._average() is not None:
            raise ValueError(f"`{self.method}` keeps an average of its own; leave one of the two out")
        parts = self._modules.get("training_only") or nn.ModuleDict()
        average = WeightAverage(self, start, momentum)
        self.training_only = nn.ModuleDict({**dict(parts.named_children()), "average": average})

    def update_average(self, done: int) -> None:
        """Update the average, if there is one, by the weights after `done` steps; once a step, however often it is called."""
        if (average := self._average()) is not None:
            average.follow(self, done)

    def _average(self) -> WeightAverage | None:
        parts = self._modules.get("training_only")
        found = parts["average"] if isinstance(parts, nn.ModuleDict) and "average" in parts else None
        return found if isinstance(found, WeightAverage) else None

    def _as_kept(self) -> dict[str, Tensor]:
        """Return all tensors by name, averages and trained weights in each other's places."""
        average, state = self._average(), self.state_dict()
        return state if average is None else average.exchanged(state, f"{_TRAINING_ONLY}average.")

    def model_state(self) -> dict[str, Tensor]:
        """Return the tensors that evaluation needs, by name: what the model file holds."""
        return {name: tensor for name, tensor in self._as_kept().items() if not name.startswith(_TRAINING_ONLY)}

    def training_state(self) -> dict[str, Tensor]:
        """Return the tensors of `training_only`, by name."""
        return {name: tensor for name, tensor in self._as_kept().items() if name.startswith(_TRAINING_ONLY)}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Replace the tensors of `training_only`, where buffers may have grown since it was made.

        Of an average there come the trained weights: the averages are in the model file, and `keep_average` copied them.

        Raises: ValueError naming what is missing, unknown, or of another shape.
        """
        own = self.training_state()
        if missing := sorted(own.keys() - state.keys()) + sorted(state.keys() - own.keys()):
            raise ValueError(f"it does not hold what `{self.method}` trains with: {', '.join(missing[:3])}")
        buffers = dict(self.named_buffers())
        for name, value in state.items():
            module, _, leaf = name.rpartition(".")
            if value.shape == own[name].shape:
                own[name].copy_(value)
            elif name in buffers:
                setattr(self.get_submodule(module), leaf, value.to(own[name].device))
            else:
                raise ValueError(f"{name} is {tuple(value.shape)}, expected {tuple(own[name].shape)}")
        if (average := self._average()) is not None:
            average.resume()

    def take_scalars(self, option: str, scalars: dict[str, Tensor]) -> None:
        """Use scalars of a tower's published file outside its parts, such as SigLIP's `logit_scale`; by default nothing.

        Args:
            option: the one that names the tower.
        """

    def weights_loaded(self) -> None:
        """Compute what depends on the towers' initial weights, by default nothing; a tower from scratch has random ones.

        `build` calls it once with weights="published", not for models that a checkpoint fills.
        """

    def merge(self) -> bool:
        """Add adapters to the weights that they adapt, where the method can, in place and for inference alone.

        Returns: whether there was anything to merge; by default there is nothing.
        """
        return False

    def check_backends(self) -> None:
        """Raise an error at once if the named backend cannot run here for any tensors.

        Raises: BackendError with the reason.
        """
        for op in self.ops:
            resolve(op, self.backend)

    def groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return parameter groups for the optimizer: with weight decay, and without by `no_decay` and `no_decay_types`."""
        spared = [m for m in self.modules() if isinstance(m, self.no_decay_types)]
        exempt = {id(p) for module in spared for p in module.parameters(recurse=False)}
        decay: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                named = any(part in name for part in self.no_decay)
                (rest if named or id(parameter) in exempt else decay).append(parameter)
        groups: list[dict[str, Any]] = [{"params": decay, "lr": lr, "weight_decay": weight_decay}]
        return [*groups, {"params": rest, "lr": lr, "weight_decay": 0.0}] if rest else groups

    def check_size(self, images: Tensor) -> None:
        """Raise ValueError unless the images have a size that the model takes, and as `check_images` does.

        On a GPU values are not checked: that would delay every window and every step. `mfuser.slide` checks once per call.
        """
        check_images(images, values=images.device.type == "cpu")
        if self.any_size:
            if any(side % self.size_step or not side for side in images.shape[-2:]):
                raise ValueError(
                    f"`{self.method}` takes images whose sides are multiples of {self.size_step}, got "
                    f"{tuple(images.shape[-2:])} (H, W); pad or resize them, or use mfuser.slide"
                )
        elif tuple(images.shape[-2:]) != tuple(self.image_size):
            raise ValueError(
                f"`{self.method}` was built for images of {tuple(self.image_size)} (H, W), got "
                f"{tuple(images.shape[-2:])}; use mfuser.slide for larger ones, or build with "
                f"image_size={tuple(images.shape[-2:])}"
            )
