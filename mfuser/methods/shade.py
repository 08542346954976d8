"""SHADE on a ResNet: each image a second time with a hallucinated style, and the two held consistent.

The style of a map is the mean and deviation of its channels behind the stem. From time to time the most different styles of the
source are chosen as a basis; a new style is a random convex combination of it. The network is RobustNet's DeepLabV3+.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.decoder.deeplab import AuxiliaryHead, DeepLabV3Plus, pixel_loss, resized
from mfuser.labels import IGNORE, train_ids
from mfuser.processes import divisor, even_rows, number_of_processes
from mfuser.releases import Release, robustnet
from mfuser.segmentor import Batch, Segmentor, TrainingData
from mfuser.towers.resnet import ResNetEncoder, resnets

TITLE = "SHADE"
PAPER = "Style-Hallucinated Dual Consistency Learning for Domain Generalized Semantic Segmentation, ECCV 2022, arXiv:2204.02548"
FIDELITY = "exact"
BACKBONES = (
    {"backbone": "resnet101"},
    {"backbone": "resnet50"},
    {"backbone": "tiny_resnet"},
)
TOWERS = {"backbone": {"trunk": "encoder.trunk"}}

AUX_WEIGHT, STYLE_WEIGHT = 0.4, 10.0
# classes of things, whose features on ImageNet are worth keeping
THINGS = (6, 7, 11, 12, 13, 14, 15, 16, 17, 18)
_STRIDE = 16  # of the encoder's coarsest map


@dataclass(frozen=True)
class Options:
    """What a model is built from."""

    backbone: str = "resnet101"  # a ResNet among mfuser.towers.table.TOWERS
    decoder_dim: int | None = None  # width of the decoder, half that of the auxiliary head; None: 256, with tiny_resnet 64
    concentration: float = 0.0156  # of the Dirichlet distribution that weighs the basis styles
    style_epochs: int = 3  # the basis is chosen anew after so many epochs
    image_size: tuple[int, int] = (768, 768)  # (H, W) of training crop and test window

    def __post_init__(self) -> None:
        if self.backbone not in resnets():
            raise ValueError(f"backbone `{self.backbone}` is no ResNet; choose from {', '.join(resnets())}")
        if any(side % _STRIDE or not side for side in self.image_size):
            raise ValueError(f"image size {tuple(self.image_size)} must be multiples of {_STRIDE}, the stride of the features")
        if self.concentration <= 0 or self.style_epochs < 1:
            raise ValueError(f"concentration {self.concentration} must be above 0, style_epochs {self.style_epochs} at least 1")
        if self.decoder_dim is None:
            object.__setattr__(self, "decoder_dim", 64 if self.backbone == "tiny_resnet" else 256)


class Styles(nn.Module):
    """A basis of styles: means and deviations (C, C), a row a style, as many as the map has channels.

    `epoch` is the number of steps of an epoch, 0 before the basis was first chosen.
    """

    means: Tensor
    deviations: Tensor
    epoch: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(channels, channels))
        self.register_buffer("deviations", torch.zeros(channels, channels))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.long))


class SHADE(Segmentor):
    """Encoder of output stride 16, DeepLabV3+ decoder, auxiliary head; in training styles, and the trunk as it began."""

    any_size = True
    no_decay = ()  # the authors decay all parameters
    eval_parts = ("training_only.teacher",)

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.image_size, self.concentration, self.style_epochs = options.image_size, options.concentration, options.style_epochs
        self.encoder = ResNetEncoder(options.backbone, output_stride=_STRIDE)
        assert options.decoder_dim is not None
        channels, classes, dim = self.encoder.channels, len(self.classes), options.decoder_dim
        self.decoder = DeepLabV3Plus(channels[0], channels[3], classes, dim)
        self.aux = AuxiliaryHead(channels[2], classes, 2 * dim)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K, H, W)."""
        self.check_size(images)
        maps = self.encoder(images)
        return resized(self.decoder(maps[0], maps[3]), images.shape[-2:])

    def enter_training(self) -> None:
        """Make an empty basis, and a frozen copy of the trunk with its published weights."""
        teacher = copy.deepcopy(self.encoder).requires_grad_(False)
        self.training_only = nn.ModuleDict({"teacher": teacher, "styles": Styles(self.encoder.trunk.bn1.num_features)})

    @torch.no_grad()
    def before_step(self, step: int, steps: int, data: TrainingData) -> None:
        """Choose the basis: before the first step and then every `style_epochs` epochs, but not in the last 5 % of the steps."""
        styles = self._styles()
        epoch = int(styles.epoch)
        if epoch and (step % (self.style_epochs * epoch) or step >= 0.95 * steps):
            return
        mode, found, by = self.training, [], 1
        self.eval()
        for batch in data.batches(step, augmented=True):
            mean, deviation = style(self.encoder.stem(self.encoder.normalised(batch.images)), square=True)
            found.append(torch.cat([mean, deviation], 1)[:, :, 0, 0])
            by = max(by, len(batch.images))
        self.train(mode)
        points = torch.cat(found).float()
        start = int(torch.randint(len(points), ()))
        channels = styles.means.shape[1]
        chosen = points[farthest(points, channels, start)]
        styles.means.copy_(chosen[:, :channels])
        styles.deviations.copy_(chosen[:, channels:])
        styles.epoch.fill_(max(1, len(points) // (by * number_of_processes())))

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Cross entropy of both views, that of the auxiliary head, consistency of the styles, and with the trunk's features.

        Raises: TypeError or ValueError for labels that are no train ids.
        """
        self.check_size(batch.images)
        labels = train_ids(batch.labels, len(self.classes)).repeat(2, 1, 1)
        x = self.encoder.stem(self.encoder.normalised(batch.images))
        maps = self.encoder.maps(torch.cat([x, self._hallucinated(x)]))
        logits = resized(self.decoder(maps[0], maps[3]).float(), batch.images.shape[-2:])
        with torch.no_grad():
            taught = self.training_only["teacher"](batch.images)[3].repeat(2, 1, 1, 1)
        return {
            "loss_seg": pixel_loss(logits, labels),
            "aux.loss_seg": AUX_WEIGHT * pixel_loss(self.aux(maps[2]), labels),
            "loss_style": STYLE_WEIGHT * divergence(*logits.float().chunk(2)),
            "loss_retrospection": retrospection(maps[3].float(), taught.float(), labels),
        }

    def _styles(self) -> Styles:
        styles = self.training_only["styles"]
        assert isinstance(styles, Styles)
        return styles

    def _hallucinated(self, x: Tensor) -> Tensor:
        """Return the map (B, C, h, w) with a drawn style for each image."""
        styles = self._styles()
        # in fp32: draws of so small a concentration underflow in 16 bits
        concentration = torch.full((x.shape[1],), self.concentration, device=x.device)
        styles_of = torch.distributions.Dirichlet(concentration)
        weights = even_rows(len(x)).of(lambda images: styles_of.sample((images,)))
        return restyled(x, weights @ styles.means.float(), weights @ styles.deviations.float())


def style(x: Tensor, *, square: bool = False) -> tuple[Tensor, Tensor]:
    """Return mean and deviation (B, C, 1, 1) of the channels of a map (B, C, h, w).

    Args:
        square: keep the deviation from 0 within the root (variance + 1e-7), as for the basis; else behind it, as for an image.
    """
    x = x.float()
    mean = x.mean((2, 3), keepdim=True)
    if square:
        return mean, (x.var((2, 3), keepdim=True) + 1e-7).sqrt()
    return mean, x.std((2, 3), keepdim=True) + 1e-7


def restyled(x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Return a map (B, C, h, w) with other means and deviations (B, C); its own are constants to the gradient."""
    own_mean, own_deviation = (value.detach() for value in style(x))
    out = (x.float() - own_mean) / own_deviation * deviation[:, :, None, None] + mean[:, :, None, None]
    return out.to(x.dtype)


def farthest(points: Tensor, count: int, start: int) -> Tensor:
    """Return the indices (count,) of points (N, D), each the farthest from those before it (squared Euclidean distance)."""
    chosen = torch.empty(count, dtype=torch.long, device=points.device)
    distance = torch.full((len(points),), torch.inf, device=points.device)
    last = torch.tensor(start, device=points.device)
    for i in range(count):
        chosen[i] = last
        distance = torch.minimum(distance, (points - points[last]).square().sum(1))
        last = distance.argmax()
    return chosen


def divergence(logits: Tensor, others: Tensor) -> Tensor:
    """Return the mean Jensen-Shannon divergence of the classes' probabilities, over pixels (B, K, H, W)."""
    p, q = logits.softmax(1), others.softmax(1)
    mixture = ((p + q) / 2).clamp(1e-7, 1).log()
    pixels = p.numel() // p.shape[1]
    return (F.kl_div(mixture, q, reduction="sum") + F.kl_div(mixture, p, reduction="sum")) / (2 * pixels)


def majority(labels: Tensor, ratio: int, classes: int, share: float = 0.75) -> Tensor:
    """Return labels (B, H, W) at 1 / ratio of their size: a cell's most frequent class if it has such a share, else 255."""
    ids = torch.where(labels == IGNORE, classes, labels)
    shares = F.avg_pool2d(F.one_hot(ids, classes + 1).permute(0, 3, 1, 2).float(), ratio)
    most, winner = shares.max(1)
    return torch.where((most < share) | (winner == classes), IGNORE, winner)


def retrospection(features: Tensor, taught: Tensor, labels: Tensor, classes: int = 19) -> Tensor:
    """Return the mean squared distance of features (B, C, h, w) to others, over the cells of things; 0 where there are none.

    Args:
        labels: (B, H, W) train ids.
    """
    small = majority(labels, labels.shape[-1] // features.shape[-1], classes)
    things = torch.isin(small, torch.tensor(THINGS, device=small.device))
    return ((features - taught).square().mean(1) * things).sum() / divisor(things.sum())


MODEL = SHADE
RELEASES = tuple(
    Release(
        {"backbone": name},
        f"shade/{name}-gta",
        (*marks, robustnet.STYLES),
        robustnet.source,
        dead=(r"^module\.SHM\.",),  # the basis, which only training uses
        lacks=robustnet.LACKS[name],
    )
    for name, marks in robustnet.MARKS.items()
)
