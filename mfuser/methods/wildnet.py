"""WildNet: images of the source get the styles of wild images in the first stages, and their contents as further contrast.

A step has three streams: the source, wild images, and the source with the wild images' styles, the means and deviations of the
channels of its maps. The stylised stream must be classified like the source, and its features must be near the source's, and
near the most similar content in a dictionary of wild features. The network is RobustNet's DeepLabV3+, whose stem has no norm.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from mfuser.decoder.deeplab import AuxiliaryHead, DeepLabV3Plus, pixel_loss, resized
from mfuser.labels import IGNORE, train_ids
from mfuser.releases import Release, robustnet
from mfuser.segmentor import Batch, Extra, Segmentor
from mfuser.towers.resnet import ResNetEncoder, resnets

TITLE = "WildNet"
PAPER = "WildNet: Learning Domain Generalized Semantic Segmentation from the Wild, CVPR 2022, arXiv:2204.01446"
FIDELITY = "exact"
BACKBONES = (
    {"backbone": "resnet101"},
    {"backbone": "resnet50"},
    {"backbone": "tiny_resnet"},
)
TOWERS = {"backbone": {"trunk": "encoder.trunk"}}

AUX_WEIGHT, CONTENT_WEIGHT, CONSISTENCY_WEIGHT = 0.4, 0.1, 10.0
TEMPERATURE = 0.07
_STRIDE = 16  # of the encoder's coarsest map
# sizes by the tower; an option left at None takes them from here
_SIZES = {
    "full": {"decoder_dim": 256, "points": 64, "wild_points": 16, "wild_images": 1536},
    "tiny_resnet": {"decoder_dim": 64, "points": 16, "wild_points": 8, "wild_images": 32},
}


@dataclass(frozen=True)
class Options:
    """What a model is built from. Sizes at None are the release's, or smaller ones with `tiny_resnet`."""

    backbone: str = "resnet101"  # a ResNet of `dgbench models`
    decoder_dim: int | None = None  # width of the decoder, half that of the auxiliary head
    points: int | None = None  # side of the grid of features of an image of the source that are contrasted
    wild_points: int | None = None  # side of the grid of a wild image's features that enter the dictionary
    wild_images: int | None = None  # images whose features are kept in the dictionary
    image_size: tuple[int, int] = (768, 768)  # (H, W) of training crop and test window

    def __post_init__(self) -> None:
        if self.backbone not in resnets():
            raise ValueError(f"backbone `{self.backbone}` is no ResNet; choose from {', '.join(resnets())}")
        for name, value in _SIZES.get(self.backbone, _SIZES["full"]).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
            elif getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")


class StylizedEncoder(ResNetEncoder):
    """A ResNet of output stride 16 without the stem's norm, whose first two stages can take the styles of other images."""

    STYLED = 2  # stages

    def __init__(self, name: str) -> None:
        super().__init__(name, output_stride=_STRIDE)
        self.trunk.bn1 = nn.Identity()
        for stage in self.stages[: self.STYLED]:
            # their last ReLU comes behind the styles
            last = stage[-1]  # type: ignore[index]
            setattr(last, "act3" if hasattr(last, "act3") else "act2", nn.Identity())

    def maps(self, x: Tensor) -> list[Tensor]:
        """Return the four maps of what `stem` gives."""
        found = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            x = F.relu(x) if i < self.STYLED else x
            found.append(x)
        return found

    def streams(self, images: Tensor, wild: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return the maps of normalised images, of wild ones without gradients, and of the images with the wild ones' styles.

        In training each norm sees the streams one after another, in this order.
        """
        trunk = self.trunk
        own = trunk.conv1(images)
        with torch.no_grad():
            other = trunk.conv1(wild)
        styled = with_style(own, other)
        # not in place: the styles' gradients need what is before
        at = trunk.maxpool(F.relu(own)), trunk.maxpool(F.relu(other)), trunk.maxpool(F.relu(styled))
        found: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        for i, stage in enumerate(self.stages):
            at = through(stage, *at, styles=i < self.STYLED)
            for maps, x in zip(found, at, strict=True):
                maps.append(x)
        return found


class Contents(nn.Module):
    """A ring of the last features of wild images: unit columns (C, Q), at first random ones; `next` is written next."""

    columns: Tensor
    next: Tensor

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.register_buffer("columns", F.normalize(torch.randn(channels, size), dim=0))
        self.register_buffer("next", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def nearest(self, points: Tensor, by: int = 512) -> Tensor:
        """Return the index (N,) of the column nearest to each point (N, C) by dot product, in half precision as released."""
        # CPUs multiply in fp32, what GPUs do to halves, too: their own products of halves take seconds a step
        kind = torch.half if points.is_cuda else torch.float32
        columns = self.columns.half().to(kind)
        return torch.cat([(part.to(kind) @ columns).half().argmax(1) for part in points.half().split(by)])

    @torch.no_grad()
    def add(self, points: Tensor) -> None:
        """Replace the oldest columns by points (N, C); of more than Q of them, the last stay."""
        size = self.columns.shape[1]
        places = (self.next + torch.arange(len(points), device=points.device)) % size
        self.columns[:, places[-size:]] = points[-size:].T.to(self.columns.dtype)
        self.next.copy_((self.next + len(points)) % size)


class WildNet(Segmentor):
    """Encoder of output stride 16, DeepLabV3+ decoder, auxiliary head; in training a projection and the dictionary."""

    any_size = True
    min_batch = 2  # a batch norm stands behind the global pooling
    no_decay = ()  # the authors decay all parameters
    extras = (Extra("wild", augmented=True),)

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.image_size, self.grids = options.image_size, (options.points, options.wild_points)
        dim, side, images = options.decoder_dim, options.wild_points, options.wild_images
        assert dim is not None
        assert side is not None
        assert images is not None
        self.size = images * side**2
        self.encoder = StylizedEncoder(options.backbone)
        channels, classes = self.encoder.channels, len(self.classes)
        self.decoder = DeepLabV3Plus(channels[0], channels[3], classes, dim)
        self.aux = AuxiliaryHead(channels[2], classes, 2 * dim)
        self.proj = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(inplace=True), nn.Linear(dim, dim))
        for layer in (self.proj[0], self.proj[2]):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K, H, W)."""
        self.check_size(images)
        maps = self.encoder(images)
        return resized(self.decoder(maps[0], maps[3]), images.shape[-2:])

    def enter_training(self) -> None:
        """Make a dictionary of random contents."""
        self.training_only = nn.ModuleDict({"contents": Contents(self.proj[2].out_features, self.size)})  # type: ignore[arg-type]

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Cross entropy of images and of stylised ones, each with the auxiliary head's; contents; consistency of both heads.

        The features of the wild images then enter the dictionary.

        Raises: TypeError or ValueError for labels that are no train ids.
        """
        self.check_size(batch.images)
        labels = train_ids(batch.labels, len(self.classes))
        normalised = self.encoder.normalised(batch.images), self.encoder.normalised(batch.extra["wild"])
        own, other, styled = self.encoder.streams(*normalised)
        features = self.decoder.features(own[0], own[3])
        with torch.no_grad():
            wild = self._points(self.decoder.features(other[0], other[3]), self.grids[1])
        styled_features = self.decoder.features(styled[0], styled[3])
        logits, styled_logits = (self._logits(x, batch.images) for x in (features, styled_features))
        aux, styled_aux = self.aux(own[2]).float(), self.aux(styled[2]).float()
        contents = self.training_only["contents"]
        assert isinstance(contents, Contents)
        points = self._points(features, self.grids[0]), self._points(styled_features, self.grids[0])
        extension = content_loss(*points, at_points(labels, self.grids[0]), contents)
        contents.add(_gathered(wild.flatten(0, 1)))
        return {
            "loss_seg": pixel_loss(logits, labels),
            "aux.loss_seg": AUX_WEIGHT * pixel_loss(aux, labels),
            "styled.loss_seg": pixel_loss(styled_logits, labels),
            "styled.aux.loss_seg": AUX_WEIGHT * pixel_loss(styled_aux, labels),
            "loss_source_content": CONTENT_WEIGHT * extension[0],
            "loss_wild_content": CONTENT_WEIGHT * extension[1],
            "loss_consistency": CONSISTENCY_WEIGHT * divergence(logits, styled_logits),
            "aux.loss_consistency": AUX_WEIGHT * CONSISTENCY_WEIGHT * divergence(aux, styled_aux),
        }

    def _logits(self, features: Tensor, images: Tensor) -> Tensor:
        logits: Tensor = self.decoder.final2(features)
        return resized(logits.float(), images.shape[-2:])

    def _points(self, features: Tensor, side: int | None) -> Tensor:
        """Return projected unit features (B, N, C) at a grid of so many points a side, in fp32."""
        assert side is not None
        points = F.interpolate(features, (side, side), mode="nearest").flatten(2).transpose(1, 2)
        return F.normalize(self.proj(points).float(), dim=-1)


def through(stage: nn.Module, own: Tensor, other: Tensor, styled: Tensor, *, styles: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a stage gives of each stream, one after another; with `styles`, the stage lacks its last ReLU."""
    own = stage(own)
    with torch.no_grad():
        other = stage(other)
    styled = stage(styled)
    if styles:
        own, other, styled = F.relu(own), F.relu(other), F.relu(with_style(styled, other))
    return own, other, styled


def with_style(x: Tensor, other: Tensor) -> Tensor:
    """Return a map (B, C, h, w) with the means and deviations of the channels of another (adaptive instance normalisation)."""
    mean, deviation = style(x)
    new_mean, new_deviation = style(other)
    return ((x.float() - mean) / deviation * new_deviation + new_mean).to(x.dtype)


def style(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation (B, C, 1, 1) of the channels of a map (B, C, h, w), in fp32."""
    x = x.float()
    return x.mean((2, 3), keepdim=True), (x.var((2, 3), keepdim=True) + 1e-5).sqrt()


def at_points(labels: Tensor, side: int | None) -> Tensor:
    """Return the labels (B, N) of a grid of so many points a side, of labels (B, H, W)."""
    assert side is not None
    return F.interpolate(labels[:, None].float(), (side, side), mode="nearest").flatten(1).long()


def content_loss(source: Tensor, styled: Tensor, labels: Tensor, contents: Contents) -> tuple[Tensor, Tensor]:
    """Return the contrast of source points with the stylised ones at their place, and that with wild contents near these.

    The negatives of a point are the stylised points of other classes in its image. Points without a class are left out.

    Args:
        source, styled: unit features (B, N, C) in fp32.    labels: (B, N) train ids.
    """
    kind = source.device.type
    with torch.autocast(kind, enabled=False) if kind != "meta" else contextlib.nullcontext():
        terms = [_contrasts(*image, contents) for image in zip(source, styled, labels, strict=True)]
    own, wild = zip(*terms, strict=True)
    return torch.stack(own).mean(), torch.stack(wild).mean()


def _contrasts(source: Tensor, styled: Tensor, labels: Tensor, contents: Contents) -> tuple[Tensor, Tensor]:
    """Return both contrasts of one image: (N, C), (N, C), (N,)."""
    known = labels != IGNORE
    negative = (labels[:, None] != labels) & known
    similarity = (source @ styled.T).clamp(-1, 1) / TEMPERATURE
    positive = similarity.diagonal()
    with torch.no_grad():
        near = contents.columns[:, contents.nearest(styled)].T
    content = (source * near).sum(1).clamp(-1, 1) / TEMPERATURE
    diagonal = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    # of the same class, or without one: as dissimilar as can be, instead of left out
    kept = torch.where(negative | diagonal, similarity, -1 / TEMPERATURE)
    own = kept.logsumexp(1) - positive
    wild = (content.exp() + (kept.exp() * negative).sum(1)).log() - content
    count = known.sum() + 1e-5
    return (own * known).sum() / count, (wild * known).sum() / count


def divergence(logits: Tensor, styled: Tensor) -> Tensor:
    """Return the divergence (Kullback, Leibler) of stylised classes' probabilities, a mean over images, classes and pixels."""
    found = F.kl_div(styled.log_softmax(1), logits.softmax(1), reduction="sum") / logits.numel()
    return found.clamp(min=0)


def _gathered(points: Tensor) -> Tensor:
    """Return the points (N, C) of all processes, in the order of the processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return points
    found = [torch.empty_like(points) for _ in range(dist.get_world_size())]
    dist.all_gather(found, points.contiguous())
    return torch.cat(found)


MODEL = WildNet
RELEASES = tuple(
    Release(
        {"backbone": name},
        f"wildnet/{name}-gta",
        marks,
        robustnet.source,
        dead=robustnet.WILD_DEAD,
        lacks=robustnet.LACKS[name],
    )
    for name, marks in robustnet.WILD_MARKS.items()
)
