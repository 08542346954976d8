"""SHADE: each image a second time with a hallucinated style, and the two held consistent.

The style of a map is the mean and deviation of its channels behind the stem. From time to time the most different styles of the
source are chosen as a basis; a new style is a random convex combination of it. On a ResNet the network is RobustNet's DeepLabV3+.
On MiT, the form of the journal's paper, it is DAFormer's, and the stem is the first stage with its norm.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.decoder.daformer import DAFormerHead, enlarged, enlarged_loss
from mfuser.decoder.deeplab import AuxiliaryHead, DeepLabV3Plus, pixel_loss, resized
from mfuser.labels import IGNORE, train_ids
from mfuser.processes import divisor, even_rows, number_of_processes
from mfuser.releases import Release, daformer, robustnet
from mfuser.segmentor import Batch, Segmentor, TrainingData
from mfuser.towers.mit import MiTEncoder
from mfuser.towers.resnet import ResNetEncoder, resnets
from mfuser.towers.table import mits

TITLE = "SHADE"
PAPER = "Style-Hallucinated Dual Consistency Learning for Domain Generalized Semantic Segmentation, ECCV 2022, arXiv:2204.02548"
FIDELITY = "exact"
BACKBONES = (
    {"backbone": "resnet101"},
    {"backbone": "resnet50"},
    {"backbone": "mit_b5"},
    {"backbone": "tiny_mit"},
    {"backbone": "tiny_resnet"},
)
TOWERS = {"backbone": {"trunk": "encoder.trunk"}}
LATER = ("retrospection", "style_steps")

AUX_WEIGHT, STYLE_WEIGHT = 0.4, 10.0
# classes of things, whose features on ImageNet are worth keeping
THINGS = (6, 7, 11, 12, 13, 14, 15, 16, 17, 18)
_STRIDE = 16  # of the coarsest map of a ResNet
_MIT_STRIDE = 32
_MIT_RETROSPECTION = 0.005
_TINY = ("tiny_resnet", "tiny_mit")


@dataclass(frozen=True)
class Options:
    """What a model is built from."""

    backbone: str = "resnet101"  # a ResNet or a MiT of `dgbench models`
    decoder_dim: int | None = None  # width of the decoder, half that of a ResNet's auxiliary head; None: 256, of tiny ones 64
    concentration: float = 0.0156  # of the Dirichlet distribution that weighs the basis styles
    style_epochs: int = 3  # the basis is chosen anew after so many epochs
    style_steps: int | None = None  # or after so many steps; None: with ResNets by epochs, with MiT 4000
    retrospection: bool = True  # hold the last map near that of the trunk as it began, which means little of a random trunk
    image_size: tuple[int, int] = (768, 768)  # (H, W) of training crop and test window

    def __post_init__(self) -> None:
        if self.backbone not in (*resnets(), *mits()):
            there = ", ".join((*resnets(), *mits()))
            raise ValueError(f"backbone `{self.backbone}` is no ResNet and no MiT; choose from {there}")
        stride = _MIT_STRIDE if self.backbone in mits() else _STRIDE
        if any(side % stride or not side for side in self.image_size):
            raise ValueError(f"image size {tuple(self.image_size)} must be multiples of {stride}, the stride of the features")
        if self.concentration <= 0 or self.style_epochs < 1:
            raise ValueError(f"concentration {self.concentration} must be above 0, style_epochs {self.style_epochs} at least 1")
        if self.style_steps is None and self.backbone in mits():
            object.__setattr__(self, "style_steps", 4000)
        if self.style_steps is not None and self.style_steps < 1:
            raise ValueError(f"style_steps is {self.style_steps}, expected at least 1, or none to count by epochs")
        if self.decoder_dim is None:
            object.__setattr__(self, "decoder_dim", 64 if self.backbone in _TINY else 256)


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


class Base(Segmentor):
    """What SHADE is on any network: an encoder whose stem gives the map that styles are of, and a decoder of its four maps."""

    any_size = True
    encoder: ResNetEncoder | MiTEncoder

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.image_size, self.concentration = options.image_size, options.concentration
        self.style_epochs, self.style_steps = options.style_epochs, options.style_steps
        self.retrospection = options.retrospection
        self.eval_parts = ("training_only.teacher",) if self.retrospection else ()

    def enter_training(self) -> None:
        """Make an empty basis, and a frozen copy of the trunk with its published weights."""
        self.training_only = nn.ModuleDict({"styles": Styles(self.encoder.stem_channels)})
        if self.retrospection:
            self.training_only["teacher"] = copy.deepcopy(self.encoder).requires_grad_(False)

    @torch.no_grad()
    def before_step(self, step: int, steps: int, data: TrainingData) -> None:
        """Choose the basis: before the first step, and then every `style_steps` steps or `style_epochs` epochs.

        By epochs, it is not chosen in the last 5 % of the steps.
        """
        styles = self._styles()
        if int(styles.epoch) and not self._due(step, steps, int(styles.epoch)):
            return
        mode, found, by = self.training, [], 1
        self.eval()
        for batch in data.batches(step, augmented=True):
            mean, deviation = self._style(self.encoder.stem(self.encoder.normalised(batch.images)))
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

    def _due(self, step: int, steps: int, epoch: int) -> bool:
        """Return whether the basis is to be chosen anew before this step."""
        if self.style_steps is not None:
            return step % self.style_steps == 0
        return step % (self.style_epochs * epoch) == 0 and step < 0.95 * steps

    def _style(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the style (B, C, 1, 1) of each image, as the basis has it."""
        return style(x, square=True)

    def _styles(self) -> Styles:
        styles = self.training_only["styles"]
        assert isinstance(styles, Styles)
        return styles

    def _views(self, images: Tensor) -> list[Tensor]:
        """Return the four maps (2B, C, h, w) of the images as they are, and behind them with a drawn style each."""
        x = self.encoder.stem(self.encoder.normalised(images))
        return self.encoder.maps(torch.cat([x, self._hallucinated(x)]))

    @torch.no_grad()
    def _taught(self, images: Tensor) -> Tensor:
        """Return the last map of the trunk as it began, (2B, C, h, w): both views are held near that of the image as it is."""
        return self.training_only["teacher"](images)[3].float().repeat(2, 1, 1, 1)

    def _hallucinated(self, x: Tensor) -> Tensor:
        """Return the map (B, C, h, w) with a drawn style for each image."""
        styles = self._styles()
        # in fp32: draws of so small a concentration underflow in 16 bits
        concentration = torch.full((x.shape[1],), self.concentration, device=x.device)
        styles_of = torch.distributions.Dirichlet(concentration)
        weights = even_rows(len(x)).of(lambda images: styles_of.sample((images,)))
        return restyled(x, weights @ styles.means.float(), weights @ styles.deviations.float())


class SHADE(Base):
    """Encoder of output stride 16, DeepLabV3+ decoder, auxiliary head; in training styles, and the trunk as it began."""

    no_decay = ()  # the authors decay all parameters

    def __init__(self, options: Options) -> None:
        super().__init__(options)
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

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Cross entropy of both views, that of the auxiliary head, consistency of the styles, and with the trunk's features.

        Raises: TypeError or ValueError for labels that are no train ids.
        """
        self.check_size(batch.images)
        labels = train_ids(batch.labels, len(self.classes)).repeat(2, 1, 1)
        maps = self._views(batch.images)
        logits = resized(self.decoder(maps[0], maps[3]).float(), batch.images.shape[-2:])
        terms = {
            "loss_seg": pixel_loss(logits, labels),
            "aux.loss_seg": AUX_WEIGHT * pixel_loss(self.aux(maps[2]), labels),
            "loss_style": STYLE_WEIGHT * divergence(*logits.float().chunk(2)),
        }
        if self.retrospection:
            terms["loss_retrospection"] = retrospection(maps[3].float(), self._taught(batch.images), labels)
        return terms


class SHADEonMiT(Base):
    """MiT and DAFormer's head; in training styles of the first stage's map, and the trunk as it began."""

    no_decay = ("norm",)

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.encoder = MiTEncoder(options.backbone)
        assert options.decoder_dim is not None
        self.decoder = DAFormerHead(self.encoder.channels, len(self.classes), options.decoder_dim)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K, H, W)."""
        self.check_size(images)
        return enlarged(self.decoder(self.encoder(images)), images.shape[-2:])

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Cross entropy of both views, consistency of the styles at the size of the logits, and with the trunk's features.

        Raises: TypeError or ValueError for labels that are no train ids.
        """
        self.check_size(batch.images)
        labels = train_ids(batch.labels, len(self.classes)).repeat(2, 1, 1)
        maps = self._views(batch.images)
        logits = self.decoder(maps).float()
        terms = {
            "loss_seg": enlarged_loss(logits, labels),
            "loss_style": STYLE_WEIGHT * divergence(*logits.chunk(2)),
        }
        if self.retrospection:
            apart = root_distance(maps[3].float(), self._taught(batch.images), labels)
            terms["loss_retrospection"] = _MIT_RETROSPECTION * apart
        return terms

    def _style(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.float()
        return x.mean((2, 3), keepdim=True), x.std((2, 3), keepdim=True)


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
    return _over_things((features - taught).square().mean(1), labels, classes)


def root_distance(features: Tensor, taught: Tensor, labels: Tensor, classes: int = 19) -> Tensor:
    """Return the mean Euclidean distance of features (B, C, h, w) to others, as `retrospection`."""
    return _over_things(torch.linalg.vector_norm(features - taught, dim=1), labels, classes)


def _over_things(distance: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the mean of a map (B, h, w) over the cells of things; 0 where there are none."""
    small = majority(labels, labels.shape[-1] // distance.shape[-1], classes)
    things = torch.isin(small, torch.tensor(THINGS, device=small.device))
    return (distance * things).sum() / divisor(things.sum())


def MODEL(options: Options) -> Segmentor:  # noqa: N802 - the name by which a method's file gives its model
    """Build SHADE on the network of its backbone."""
    return SHADEonMiT(options) if options.backbone in mits() else SHADE(options)


_ON_RESNETS = tuple(
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
_ON_MIT = Release(
    {"backbone": "mit_b5"},
    "shade/mit_b5-gta",
    daformer.MARKS,
    daformer.source,
    # the basis, which only training uses; the teacher
    dead=(r"^model\.backbone\.shm\.", r"^imnet_model\."),
)
RELEASES = (*_ON_RESNETS, _ON_MIT)
