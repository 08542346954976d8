"""TLDR: texture learned from stylised and from random images, kept near ImageNet's by Gram matrices.

Each image is seen a second time with the style of a random image ("Texture Learning Domain Randomization for Domain Generalized
Segmentation", ICCV 2023). The correlations of the channels of a map, its Gram matrix, describe texture. Two losses hold them:
those of the source near those of the ImageNet trunk (texture regularisation), and those of the style image near those of the
stylised one where the style has changed them (texture generalisation).

The style transfer is PhotoWCT, whose weights are a file of the user's (`data.extra.transfer`). Content images enter it
normalised, style images in [0, 1]: so do stylised and style images enter the network, as in the authors' code. Without that file
(`variant: stm=pixel`) the colours of pixels are whitened and coloured instead, which is not the paper's method.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.decoder.separable_deeplab import SeparableDeepLabV3Plus, enlarged
from mfuser.labels import IGNORE, train_ids
from mfuser.releases.tldr import RELEASES as RELEASES
from mfuser.segmentor import Batch, Extra, ExtraFile, Segmentor
from mfuser.style_transfer import PhotoWCT, pixel_wct
from mfuser.towers.resnet import ResNetEncoder, resnets

TITLE = "TLDR"
PAPER = "Texture Learning Domain Randomization for Domain Generalized Segmentation, ICCV 2023, arXiv:2303.11546"
FIDELITY = "exact"
BACKBONES = (
    {"backbone": "resnet101_v1c"},
    {"backbone": "resnet50_v1c"},
    {"backbone": "tiny_resnet"},
)
TOWERS = {"backbone": {"trunk": "encoder.trunk"}}

PIXEL = "stm=pixel"
REGULARISATION = (5e-3, 5e-4, 5e-5, 5e-6)  # weights of the four maps
GENERALISATION = (5e-3, 5e-4)  # of the two finest


@dataclass(frozen=True)
class Options:
    """What a model is built from."""

    backbone: str = "resnet101_v1c"  # a ResNet of `dgbench models`
    variant: str = "release"  # stm=pixel: colours of pixels are transferred, without PhotoWCT's file; not the paper's method
    original_weight: float | None = (
        None  # of the source's cross entropy, the rest is the stylised one's; None: 0.1 with resnet101_v1c, else 0.5
    )
    threshold: float = 0.1  # change of a Gram matrix's entry from which the style is said to have changed it
    fade_steps: int | None = None  # steps after which both texture losses are 0, linearly; None: the whole training
    decoder_dim: int | None = None  # width of the decoder; None: 512, with tiny_resnet 64
    image_size: tuple[int, int] = (768, 768)  # (H, W) of training crop and test window

    def __post_init__(self) -> None:
        if self.backbone not in resnets():
            raise ValueError(f"backbone `{self.backbone}` is no ResNet; choose from {', '.join(resnets())}")
        if self.variant not in ("release", PIXEL):
            raise ValueError(f"variant `{self.variant}` is unknown; choose from release, {PIXEL}")
        if self.original_weight is None:
            object.__setattr__(self, "original_weight", 0.1 if self.backbone == "resnet101_v1c" else 0.5)
        assert self.original_weight is not None
        if not 0 <= self.original_weight <= 1:
            raise ValueError(f"original_weight is {self.original_weight}, expected 0 to 1")
        if self.fade_steps is not None and self.fade_steps < 1:
            raise ValueError(f"fade_steps is {self.fade_steps}, expected at least 1, or null for the whole training")
        if self.decoder_dim is None:
            object.__setattr__(self, "decoder_dim", 64 if self.backbone == "tiny_resnet" else 512)


class TLDR(Segmentor):
    """Encoder of output stride 8, mmsegmentation's DeepLabV3+ decoder; in training style transfer, and the trunk as it began."""

    any_size = True
    min_batch = 2  # a batch norm stands behind the global pooling
    no_decay = ()  # the authors' keys for norms match nothing

    def __init__(self, options: Options) -> None:
        super().__init__()
        assert options.decoder_dim is not None
        assert options.original_weight is not None
        self.image_size, self.variant, self.threshold = options.image_size, options.variant, options.threshold
        self.original_weight, self.fade_steps = options.original_weight, options.fade_steps
        self.encoder = ResNetEncoder(options.backbone, output_stride=8, contracted=True)
        self.decoder = SeparableDeepLabV3Plus(
            self.encoder.channels[0], self.encoder.channels[3], len(self.classes), options.decoder_dim
        )
        self.extras = (Extra("style", stretch=True),)
        self.eval_parts = ("training_only.teacher",)
        if self.variant != PIXEL:
            what = "the weights of PhotoWCT (`photo_wct.pth` of NVIDIA's FastPhotoStyle, CC BY-NC-SA 4.0)"
            self.files = (ExtraFile("transfer", what, instead=f"--set method.variant={PIXEL}, another method"),)
            self.eval_parts = (*self.eval_parts, "training_only.transfer")

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K, H, W)."""
        self.check_size(images)
        return self._logits(self.encoder(images), images)

    def enter_training(self) -> None:
        """Make a frozen copy of the trunk with its published weights, and a network for the transfer of styles, still random."""
        self.training_only = nn.ModuleDict({"teacher": copy.deepcopy(self.encoder).requires_grad_(False)})
        if self.variant != PIXEL:
            self.training_only["transfer"] = PhotoWCT().requires_grad_(False)

    def take_file(self, name: str, path: Path) -> None:
        """Read the weights of the network for the transfer of styles."""
        transfer = self.training_only["transfer"]
        assert isinstance(transfer, PhotoWCT)
        transfer.take(path)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Cross entropy of both views, texture regularisation and texture generalisation.

        Raises: TypeError or ValueError for labels that are no train ids.
        """
        self.check_size(batch.images)
        labels = train_ids(batch.labels, len(self.classes))
        source, style = self.encoder.normalised(batch.images), batch.extra["style"]
        style = style.to(source.dtype)
        maps = self._maps(source)
        original = self._logits(maps, batch.images).float()
        transfer = pixel_wct if self.variant == PIXEL else self.training_only["transfer"]
        with torch.autocast(source.device.type, enabled=False):
            stylised = transfer(source, style)
        stylised_maps = self._maps(stylised)
        stylised_logits = self._logits(stylised_maps, batch.images).float()
        style_maps = self._maps(style)[: len(GENERALISATION)]
        with torch.no_grad():
            taught = self.training_only["teacher"](batch.images)
        left = max(0.0, 1 - batch.step / (self.fade_steps or batch.steps))
        return {
            "loss_seg": self.original_weight * cross_entropy(original, labels),
            "loss_stylised": (1 - self.original_weight) * cross_entropy(stylised_logits, labels),
            "loss_regularisation": left * regularisation(maps, taught),
            "loss_generalisation": left * generalisation(style_maps, stylised_maps, maps, self.threshold),
        }

    def _maps(self, normalised: Tensor) -> list[Tensor]:
        return self.encoder.maps(self.encoder.stem(normalised))

    def _logits(self, maps: list[Tensor], images: Tensor) -> Tensor:
        return enlarged(self.decoder(maps[0], maps[3]), images.shape[-2:])


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum over labelled pixels, divided by the number of all, as mmsegmentation 0.x does."""
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none").mean()


def gram(x: Tensor) -> Tensor:
    """Return the correlations (B, C, C) of the channels of a map (B, C, h, w), in fp32."""
    with torch.autocast(x.device.type, enabled=False):
        flat = x.flatten(2).float()
        return flat @ flat.mT / flat.shape[2]


def regularisation(maps: Sequence[Tensor], taught: Sequence[Tensor]) -> Tensor:
    """Return the weighted distances of the maps' Gram matrices from others, each over the whole batch."""
    pairs = zip(REGULARISATION, maps, taught, strict=True)
    return torch.stack([weight * distance(gram(x) - gram(y)) for weight, x, y in pairs]).sum()


def generalisation(style: Sequence[Tensor], stylised: Sequence[Tensor], source: Sequence[Tensor], threshold: float) -> Tensor:
    """Return the weighted distances of Gram matrices of style and stylised images, where the style has changed the source's."""
    terms = []
    for weight, r, s, x in zip(GENERALISATION, style, stylised, source, strict=False):
        of_stylised = gram(s)
        terms.append(weight * distance((gram(r) - of_stylised) * changed(of_stylised, gram(x), threshold)))
    return torch.stack(terms).sum()


def changed(stylised: Tensor, source: Tensor, threshold: float) -> Tensor:
    """Return where Gram matrices exceed others by more than the threshold: Random Style Masking."""
    return (stylised - source).detach() > threshold


def distance(difference: Tensor) -> Tensor:
    """Return the Frobenius norm of a batch of matrices (B, C, C) over C."""
    return torch.linalg.vector_norm(difference) / difference.shape[-1]


MODEL = TLDR
