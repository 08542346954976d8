"""Which query answers for which mask: a matcher gives the criterion the query of each target.

Targets are those of semantic segmentation: one binary mask for each class that an image shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mfuser.decoder.points import Draw, sample


@dataclass(frozen=True)
class Targets:
    """The P masks of a batch, sorted by image and class.

    image: (P,) index of its image.    label: (P,) its class.    masks: (P, 1, H, W), 0 or 1.
    """

    image: Tensor
    label: Tensor
    masks: Tensor

    @classmethod
    def of(cls, labels: Tensor, classes: int) -> Targets:
        """Return the classes that labels (B, H, W) of train ids show; ignored pixels are in no mask."""
        present = torch.stack([(labels == k).flatten(1).any(1) for k in range(classes)], 1)  # (B, K)
        image, label = present.nonzero(as_tuple=True)
        return cls(image, label, (labels[image] == label[:, None, None]).float()[:, None])

    def __len__(self) -> int:
        return len(self.image)


# matcher(output, class_logits, mask_logits, targets, draw) -> (P,) index of each target's query, no two alike in an image
# output: which of the decoder's, for `draw`.    class_logits: (B, Q, K + 1).    mask_logits: (B, Q, h, w).
Matcher = Callable[[int, Tensor, Tensor, Targets, Draw], Tensor]


def fixed(output: int, class_logits: Tensor, mask_logits: Tensor, targets: Targets, draw: Draw) -> Tensor:
    """Query k is class k's (tqdm, Pak et al., ECCV 2024).

    Raises: ValueError for another number of queries than of classes.
    """
    queries, classes = class_logits.shape[1], class_logits.shape[2] - 1
    if queries != classes:
        raise ValueError(f"fixed matching needs a query for each class, got {queries} for {classes}; use Hungarian()")
    return targets.label


@dataclass(frozen=True)
class Hungarian:
    """The assignment of least cost in each image, by class, mask and dice costs on random points (Cheng et al., CVPR 2022).

    Args:
        points: sampled per image, the same for its queries and targets.
        weights: of the (class, mask, dice) costs.
    """

    points: int = 12544
    weights: tuple[float, float, float] = (2.0, 5.0, 5.0)

    @torch.no_grad()
    def __call__(self, output: int, class_logits: Tensor, mask_logits: Tensor, targets: Targets, draw: Draw) -> Tensor:
        """Assign.

        Raises: ValueError for an image that shows more classes than there are queries.
        """
        from scipy.optimize import linear_sum_assignment

        costs = self.costs(output, class_logits, mask_logits, targets, draw)
        counts = targets.image.bincount(minlength=len(class_logits)).tolist()
        queries = class_logits.shape[1]
        if max(counts, default=0) > queries:
            raise ValueError(f"{queries} queries cannot answer for the {max(counts)} classes of an image; use more queries")
        # what is not finite costs most, so that the loss says what is wrong with the logits
        costs = costs.nan_to_num(nan=1e6, posinf=1e6, neginf=-1e6).cpu()  # one wait for the GPU
        # a row of each target: in their order, as scipy returns the rows of a matrix that is no higher than wide
        found = [torch.from_numpy(linear_sum_assignment(cost.numpy())[1]) for cost in costs.split(counts)]
        return torch.cat(found).to(class_logits.device)

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
            counts = targets.image.bincount(minlength=images).tolist()
            pairs = [_pair_costs(mask, target) for mask, target in zip(given, wanted.split(counts), strict=True)]
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
