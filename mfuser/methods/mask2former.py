"""Mask2Former on one tower, trained as a whole or frozen: the baselines of Rein's table.

The tower's maps of four depths are brought to four scales bilinearly; learned queries read them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mfuser.decoder.mask2former import Mask2Former
from mfuser.decoder.mask_decoder import Output
from mfuser.decoder.neck import bilinear_scales, four_taps
from mfuser.decoder.sizes import chosen, complete
from mfuser.mask_segmentor import MaskSegmentor
from mfuser.towers.table import tower
from mfuser.towers.vit import VisionEncoder

TITLE = "Mask2Former"
PAPER = "Masked-attention Mask Transformer for Universal Image Segmentation, CVPR 2022"
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

_ADAPTERS = ("full", "none")


@dataclass(frozen=True)
class Options:
    """What a model is built from. Sizes at None are the published ones, or smaller ones with the towers `tiny` and `small`."""

    vfm: str = "dinov2_l"  # a tower of `dgbench models`, or `timm:<model>`
    adapter: str = "full"  # the whole tower is trained; none: it is frozen
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
    backend: str = "auto"  # of the custom operators

    def __post_init__(self) -> None:
        complete(self, self.vfm)
        tower(self.vfm)
        if self.adapter not in _ADAPTERS:
            raise ValueError(f"adapter `{self.adapter}` is unknown; choose from {', '.join(_ADAPTERS)}")


class PlainMask2Former(MaskSegmentor):
    """Tower, bilinear neck, Mask2Former's decoder."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.image_size, self.backend = options.image_size, options.backend
        self.vfm = VisionEncoder(options.vfm, options.image_size, patch=options.patch)
        self.taps = four_taps(self.vfm.depth)
        self.vfm.norm.requires_grad_(False)  # behind the maps: no gradient reaches it
        if options.adapter == "none":
            self.vfm.requires_grad_(False)
            self.eval_parts = ("vfm",)
        self.decoder = Mask2Former(
            self.vfm.dim, queries=options.queries, classes=len(self.classes), backend=options.backend, **chosen(options)
        )

    def decode(self, images: Tensor, *, last: bool = False) -> list[Output]:
        """Return the decoder's outputs."""
        outputs: list[Output] = self.decoder(bilinear_scales(self.vfm.tapped(images, self.taps)), last=last)
        return outputs


MODEL = PlainMask2Former
