"""Which query answers for which mask: a matcher gives the criterion the query of each target.

Targets are those of semantic segmentation: one binary mask for each class that an image shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mfuser.decoder.points import Draw, sample


@dataclass(frozen=True)
class Targets:
    """The P masks of a batch, sorted by image and class.

    image: (P,) index of its image.    label: (P,) its class.    masks: (P, 1, H, W), 0 or 1.
    counts: how many each image has, known without asking the device.
    """

    image: Tensor
    label: Tensor
    masks: Tensor
    counts: tuple[int, ...]

    @classmethod
    def of(cls, labels: Tensor, classes: int, present: Tensor | None = None) -> Targets:
        """Return the classes that labels (B, H, W) of train ids show; ignored pixels are in no mask.

        Args:
            present: (B, K) on the CPU, which classes these are, where it is known; else a CPU waits for its GPU to tell it.
        """
        shown = present_classes(labels, classes).cpu() if present is None else present
        image, label = (_sent(index, labels.device) for index in shown.nonzero(as_tuple=True))
        masks = (labels[image] == label[:, None, None]).float()[:, None]
        return cls(image, label, masks, tuple(shown.sum(1).tolist()))

    def __len__(self) -> int:
        return sum(self.counts)


def present_classes(labels: Tensor, classes: int) -> Tensor:
    """Return which classes labels (B, H, W) of train ids in 0..255 show, (B, K) booleans on the labels' device."""
    shown = torch.zeros(len(labels), 256, dtype=torch.bool, device=labels.device)
    if labels.device.type == "cpu":  # ten times faster than to scatter; a GPU would be waited for
        for row, image in zip(shown, labels, strict=True):
            row |= image.flatten().bincount(minlength=256) > 0
    else:
        shown.scatter_(1, labels.flatten(1).long(), True)
    return shown[:, :classes]


def _sent(index: Tensor, device: torch.device) -> Tensor:
    """Return a CPU's tensor on a device, without waiting for what the device has to do before."""
    return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index.to(device)


class Matcher:
    """Finds the query of each target; no two of an image are alike.

    What needs the logits comes first, for every output; then all outputs' queries are found at once, so that a CPU waits for its
    GPU once a step at most.
    """

    def __call__(self, output: int, class_logits: Tensor, mask_logits: Tensor, targets: Targets, draw: Draw) -> Tensor:
        """Return (P,), each target's query in one output; arguments and errors as `costs` and `assigned`."""
        return self.assigned([self.costs(output, class_logits, mask_logits, targets, draw)], targets)[0]

    def costs(self, output: int, class_logits: Tensor, mask_logits: Tensor, targets: Targets, draw: Draw) -> Tensor:
        """Return (P, Q), what each target costs each query of its image; none where no cost decides.

        Args:
            output: which of the decoder's, for `draw`.    class_logits: (B, Q, K + 1).    mask_logits: (B, Q, h, w).
        """
        raise NotImplementedError(f"{type(self).__name__}.costs")

    def assigned(self, costs: Sequence[Tensor], targets: Targets) -> Tensor:
        """Return (O, P), the query of each target in each of O outputs, from what `costs` returned for them."""
        raise NotImplementedError(f"{type(self).__name__}.assigned")


class Fixed(Matcher):
    """Query k is class k's (tqdm, Pak et al., ECCV 2024)."""

    def costs(self, output: int, class_logits: Tensor, mask_logits: Tensor, targets: Targets, draw: Draw) -> Tensor:
        """Return nothing, (P, 0).

        Raises: ValueError for another number of queries than of classes.
        """
        queries, classes = class_logits.shape[1], class_logits.shape[2] - 1
        if queries != classes:
            raise ValueError(f"fixed matching needs a query for each class, got {queries} for {classes}; use Hungarian()")
        return class_logits.new_empty(len(targets), 0)

    def assigned(self, costs: Sequence[Tensor], targets: Targets) -> Tensor:
        """Return each target's class, (O, P)."""
        return targets.label.expand(len(costs), -1)


fixed = Fixed()


@dataclass(frozen=True)
class Hungarian(Matcher):
    """The assignment of least cost in each image, by class, mask and dice costs on random points (Cheng et al., CVPR 2022).

    Args:
        points: sampled per image, the same for its queries and targets.
        weights: of the (class, mask, dice) costs.
    """

    points: int = 12544
    weights: tuple[float, float, float] = (2.0, 5.0, 5.0)

    @torch.no_grad()
    def assigned(self, costs: Sequence[Tensor], targets: Targets) -> Tensor:
        """Assign, (O, P).

        Raises: ValueError for an image that shows more classes than there are queries.
        """
        from scipy.optimize import linear_sum_assignment

        queries, most = costs[0].shape[1], max(targets.counts, default=0)
        if most > queries:
            raise ValueError(f"{queries} queries cannot answer for the {most} classes of an image; use more queries")
        # what is not finite costs most, so that the loss says what is wrong with the logits
        every = torch.stack(list(costs)).nan_to_num(nan=1e6, posinf=1e6, neginf=-1e6).cpu()  # one wait for the GPU
        # a row of each target: in their order, as scipy returns the rows of a matrix that is no higher than wide
        found = [
            torch.cat([torch.from_numpy(linear_sum_assignment(cost.numpy())[1]) for cost in output.split(targets.counts)])
            for output in every
        ]
        return _sent(torch.stack(found), costs[0].device)

    @torch.no_grad()
    def costs(self, output: int, class_logits: Tensor, mask_logits: Tensor, targets: Targets, draw: Draw) -> Tensor:
        """(P, Q), what each target costs each query of its image, in fp32.

        The class cost is minus the class's probability, the mask cost the mean binary cross entropy over the points, the
        dice cost 1 - (2 |a b| + 1) / (|a| + |b| + 1).
        """
        images = len(class_logits)
        if not len(targets):
            return class_logits.new_zeros(0, class_logits.shape[1], dtype=torch.float32)
        points = draw(output, "match", (images, self.points, 2), mask_logits)
        with torch.autocast(mask_logits.device.type, enabled=False):
            given = sample(mask_logits.float(), points)  # (B, Q, n)
            wanted = sample(targets.masks, points[targets.image])[:, 0]  # (P, n)
            class_cost = -class_logits.float().softmax(-1)[targets.image, :, targets.label]
            pairs = [_pair_costs(mask, target) for mask, target in zip(given, wanted.split(targets.counts), strict=True)]
            mask_cost, dice_cost = (torch.cat(part) for part in zip(*pairs, strict=True))
        by_class, by_mask, by_dice = self.weights
        return by_class * class_cost + by_mask * mask_cost + by_dice * dice_cost


def _pair_costs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mask and dice cost (P, Q) of every pair of logits (Q, n) and targets (P, n)."""
    # the cross entropy of a logit x with a target t is softplus(x) - x t
    mask = (F.softplus(logits).sum(1) - targets @ logits.t()) / logits.shape[1]
    probability = logits.sigmoid()
    overlap = 2 * targets @ probability.t()
    dice = 1 - (overlap + 1) / (targets.sum(1)[:, None] + probability.sum(1) + 1)
    return mask, dice
