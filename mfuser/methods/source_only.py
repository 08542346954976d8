"""The floor: one tower, a linear head, plain fine-tuning on the source. Nothing in it knows of other domains."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.decoder.criterion import pixel_loss
from mfuser.segmentor import Batch, Segmentor
from mfuser.towers.vit import VisionEncoder

TITLE = "Source only"
PAPER = ""
FIDELITY = ""
BACKBONES = (
    {"backbone": "dinov2_s"},
    {"backbone": "dinov2_b"},
    {"backbone": "dinov2_l"},
    {"backbone": "dinov2_l_reg4"},
    {"backbone": "dinov3_s"},
    {"backbone": "dinov3_b"},
    {"backbone": "dinov3_l"},
    {"backbone": "eva02"},
    {"backbone": "clip"},
    {"backbone": "siglip"},
    {"backbone": "siglip2"},
    {"backbone": "small"},
    {"backbone": "mini_vfm"},
    {"backbone": "tiny"},
)
TOWERS = {"backbone": {"trunk": "encoder.trunk"}}


@dataclass(frozen=True)
class Options:
    """What a model is built from."""

    backbone: str = "tiny"  # a tower of `dgbench models`, or `timm:<model>`
    patch: int | None = None  # pixels of a token's side; None: the tower's own
    image_size: tuple[int, int] = (512, 512)  # (H, W) of training crop and test window


class SourceOnly(Segmentor):
    """Tower, final norm, 1x1 convolution on the token grid, bilinear upsampling."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.image_size = options.image_size
        self.encoder = VisionEncoder(options.backbone, options.image_size, patch=options.patch)
        self.head = nn.Conv2d(self.encoder.dim, len(self.classes), 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K, H, W)."""
        return F.interpolate(self._coarse(images), self.image_size, mode="bilinear", align_corners=False)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Cross entropy over labelled pixels.

        Raises: TypeError or ValueError for labels that are no train ids.
        """
        # upsampling inside the loss keeps full-resolution logits of one batch only
        return {"loss_seg": pixel_loss(self(batch.images), batch.labels)}

    def _coarse(self, images: Tensor) -> Tensor:
        self.check_size(images)
        tokens, rope = self.encoder.embed(images), self.encoder.rope()
        for i in range(self.encoder.depth):
            tokens = self.encoder.block(i, tokens, rope)
        logits: Tensor = self.head(self.encoder.as_map(self.encoder.finish(tokens)))
        return logits


MODEL = SourceOnly
