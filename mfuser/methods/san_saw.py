"""SAN-SAW: each class is normalised in its own region of the first two maps, and the channels that matter for it whitened.

Normalisation removes the style of an image, but mixes what its classes have in common. Here five frequent classes are found by
small classifiers on the maps, and each is normalised alone (SAN); the result must be near what the labels' regions give. SAW is a
loss on the correlations among channels that matter for different classes. The network is DeepLab-V2 of output stride 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.decoder.deeplab import resized
from mfuser.decoder.semantic import SemanticNorm, grouped, whitening_loss
from mfuser.labels import IGNORE, train_ids
from mfuser.releases.san_saw import RELEASES
from mfuser.segmentor import Batch, Segmentor
from mfuser.towers.resnet import ResNetEncoder, resnets

__all__ = ["BACKBONES", "FIDELITY", "MODEL", "PAPER", "RELEASES", "TITLE", "TOWERS", "Options", "SanSaw"]

TITLE = "SAN-SAW"
PAPER = "Semantic-Aware Domain Generalized Segmentation, CVPR 2022, arXiv:2204.00822"
FIDELITY = "exact"
BACKBONES = (
    {"backbone": "resnet101"},
    {"backbone": "resnet50"},
    {"backbone": "tiny_resnet"},
)
TOWERS = {"backbone": {"trunk": "encoder.trunk"}}

SELECTED = (0, 10, 2, 1, 8)  # road, sky, building, sidewalk, vegetation: the most frequent ones of GTA5
AUX_WEIGHT = 0.1  # of everything but the last classifier
_MEANS = (122.679, 116.669, 104.007)  # of red, green, blue in 0..255, as in Caffe


@dataclass(frozen=True)
class Options:
    """What a model is built from."""

    backbone: str = "resnet101"  # a ResNet of `dgbench models`
    variant: str = "release"  # the authors' code: without whitening, regions not cut out; or "paper", with both
    image_size: tuple[int, int] = (640, 640)  # (H, W) of training crop and test window

    def __post_init__(self) -> None:
        if self.backbone not in resnets():
            raise ValueError(f"backbone `{self.backbone}` is no ResNet; choose from {', '.join(resnets())}")
        if self.variant not in ("release", "paper"):
            raise ValueError(f"variant `{self.variant}` is unknown; choose from release, paper")


class Classifier(nn.Module):
    """DeepLab-V2's four dilated convolutions, of which AdaptSegNet's code, and so this one, adds up the first two alone."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv2d_list = nn.ModuleList(
            [nn.Conv2d(channels, classes, 3, padding=rate, dilation=rate) for rate in (6, 12, 18, 24)]
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.conv2d_list[0](x) + self.conv2d_list[1](x)
        return logits


class SanEncoder(ResNetEncoder):
    """A ResNet of output stride 8 as AdaptSegNet has it, with a norm of its own behind the stem, in blue, green, red."""

    def __init__(self, name: str) -> None:
        super().__init__(name, output_stride=8)
        trunk = self.trunk
        # of images in [0, 1]
        self.mean = torch.tensor(_MEANS).view(3, 1, 1) / 255
        self.std = torch.full((3, 1, 1), 1 / 255)
        trunk.maxpool.ceil_mode = True
        first = trunk.layer2[0]
        if hasattr(first, "conv3"):  # in bottlenecks the 1x1 convolution has the stride
            first.conv1.stride, first.conv2.stride = (2, 2), (1, 1)
        trunk.bn1.requires_grad_(False)  # published, and not used
        self.in1 = nn.BatchNorm2d(trunk.bn1.num_features)

    def normalised(self, images: Tensor) -> Tensor:
        """Return images (B, 3, H, W) in [0, 1] as Caffe has them: in 0..255, less the mean of each channel, blue first."""
        return super().normalised(images).flip(1)

    def stem(self, normalised: Tensor) -> Tensor:
        """Return the map that enters the first stage, of (side / 2) / 2 + 1 cells a side."""
        trunk = self.trunk
        out: Tensor = trunk.maxpool(trunk.act1(self.in1(trunk.conv1(normalised))))
        return out


@dataclass
class Seen:
    """What one pass gives: for each of the first two stages the map before and behind its norm, and its logits."""

    before: list[Tensor]
    behind: list[Tensor]
    logits: list[Tensor]  # at the maps' sizes
    third: Tensor  # map of the third stage, whose classifier has no loss
    last: Tensor  # logits of the last one


class SanSaw(Segmentor):
    """Encoder with semantic-aware norms behind its first two stages, and a classifier behind each of the four."""

    any_size = True
    no_decay = ()  # the authors decay all parameters

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.image_size, self.paper = options.image_size, options.variant == "paper"
        self.mixes_batch = self.paper  # the clusters are of all images together
        self.no_fast = "variant `paper` finds clusters of every pass on the host" if self.paper else ""
        if self.paper and find_spec("kmeans1d") is None:
            raise ValueError("variant `paper` needs kmeans1d, which is not installed: pip install -e '.[kmeans]'")
        self.encoder = SanEncoder(options.backbone)
        channels, classes = self.encoder.channels, len(self.classes)
        self.classifier_1, self.classifier_2 = (nn.Conv2d(width, classes, 1) for width in channels[:2])
        self.SAN_stage_1, self.SAN_stage_2 = (SemanticNorm(width, SELECTED, clustered=self.paper) for width in channels[:2])
        self.layer5, self.layer6 = (Classifier(width, classes) for width in channels[2:])
        for part in (self.classifier_1, self.classifier_2, self.SAN_stage_1, self.SAN_stage_2, self.layer5, self.layer6):
            for module in part.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.normal_(module.weight, std=0.01)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K, H, W)."""
        self.check_size(images)
        return resized(self.see(images).last, images.shape[-2:])

    def enter_training(self) -> None:
        """Freeze what no loss reaches: the authors' optimizer has these parameters, and leaves them as they are."""
        for name, parameter in self.named_parameters():
            unread = name.startswith(("layer5.", "layer6.conv2d_list.2.", "layer6.conv2d_list.3."))
            branch = not self.paper and ".CFR_branches." in name and ".CFR_branches.0." not in name
            if unread or branch:
                parameter.requires_grad_(False)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Cross entropy of the last and of the first two classifiers, distance to the labels' norms; in the paper whitening, too.

        Raises: TypeError or ValueError for labels that are no train ids.
        """
        self.check_size(batch.images)
        labels = train_ids(batch.labels, len(self.classes))
        seen = self.see(batch.images)
        weights = class_weights(labels, len(self.classes))
        size = batch.images.shape[-2:]
        terms = {"loss_seg": weighted(resized(seen.last.float(), size), labels, weights)}
        for i, (norm, classifier) in enumerate(self._stages(), 1):
            before, behind = seen.before[i - 1], seen.behind[i - 1].float()
            logits = resized(seen.logits[i - 1].float(), size)
            terms[f"stage{i}.loss_seg"] = AUX_WEIGHT * weighted(logits, labels, weights)
            terms[f"stage{i}.loss_norm"] = AUX_WEIGHT * F.smooth_l1_loss(behind, norm.target(before, labels).float())
            if self.paper:
                groups = grouped(behind, classifier.weight[:, :, 0, 0], SELECTED)
                terms[f"stage{i}.loss_whitening"] = AUX_WEIGHT * whitening_loss(groups)
        return terms

    def see(self, images: Tensor, *, normalised: bool = False) -> Seen:
        """Return the maps and logits of images (B, 3, H, W) in [0, 1], or of ones that are normalised already."""
        x = self.encoder.stem(images if normalised else self.encoder.normalised(images))
        before, behind, logits = [], [], []
        stages, norms = self.encoder.stages, self._stages()
        for stage, (norm, classifier) in zip(stages[:2], norms, strict=True):
            before.append(stage(x))
            logits.append(classifier(before[-1].detach()))
            x = norm(before[-1], logits[-1])
            behind.append(x)
        third = stages[2](x)
        return Seen(before, behind, logits, third, self.layer6(stages[3](third)))

    def _stages(self) -> tuple[tuple[SemanticNorm, nn.Conv2d], tuple[SemanticNorm, nn.Conv2d]]:
        return (self.SAN_stage_1, self.classifier_1), (self.SAN_stage_2, self.classifier_2)


def class_weights(labels: Tensor, classes: int) -> Tensor:
    """Return 1 less each class's share of all pixels (B, H, W) of a batch, ignored ones included."""
    inside = labels[labels != IGNORE]
    return 1 - torch.bincount(inside, minlength=classes).float() / labels.numel()


def weighted(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Cross entropy of logits (B, K, H, W), the mean over labelled pixels weighted by class; 0 where none is labelled."""
    total = F.cross_entropy(logits, labels, weights, ignore_index=IGNORE, reduction="sum")
    each = torch.cat([weights, weights.new_zeros(1)])[labels.clamp(max=len(weights))]
    return total / each.sum().clamp(min=torch.finfo(each.dtype).tiny)


MODEL = SanSaw
