"""VLTSeg: the image tower of a vision-language model, trained as a whole, under a plain Mask2Former (Hümmer et al., ACCV 2024).

The tower's maps of four depths go through transposed convolutions to four scales; 100 learned queries read them. There is no
text tower, no frozen part and no further loss.

The authors published no code. What is followed is a re-implementation of EVA02-CLIP-L by others (github.com/VLTSeg/VLTSeg),
whose numbers are close to the paper's. Its loader takes only tensors of equal name and shape, and its tower is that of EVA-02
without CLIP; the weights that it published rely on both. The variant `sane` has neither:
- the position embedding of EVA02-CLIP is drawn anew, because the published one is of another grid; `sane` resamples it;
- the norm before the projection of the attention (`attn.norm`), which EVA02-CLIP was trained with, is left out.
CLIP ViT-B is a reconstruction: of its row in the paper there is neither code nor configuration. Both variants are the same
with it: positions are resampled, and the class embedding is added once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, nn

from mfuser.decoder.mask2former import NO_DECAY, Mask2Former
from mfuser.decoder.mask_decoder import Output
from mfuser.decoder.neck import four_scales, four_taps, upsampling
from mfuser.decoder.sizes import chosen, complete
from mfuser.mask_segmentor import MaskSegmentor
from mfuser.releases.vltseg import RELEASES
from mfuser.towers.table import tower
from mfuser.towers.vit import VisionEncoder

__all__ = ["BACKBONES", "FIDELITY", "MODEL", "PAPER", "RELEASES", "TITLE", "TOWERS", "Options", "VLTSeg"]

TITLE = "VLTSeg"
PAPER = "Strong but Simple: A Baseline for Domain Generalized Dense Perception by CLIP-based Transfer Learning, ACCV 2024"
FIDELITY = "reconstructed"  # by others with EVA02-CLIP-L, whose code is followed to the letter; here with the other towers
BACKBONES = (
    {"vfm": "eva02_l_224"},
    {"vfm": "clip_b"},
    {"vfm": "clip"},
    {"vfm": "dinov2_b"},
    {"vfm": "dinov2_s"},
    {"vfm": "small"},
    {"vfm": "mini_vlm"},
    {"vfm": "tiny"},
)
TOWERS = {"vfm": {"trunk": "vfm.trunk"}}

_VARIANTS = ("release", "sane")


@dataclass(frozen=True)
class Options:
    """What a model is built from. Sizes at None are the published ones, or smaller ones with the towers `tiny` and `small`."""

    vfm: str = "eva02_l_224"  # image tower, one of `dgbench models` or `timm:<model>`
    variant: str = "release"  # as re-implemented; or "sane", without its known bugs; see the module's head
    image_size: tuple[int, int] = (512, 512)  # (H, W) of training crop and test window
    patch: int | None = None  # pixels of a token's side; None: the tower's own
    drop_path: float | None = None  # chance of the last block to be left out in training; None: 0.2, of small towers 0
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
        scratch = tower(self.vfm).scratch
        if self.drop_path is None:
            object.__setattr__(self, "drop_path", 0.0 if scratch else 0.2)
        elif not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path {self.drop_path:g} is no chance; choose one from 0 to below 1")
        if self.variant not in _VARIANTS:
            raise ValueError(f"variant `{self.variant}` is unknown; choose from {', '.join(_VARIANTS)}")


class VLTSeg(MaskSegmentor):
    """Tower, neck of transposed convolutions, Mask2Former's decoder."""

    # as the re-implementation has it: its neck's batch norm and the norms within the tower's MLPs have weight decay
    no_decay = ("vfm.trunk.pos_embed", ".norm1.", ".norm2.", ".norm3.", ".gn.", "post_norm", *NO_DECAY)
    no_decay_types = ()

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.image_size, self.backend = options.image_size, options.backend
        rebuilt = re.search(r"eva02_.*_clip_", tower(options.vfm).timm or "") is not None
        released = rebuilt and options.variant == "release"
        self.vfm = VisionEncoder(
            options.vfm,
            options.image_size,
            patch=options.patch,
            class_token_twice=False,
            drop_path_rate=options.drop_path,
            **({"scale_attn_inner": not released} if rebuilt else {}),
        )
        if released:
            self.drawn = ("vfm.trunk.pos_embed",)
        self.vfm.trunk.norm = nn.Identity()  # the maps are taken before it
        self.taps = (9, 14, 19, 23) if self.vfm.depth == 24 else four_taps(self.vfm.depth)
        self.fpn1, self.fpn2 = upsampling(self.vfm.dim)
        self.decoder = Mask2Former(
            self.vfm.dim, queries=options.queries, classes=len(self.classes), backend=options.backend, **chosen(options)
        )

    def decode(self, images: Tensor, *, last: bool = False) -> list[Output]:
        """Return the decoder's outputs."""
        maps = four_scales(self.vfm.tapped(images, self.taps), self.fpn1, self.fpn2)
        outputs: list[Output] = self.decoder(maps, last=last)
        return outputs


MODEL = VLTSeg
