"""CLOUDS: a frozen convolutional CLIP, a mask decoder that classifies by text, and training with generated images.

A query is classified by the similarity of its embedding to the text embeddings of all synonyms of all classes ("Collaborating
Foundation Models for Domain Generalized Semantic Segmentation", CVPR 2024). Training has two stages. The first uses the source
alone. The second starts from the first's weights (`train.init`) and adds generated images, pseudo-labelled by a teacher that is
an exponential moving average of the head.

Model, losses and the first stage follow the authors' code. Of the second stage these differ:
- The authors run SAM in training, prompted by five random points of every large component of the teacher's labels. Here SAM's
  masks can be stored beside the images, made in advance (`segments`), and each component takes the segment that contains most of
  its points; otherwise the teacher's labels are used unchanged, which is what the authors do where no component is large enough.
- A step has as many generated as source images. The authors sample both from one pool; the size of the generated set, and with it
  the ratio, is not in their repository.
- Saturation and hue of generated images are changed by torchvision's functions.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.decoder.criterion import MaskCriterion
from mfuser.decoder.mask_decoder import Output, class_scores
from mfuser.decoder.matching import Hungarian
from mfuser.decoder.open_vocabulary import PooledMaskDecoder, text_logits
from mfuser.decoder.pixel_decoder import PixelDecoder
from mfuser.decoder.points import Draw, uniform
from mfuser.decoder.queries import LearnedQueries
from mfuser.decoder.sizes import SIZES
from mfuser.labels import train_ids
from mfuser.processes import even_rows
from mfuser.pseudo_labels import distorted, refined
from mfuser.releases.clouds import RELEASES
from mfuser.segmentor import Batch, Extra, Segmentor, TrainingData
from mfuser.towers.cnn import STRIDES, CNNEncoder
from mfuser.towers.prompts import SYNONYMS, TEMPLATES, PromptEncoder
from mfuser.towers.table import TOWERS as TABLE

__all__ = ["BACKBONES", "FIDELITY", "MODEL", "PAPER", "RELEASES", "TITLE", "TOWERS", "Clouds", "Options"]

TITLE = "CLOUDS"
PAPER = "Collaborating Foundation Models for Domain Generalized Semantic Segmentation, CVPR 2024"
FIDELITY = "exact"
BACKBONES = ({"backbone": "convnext_l_clip"}, {"backbone": "tiny_cnn"})
TOWERS = {"backbone": {"trunk": "encoder.trunk", "text": "prompts.tower"}}

SOURCE_ONLY = "stage 1 only"

# sizes by the tower; an option left at None takes them from here
_SIZES: dict[str, dict[str, int | bool]] = {
    "full": {**SIZES["full"], "queries": 100, "templates": len(TEMPLATES), "component": 5000, "freeze_towers": True},
    "tiny_cnn": {**SIZES["tiny"], "queries": 40, "templates": 1, "component": 139, "freeze_towers": False},
}


@dataclass(frozen=True)
class Options:
    """Options of the model. Sizes at None are the release's, or smaller ones with the tower `tiny_cnn`."""

    backbone: str = "convnext_l_clip"  # a tower of `dgbench models` that is a convolutional network with a text tower
    variant: str = "release"  # the second stage, with generated images; or "stage 1 only", trained on the source alone
    segments: bool = False  # SAM's masks are stored beside the generated images; else the teacher's labels are used unchanged
    image_size: tuple[int, int] = (768, 768)  # (H, W) of training crop and test window; every size is scored
    queries: int | None = None
    templates: int | None = None  # number of prompt templates
    decoder_dim: int | None = None  # width of pixel and mask decoder
    heads: int | None = None  # attention heads of both
    pixel_layers: int | None = None
    mask_layers: int | None = None
    ffn_dim: int | None = None  # of the mask decoder; the pixel decoder's is at most 1024
    points: int | None = None  # of deformable attention, per head and scale
    groups: int | None = None  # of the decoder's group norms
    mask_points: int | None = None  # sampled per mask by matching and criterion
    component: int | None = None  # pixels that a component of the teacher's labels must exceed to get one of SAM's masks
    freeze_towers: bool | None = None  # image and text tower are not trained
    backend: str = "auto"  # of the custom operators

    def __post_init__(self) -> None:
        for name, value in _SIZES.get(self.backbone, _SIZES["full"]).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        there = [name for name, row in TABLE.items() if row.channels and row.text and not row.clip_resnet]
        if self.backbone not in there:
            raise ValueError(f"backbone `{self.backbone}` is no convolutional network with a text tower; choose from {there}")
        if self.variant not in ("release", SOURCE_ONLY):
            raise ValueError(f"variant `{self.variant}` is unknown; choose from release, {SOURCE_ONLY}")
        if self.segments and self.variant == SOURCE_ONLY:
            raise ValueError(f"segments belong to generated images, unused by variant `{SOURCE_ONLY}`; set variant=release")
        if not 1 <= int(self.templates or 0) <= len(TEMPLATES):
            raise ValueError(f"templates is {self.templates}, expected 1 to {len(TEMPLATES)}")


class Head(nn.Module):
    """Pixel decoder, learned queries and mask decoder: what is trained. The teacher is a copy of it."""

    def __init__(self, channels: tuple[int, ...], text_dim: int, options: Options) -> None:
        super().__init__()
        o: Any = options
        self.pixel_decoder = PixelDecoder(
            channels,
            dim=o.decoder_dim,
            layers=o.pixel_layers,
            heads=o.heads,
            points=o.points,
            ffn_dim=min(o.ffn_dim, 1024),
            groups=o.groups,
            backend=o.backend,
        )
        self.queries = LearnedQueries(o.queries, o.decoder_dim)
        self.mask_decoder = PooledMaskDecoder(text_dim, dim=o.decoder_dim, layers=o.mask_layers, heads=o.heads, ffn_dim=o.ffn_dim)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """Initialise as Mask2Former does in detectron2; embeddings, class and mask heads keep PyTorch's defaults."""
        pixel = self.pixel_decoder
        for convolution in pixel.input_convs:
            nn.init.xavier_uniform_(convolution.conv.weight)  # type: ignore[arg-type,union-attr]
        for convolution in (pixel.lateral_conv.conv, pixel.output_conv.conv, pixel.mask_feature):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        assert pixel.mask_feature.bias is not None
        nn.init.zeros_(pixel.mask_feature.bias)
        for layers in (pixel.layers, self.mask_decoder.layers):
            for parameter in layers.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        for layer in pixel.layers:
            layer.self_attn.reset_parameters()  # type: ignore[operator,union-attr]

    def forward(self, maps: list[Tensor], text: Tensor, words: tuple[int, ...], *, last: bool = False) -> list[Output]:
        """Return class logits (B, Q, K + 1) and mask logits (B, Q, h, w) of every decoder output, or of the last.

        Args:
            text: (W + 1, E), see `text_logits`.    words: the number of words of each class.
        """
        mask_features, scales = self.pixel_decoder(maps)
        decoder = self.mask_decoder
        outputs = decoder(scales, mask_features, *self.queries(len(maps[0])), last=last)
        return [(text_logits(embedded, text, words, decoder.logit_scale), masks) for embedded, masks in outputs]


class Clouds(Segmentor):
    """The model; see the module docstring for the idea and `Options` for the sizes."""

    ops = ("ms_deform_attn",)
    any_size = True
    no_decay = ()
    no_decay_types = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.Embedding)

    EVERY, KEEP = 100, 0.999  # steps between two updates of the teacher, and its momentum

    def __init__(self, options: Options) -> None:
        super().__init__()
        o: Any = options
        self.image_size, self.backend = o.image_size, o.backend
        self.frozen, self.component = o.freeze_towers, o.component
        self.words = tuple(len(words) for words in SYNONYMS)
        self.encoder = CNNEncoder(o.backbone)
        words = [word for words in SYNONYMS for word in words]
        self.prompts = PromptEncoder(o.backbone, words, TEMPLATES[: o.templates], dim=o.decoder_dim)
        self.void_embedding = nn.Embedding(1, self.prompts.dim)
        self.head = Head(self.encoder.channels, self.prompts.dim, options)
        self.criterion = MaskCriterion(len(self.classes), matcher=Hungarian(o.mask_points), points=o.mask_points)
        if self.frozen:
            self.encoder.requires_grad_(False)
            self.prompts.requires_grad_(False)
            self.eval_parts = ("encoder", "prompts")
        else:
            # tokens that occur in no prompt would change by weight decay only
            self.prompts.tower.token_embedding.requires_grad_(False)
        if o.variant != SOURCE_ONLY:
            self.extras = (Extra("generated", segments=o.segments),)
            self.eval_parts = (*self.eval_parts, "training_only.teacher")

    def forward(self, images: Tensor) -> Tensor:
        """Return class scores (B, K, H, W): at most the number of queries, not probabilities."""
        logits, masks = self.masks(images)
        return class_scores(logits, _enlarged(masks, (images.shape[-2], images.shape[-1])))

    def masks(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return class and mask logits of the last decoder layer; masks of a padded image have its size, without the padding."""
        self.check_size(images)
        logits, masks = self.head(self._maps(images), self._text(), self.words, last=True)[-1]
        return logits, _without_padding(masks, (images.shape[-2], images.shape[-1]))

    def loss(self, batch: Batch, *, draw: Draw = uniform) -> dict[str, Tensor]:
        """Return class, mask and dice terms of every decoder output, over source and generated images together."""
        images, labels, text = batch.images, batch.labels, self._text()
        if self.extras:
            clean, segments = _flipped(batch.extra["generated"], batch.extra.get("generated_segments"))
            images = torch.cat([images, distorted(clean)])
            labels = torch.cat([train_ids(labels, len(self.classes)), self._taught(clean, text, segments).long()])
        outputs = self.head(self._maps(images), text, self.words)
        terms: dict[str, Tensor] = self.criterion(outputs, labels, draw=draw)
        return terms

    def enter_training(self) -> None:
        """Create the teacher of the second stage."""
        if self.extras:
            self.training_only = nn.ModuleDict({"teacher": copy.deepcopy(self.head).requires_grad_(False)})

    def before_step(self, step: int, steps: int, data: TrainingData) -> None:
        """Update the teacher."""
        if self.extras and step and step % self.EVERY == 0:
            with torch.no_grad():
                for old, new in zip(self.training_only["teacher"].parameters(), self.head.parameters(), strict=True):
                    old.lerp_(new, 1 - self.KEEP)

    def groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return groups; norms and embeddings, other than the pixel decoder's level encoding, have no weight decay."""
        groups = super().groups(lr, weight_decay)
        level = self.head.pixel_decoder.level_encoding.weight
        groups[1]["params"] = [p for p in groups[1]["params"] if p is not level]
        groups[0]["params"].append(level)
        return groups

    def _text(self) -> Tensor:
        """Return the normalised embeddings (W + 1, E) of all words and of "no object"."""
        return torch.cat([self.prompts(), F.normalize(self.void_embedding.weight, dim=-1)])

    def _maps(self, images: Tensor) -> list[Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps: list[Tensor] = self.encoder(images)
        return maps

    @torch.no_grad()
    def _taught(self, images: Tensor, text: Tensor, segments: Tensor | None) -> Tensor:
        """Return pseudo-labels (B, H, W) of generated images."""
        logits, masks = self.training_only["teacher"](self._maps(images), text, self.words, last=True)[-1]
        size = (images.shape[-2], images.shape[-1])
        labels = class_scores(logits, _enlarged(_without_padding(masks, size), size)).argmax(1)
        return labels if segments is None else refined(labels, segments, self.component)


def _enlarged(masks: Tensor, size: tuple[int, int]) -> Tensor:
    if masks.shape[-2:] == torch.Size(size):
        return masks
    return F.interpolate(masks, size, mode="bilinear", align_corners=False)


def _without_padding(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Return mask logits unchanged if nothing was padded, else upsampled to the padded size and cut to the image."""
    height, width = (side * STRIDES[0] for side in masks.shape[-2:])
    if (height, width) == size:
        return masks
    return _enlarged(masks, (height, width))[..., : size[0], : size[1]]


def _flipped(images: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Mirror each image with probability 0.5, and its segments with it."""
    chosen = even_rows(len(images)).of(lambda total: torch.rand(total, device=images.device)) < 0.5
    images = torch.where(chosen[:, None, None, None], images.flip(-1), images)
    return images, None if segments is None else torch.where(chosen[:, None, None], segments.flip(-1), segments)


MODEL = Clouds
