"""SoMA: a frozen foundation tower that learns along the smallest singular directions of its weights, and Mask2Former.

    y = x (W + B A)' + b,   B A = U_r S_r V_r' at first, the part of a matrix with its r smallest singular values
("Singular Value Decomposed Minor Components Adaptation", CVPR 2025). All linear layers of the later two thirds of the blocks have
such a term for each weight (queries, keys and values apart) and learn their biases, too; all else in the tower is frozen.

`variant: release` starts as the authors' code does, and their weights are made for: it decomposes the random weights that PyTorch
draws before the published ones are loaded, and adds their part to the published ones, which moves the features by a tenth or so.
`variant: sane` starts as the paper says: B A is a part of the published weight and is subtracted from it, so that training starts
from the published tower.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mfuser.decoder.mask2former import Mask2Former
from mfuser.decoder.mask_decoder import Output
from mfuser.decoder.neck import bilinear_scales, four_taps
from mfuser.decoder.sizes import chosen, complete
from mfuser.lowrank import add_low_rank, merge
from mfuser.mask_segmentor import MaskSegmentor
from mfuser.releases.soma import RELEASES
from mfuser.segmentor import TrainingData
from mfuser.towers.table import tower
from mfuser.towers.vit import VisionEncoder

__all__ = ["BACKBONES", "FIDELITY", "MODEL", "PAPER", "RELEASES", "TITLE", "TOWERS", "Options", "SoMA"]

TITLE = "SoMA"
PAPER = "SoMA: Singular Value Decomposed Minor Components Adaptation for Domain Generalizable Representation Learning, CVPR 2025"
FIDELITY = "exact"
BACKBONES = (
    {"vfm": "dinov2_l"},
    {"vfm": "dinov2_b"},
    {"vfm": "dinov2_s"},
    {"vfm": "eva02_l_mim"},
    {"vfm": "dinov3_l"},
    {"vfm": "small"},
    {"vfm": "mini_vfm"},
    {"vfm": "tiny"},
)
TOWERS = {"vfm": {"trunk": "vfm.trunk"}}

_VARIANTS = ("release", "sane")


@dataclass(frozen=True)
class Options:
    """What a model is built from. Sizes at None are the published ones, or smaller ones with the towers `tiny` and `small`."""

    vfm: str = "dinov2_l"  # a tower of `dgbench models`, or `timm:<model>`
    variant: str = "release"  # the terms are parts of random weights; sane: of the published ones, and subtracted from them
    rank: int = 16  # of every term
    alpha: float = 16.0  # the terms are scaled by alpha / rank
    first_block: int | None = None  # those before it are frozen as a whole; None: 8 of 24, the same share of other depths
    ema_start: int | None = None  # step from which on the weights that are scored are a moving average; None: never
    ema_momentum: float = 2.0e-4  # share of a step's weights in the average
    patch: int = 16  # pixels of a token's side; the tower's patch kernel is resampled to it
    image_size: tuple[int, int] = (512, 512)  # (H, W) of training crop and test window
    queries: int = 100  # learned, of any class
    decoder_dim: int | None = None  # width of pixel and mask decoder
    heads: int | None = None  # attention heads of both
    pixel_layers: int | None = None
    mask_layers: int | None = None
    ffn_dim: int | None = None  # of the mask decoder; the pixel decoder's is at most 1024
    points: int | None = None  # of deformable attention, per head and scale
    groups: int | None = None  # of the decoder's group norms
    mask_points: int | None = None  # sampled per mask by matching and losses
    freeze_towers: bool | None = None  # None: a tower with published weights is frozen, one from scratch is trained
    backend: str = "auto"  # of the custom operators

    def __post_init__(self) -> None:
        complete(self, self.vfm)
        if self.variant not in _VARIANTS:
            raise ValueError(f"variant `{self.variant}` is unknown; choose from {', '.join(_VARIANTS)}")
        if self.freeze_towers is None:
            object.__setattr__(self, "freeze_towers", not tower(self.vfm).scratch)
        if not 0 < self.ema_momentum <= 1:
            raise ValueError(f"ema_momentum {self.ema_momentum:g} is not in 0..1; the published one is 2e-4")


class SoMA(MaskSegmentor):
    """The model; see the module's head."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        o = options
        self.image_size, self.backend, self.variant = o.image_size, o.backend, o.variant
        self.average = None if o.ema_start is None else (o.ema_start, o.ema_momentum)
        self.step: int | None = None  # the current one of a training
        self.is_merged = False
        self.vfm = VisionEncoder(o.vfm, o.image_size, patch=o.patch)
        self.taps = four_taps(self.vfm.depth)
        first = self.taps[0] + 1 if o.first_block is None else o.first_block
        if first >= self.vfm.depth:
            raise ValueError(f"first_block {first} leaves none of the {self.vfm.depth} blocks of `{o.vfm}` to adapt")
        if o.freeze_towers:
            self.vfm.requires_grad_(False)
            self.eval_parts = ("vfm",)
        self.vfm.norm.requires_grad_(False)  # behind the maps: no gradient reaches it
        self.layers = tuple(add_low_rank(self.vfm.trunk.blocks[first:], o.rank, o.alpha))  # no modules of its own: the tower's
        for layer in self.layers:
            if layer.bias is not None:
                layer.bias.requires_grad_(True)
        self.decoder = Mask2Former(self.vfm.dim, queries=o.queries, classes=len(self.classes), backend=o.backend, **chosen(o))

    def decode(self, images: Tensor, *, last: bool = False) -> list[Output]:
        """Return the outputs of the decoder."""
        outputs: list[Output] = self.decoder(bilinear_scales(self.features(images)), last=last)
        return outputs

    def features(self, images: Tensor) -> list[Tensor]:
        """Return four maps (B, C, rows, columns) of the adapted tower."""
        return self.vfm.tapped(images, self.taps)

    @torch.no_grad()
    def weights_loaded(self) -> None:
        """Set the low-rank terms to parts of the tower's weights (`sane`), or of random ones as PyTorch draws them."""
        for layer in self.layers:
            weights = layer.weights()
            if self.variant == "sane":
                layer.take_components(weights)
                layer.weight -= layer.term()
            else:
                drawn = [torch.empty_like(weight) for weight in weights]
                for weight in drawn:
                    nn.init.kaiming_uniform_(weight, a=5**0.5)
                layer.take_components(drawn)

    def merge(self) -> bool:
        """Add the low-rank terms to the tower's weights; a forward pass then costs as much as the tower's own."""
        self.is_merged, self.layers = True, ()
        return merge(self.vfm)

    # ---- the moving average, which the model file has in place of the weights

    def enter_training(self) -> None:
        """Make the average."""
        if self.average is not None:
            self.keep_average(*self.average)

    def before_step(self, step: int, steps: int, data: TrainingData) -> None:
        """Update the average by the weights after the previous step."""
        self.step = step
        self.update_average(step)

    def model_state(self) -> dict[str, Tensor]:
        """Return the tensors that evaluation needs, averages in place of the trained weights.

        Raises: ValueError for a merged model, which could not be loaded again.
        """
        if self.is_merged:
            raise ValueError("its low-rank terms are in the tower's weights; save the model before merge()")
        self._follow()
        return super().model_state()

    def training_state(self) -> dict[str, Tensor]:
        """Return the tensors of `training_only`, the trained weights in place of their averages."""
        self._follow()
        return super().training_state()

    def _follow(self) -> None:
        if self.step is not None:
            self.update_average(self.step + 1)


MODEL = SoMA
