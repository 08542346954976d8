"""SAN-SAW's parts (Peng et al., CVPR 2022): normalisation of each class in its own region, and whitening of its channels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLUSTERS = 5  # of a class's heat; the lowest is not its region
RELAX = 2.0  # so many pairs of channels share one unit of correlation that is free
_EPSILON = 1e-5


class SemanticNorm(nn.Module):
    """Semantic-aware normalisation of a map: the sum of its selected classes' regions, each normalised alone.

    Args:
        classes: train ids of the selected classes.
        clustered: regions are cut out by k-means, and each class has its own convolution, as in the paper; otherwise a region is
            the whole map, and all classes use the first convolution, as in the authors' code.
    """

    def __init__(self, channels: int, classes: Sequence[int], *, clustered: bool = False) -> None:
        super().__init__()
        self.classes, self.clustered = tuple(classes), clustered
        self.IN = nn.InstanceNorm2d(channels, affine=True)
        self.CFR_branches = nn.ModuleList([nn.Conv2d(3, 1, 7, padding=3, bias=False) for _ in self.classes])

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        """Return the normalised map (B, C, h, w) of a map and the logits (B, K, h, w) of its classes."""
        shares = logits.softmax(1)
        # slices: a list of indices would be copied from the host, which a CUDA graph cannot hold
        found = [shares[:, label : label + 1] for label in self.classes]
        regions = [self._region(x * share, share, i) for i, share in enumerate(found)]
        return F.relu(torch.stack([self.IN(region) for region in regions]).sum(0))

    def target(self, x: Tensor, labels: Tensor) -> Tensor:
        """Return what `forward` should give of a map (B, C, h, w) whose labels (B, H, W) are known."""
        small = F.interpolate(labels[:, None].float(), x.shape[-2:], mode="nearest")
        return F.relu(torch.stack([self.IN(x * (small == label)) for label in self.classes]).sum(0))

    def _region(self, x: Tensor, share: Tensor, i: int) -> Tensor:
        """Return the i-th class's refined region (B, C, h, w) of a map that its share (B, 1, h, w) weighs."""
        described = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True), share], 1)
        refined = x * self.CFR_branches[i if self.clustered else 0](described).sigmoid()
        return refined * above_lowest(refined.mean(1, keepdim=True)) if self.clustered else refined


@torch.no_grad()
def above_lowest(heat: Tensor) -> Tensor:
    """Return 1 where values are not in the lowest of five clusters, else 0; the k-means is exact, over all values together."""
    import kmeans1d

    if heat.is_meta:  # no values, as where operations are counted
        return torch.ones_like(heat)
    values = heat.detach().float().cpu().numpy().ravel()
    found = np.asarray(kmeans1d.cluster(values.astype(np.float64), min(CLUSTERS, len(values))).clusters)
    return torch.from_numpy(found > 0).view(heat.shape).to(heat)


def whitening_loss(groups: Tensor) -> Tensor:
    """Return the sum over groups of the correlations beyond a margin, the mean over images.

    Args:
        groups: (B, G, N, h, w), as `grouped` makes them.
    """
    count = groups.shape[2]
    flat = groups.float().flatten(3)
    with torch.autocast(groups.device.type, enabled=False):
        covariance = flat @ flat.transpose(2, 3) / (flat.shape[3] - 1) + _EPSILON * torch.eye(count, device=groups.device)
    pairs = count * (count - 1) // 2
    off_diagonal = covariance.triu(1).abs().sum((2, 3))
    return ((off_diagonal - pairs // RELAX) / pairs).clamp(min=0).mean(0).sum()


def grouped(x: Tensor, weights: Tensor, classes: Sequence[int]) -> Tensor:
    """Return the groups (B, C // classes, classes, h, w) of the channels of a map (B, C, h, w), the most important first.

    The k-th group has each class's k-th most important channel, scaled by the sigmoid of its weight's size.

    Args:
        weights: (K, C) of the classifier, which say how important a channel is for a class; they get no gradient.
        classes: the selected ones.
    """
    sizes = weights.detach()[list(classes)].abs().float()
    order = ranked(sizes)[:, : sizes.shape[1] // len(classes)].T
    factors = sizes.T.gather(0, order).sigmoid()
    return x[:, order.flatten()].unflatten(1, order.shape) * factors[None, :, :, None, None]


def ranked(sizes: Tensor) -> Tensor:
    """Return the indices (N, C) of channels by falling size, for each class."""
    return sizes.sort(dim=1, descending=True, stable=True).indices
