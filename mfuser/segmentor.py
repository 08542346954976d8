"""What the benchmark knows of a model: images to scores, a batch to losses, parameters to optimizer groups."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mfuser.ops import resolve
from mfuser.ops.dispatch import watched

CITYSCAPES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip


@dataclass
class Batch:
    """Training images and their labels.

    images: (B, 3, H, W) in [0, 1].    labels: (B, H, W) train ids of any integer type, 255 = ignore.
    extra: further inputs that a method declares to need.
    """

    images: Tensor
    labels: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)


# how far bicubic resizing takes a photograph beyond 0 and 1; images of 0..255, of -1..1 and normalised ones go farther
_SLACK = 0.25


def check_images(images: Tensor, *, values: bool = True) -> None:
    """Refuse what would be scored without a word and wrongly.

    Args:
        values: look at them, too, for which a CPU waits until its GPU has done all before.

    Raises: TypeError for images that are not floating point; ValueError for another shape than (B, 3, H, W) and for values
        more than a quarter outside [0, 1].
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        given = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images are {given}, expected floating point in [0, 1]: convert those of 8 bits, and divide by 255")
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images are {tuple(images.shape)}, expected (B, 3, H, W)")
    # on shapes alone, or in a compiler's eyes, there are no values
    if not values or images.is_meta or watched() or not images.numel():
        return
    low, high = (float(value) for value in torch.aminmax(images.detach()))
    if not (low >= -_SLACK and high <= 1 + _SLACK):
        raise ValueError(
            f"images reach from {low:g} to {high:g}, expected [0, 1]: divide those of 8 bits by 255, and "
            "do not normalise them, which the model does"
        )


class Segmentor(nn.Module):
    """Base of all methods.

    Attributes:
        method: the name it is built by.    options: JSON-able arguments that rebuild its structure, no network needed.
        classes: names of the K classes.    image_size: (H, W) that `forward` takes.
        ops: the operators of `mfuser.ops` that it runs.    backend: who runs them, "auto" or a name.
    """

    method: str
    options: dict[str, Any]
    classes: tuple[str, ...] = CITYSCAPES
    image_size: tuple[int, int]
    ops: tuple[str, ...] = ()
    backend: str = "auto"
    # parameters whose names hold one of these get no weight decay
    no_decay: tuple[str, ...] = ("norm",)
    # nor do the parameters of these modules, whatever they are called
    no_decay_types: tuple[type[nn.Module], ...] = ()

    def forward(self, images: Tensor) -> Tensor:
        """Class scores (B, K, H, W) of images (B, 3, H, W) in [0, 1]; argmax over K is the prediction."""
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def masks(self, images: Tensor) -> tuple[Tensor, Tensor] | None:
        """Class logits (B, Q, K + 1), the last "no object", and mask logits (B, Q, h, w) that `forward` mixes to scores.

        None for a method that scores pixels without masks.
        """
        return None

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Named scalar terms, already weighted; their sum is what is minimised."""
        raise NotImplementedError(f"{type(self).__name__}.loss")

    def take_scalars(self, option: str, scalars: dict[str, Tensor]) -> None:
        """Take what a tower's published file holds beside its parts, such as SigLIP's `logit_scale`; by default nothing.

        Args:
            option: the one that names the tower.
        """

    def check_backends(self) -> None:
        """Say at once, before any time is spent, that the named backend cannot run here, whatever the tensors.

        Raises: BackendError with the reason.
        """
        for op in self.ops:
            resolve(op, self.backend)

    def groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Optimizer groups of the trainable parameters: with weight decay, and without by `no_decay` and `no_decay_types`."""
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
        """Raise ValueError unless the images have the size that the model was built for, and as `check_images` does.

        On a GPU values are not looked at: that would hold up every window and every step. `mfuser.slide` looks once a call.
        """
        check_images(images, values=images.device.type == "cpu")
        if tuple(images.shape[-2:]) != tuple(self.image_size):
            raise ValueError(
                f"`{self.method}` was built for images of {tuple(self.image_size)} (H, W), got "
                f"{tuple(images.shape[-2:])}; use mfuser.slide for larger ones, or build with "
                f"image_size={tuple(images.shape[-2:])}"
            )
