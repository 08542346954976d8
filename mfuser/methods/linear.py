"""A frozen tower with a linear head on its last tokens: the baseline that shows what an adapter adds.

The head is that of DINOv2's linear evaluation: the tower's final norm, BatchNorm, a 1x1 convolution, bilinear upsampling.
A tower from scratch (`tiny`, `small`) is frozen as it is drawn: a random one.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.decoder.criterion import pixel_loss
from mfuser.segmentor import Batch, Segmentor
from mfuser.towers.table import tower
from mfuser.towers.vit import VisionEncoder

TITLE = "Linear head"
PAPER = ""
FIDELITY = ""
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


@dataclass(frozen=True)
class Options:
    """What a model is built from."""

    vfm: str = "dinov2_l"  # a tower of `dgbench models`, or `timm:<model>`
    patch: int | None = None  # pixels of a token's side; None: the tower's own
    image_size: tuple[int, int] = (512, 512)  # (H, W) of training crop and test window

    def __post_init__(self) -> None:
        tower(self.vfm)


class Linear(Segmentor):
    """Tower, final norm, BatchNorm, 1x1 convolution, bilinear upsampling."""

    no_decay_types = (nn.BatchNorm2d,)
    eval_parts = ("vfm",)

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.image_size = options.image_size
        self.vfm = VisionEncoder(options.vfm, options.image_size, patch=options.patch).requires_grad_(False)
        self.norm = nn.BatchNorm2d(self.vfm.dim)
        self.head = nn.Conv2d(self.vfm.dim, len(self.classes), 1)
        nn.init.normal_(self.head.weight, std=0.01)
        assert self.head.bias is not None
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, K, H, W)."""
        self.check_size(images)
        tokens, rope = self.vfm.embed(images), self.vfm.rope()
        for i in range(self.vfm.depth):
            tokens = self.vfm.block(i, tokens, rope)
        logits = self.head(self.norm(self.vfm.as_map(self.vfm.finish(tokens))))
        return F.interpolate(logits, self.image_size, mode="bilinear", align_corners=False)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return cross entropy over labelled pixels.

        Raises: TypeError or ValueError for labels that are no train ids.
        """
        return {"loss_seg": pixel_loss(self(batch.images), batch.labels)}


MODEL = Linear
