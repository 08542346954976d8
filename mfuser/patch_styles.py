"""Styles of the nine patches of a feature map: means and deviations of channels, by the patches' classes (FAMix, CVPR 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.labels import IGNORE

SIDE = 3  # patches along each side
_EPSILON = 1e-5


def patches(x: Tensor) -> list[Tensor]:
    """Cut a map or labels (..., H, W) into nine patches, row by row; of other sides than multiples of 3 the first are larger."""
    return [patch for rows in x.tensor_split(SIDE, -2) for patch in rows.tensor_split(SIDE, -1)]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Return the map that `patches` cut."""
    return torch.cat([torch.cat(list(parts[i : i + SIDE]), -1) for i in range(0, SIDE * SIDE, SIDE)], -2)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation (B, C, 1, 1) of the channels of a map (B, C, h, w), in fp32."""
    variance, mean = torch.var_mean(x.float(), (2, 3), keepdim=True)
    return mean, (variance + _EPSILON).sqrt()


def restyled(x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Return a map (B, C, h, w) with other means and deviations (B, C, 1, 1), behind a ReLU: PIN."""
    own_mean, own_deviation = statistics(x)
    return F.relu((x.float() - own_mean) / own_deviation * deviation + mean).to(x.dtype)


def dominant(labels: Tensor, classes: int) -> Tensor:
    """Return the most frequent class (9, B) of each patch of labels (B, H, W), `classes` where that is none."""
    ids = torch.where(labels == IGNORE, classes, labels)
    return torch.stack([patch.flatten(1).mode(1).values for patch in patches(ids)])


def mixed(x: Tensor, means: Tensor, deviations: Tensor, share: Tensor, there: Tensor | None = None) -> Tensor:
    """Return a map (B, C, H, W) whose patches have styles between their own and others.

    Args:
        means, deviations: (9, B, C) of the others.    share: (B, C), that of the patches' own styles.
        there: (9, B), which of the others there are; None: all.
    """
    parts = []
    for i, patch in enumerate(patches(x)):
        own_mean, own_deviation = statistics(patch)
        kept = share if there is None else torch.where(there[i, :, None], share, 1.0)
        kept = kept[..., None, None]
        mean = kept * own_mean + (1 - kept) * means[i, ..., None, None]
        parts.append(restyled(patch, mean, kept * own_deviation + (1 - kept) * deviations[i, ..., None, None]))
    return joined(parts)


class StyleBank(nn.Module):
    """Mined styles: means and deviations (N, C), and the class (N,) of each, the number of classes for none."""

    means: Tensor
    deviations: Tensor
    classes: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(0, channels))
        self.register_buffer("deviations", torch.zeros(0, channels))
        self.register_buffer("classes", torch.zeros(0, dtype=torch.long))

    def __len__(self) -> int:
        return len(self.classes)

    def add(self, means: Tensor, deviations: Tensor, classes: Tensor) -> None:
        """Append styles: (n, C), (n, C), (n,)."""
        self.means = torch.cat([self.means, means.to(self.means)])
        self.deviations = torch.cat([self.deviations, deviations.to(self.deviations)])
        self.classes = torch.cat([self.classes, classes.to(self.classes)])

    def drawn(self, wanted: Tensor, none: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draw a style for each wanted class (...): means and deviations (..., C), and whether there was one (...).

        Of a class without styles, those of `none` are drawn.
        """
        if not len(self):
            nothing = self.means.new_zeros(*wanted.shape, self.means.shape[1])
            return nothing, nothing, torch.zeros_like(wanted, dtype=torch.bool)
        holds = wanted[..., None] == self.classes
        holds = torch.where(holds.any(-1, keepdim=True), holds, self.classes == none)
        chance = torch.rand(holds.shape, device=holds.device).masked_fill(~holds, -1.0)
        found, index = chance.max(-1)
        return self.means[index], self.deviations[index], found >= 0
