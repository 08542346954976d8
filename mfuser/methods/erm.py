"""ERM, empirical risk minimisation: DeepLabV3+ on a ResNet, trained on the source without any idea for other domains.

The floor of the methods with ResNets, and the network that most of them share: RobustNet's DeepLabV3+ of output stride 16, as
WildNet and SHADE have it. Swin, ConvNeXt, VMamba and Vim serve as trunks, too, from scratch and with output stride 32.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from mfuser.decoder.deeplab import AuxiliaryHead, DeepLabV3Plus, pixel_loss, resized
from mfuser.labels import IGNORE
from mfuser.releases import Release, robustnet
from mfuser.segmentor import Batch, Segmentor
from mfuser.towers.pyramid import TRUNKS, PyramidEncoder
from mfuser.towers.resnet import ResNetEncoder, resnets

TITLE = "ERM (DeepLabV3+)"
PAPER = (
    "RobustNet: Improving Domain Generalization in Urban-Scene Segmentation via Instance Selective Whitening (its baseline), "
    "CVPR 2021, arXiv:2103.15597"
)
FIDELITY = "exact"
BACKBONES = (
    {"backbone": "resnet101"},
    {"backbone": "resnet50"},
    {"backbone": "swin_t"},
    {"backbone": "convnext_t"},
    {"backbone": "vmamba_t"},
    {"backbone": "vim_s"},
    {"backbone": "tiny_swin"},
    {"backbone": "tiny_convnext"},
    {"backbone": "tiny_vmamba"},
    {"backbone": "tiny_vim"},
    {"backbone": "tiny_resnet"},
)
TOWERS = {"backbone": {"trunk": "encoder.trunk"}}

AUX_WEIGHT = 0.4
_OTHERS = tuple(row["backbone"] for row in BACKBONES if "resnet" not in row["backbone"])
# of the state-space trunks and of position tables, as their authors do
_NOT_DECAYED = ("norm", "A_log", ".D", "dt_proj.bias", "pos_embed", "relative_position_bias_table")


@dataclass(frozen=True)
class Options:
    """What a model is built from."""

    backbone: str = "resnet101"  # a ResNet of `dgbench models`, or a trunk of docs/backbones.md
    decoder_dim: int | None = None  # width of the decoder, half that of the auxiliary head; None: 256, with tiny trunks 64
    image_size: tuple[int, int] = (768, 768)  # (H, W) of training crop and test window

    def __post_init__(self) -> None:
        if self.backbone not in (*resnets(), *_OTHERS):
            raise ValueError(f"backbone `{self.backbone}` is no ResNet; choose from {', '.join((*resnets(), *_OTHERS))}")
        if self.decoder_dim is None:
            object.__setattr__(self, "decoder_dim", 64 if self.backbone.startswith("tiny_") else 256)


class ERM(Segmentor):
    """Encoder, of output stride 16 with ResNets; DeepLabV3+ decoder; auxiliary head on the third map."""

    any_size = True
    min_batch = 2  # a batch norm stands behind the global pooling
    no_decay: tuple[str, ...] = ()  # the authors decay all parameters

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.image_size = options.image_size
        self.encoder: ResNetEncoder | PyramidEncoder
        self.cell = 1  # the maps cover images that are padded to multiples of it
        if options.backbone in TRUNKS and options.backbone not in resnets():
            # the second map is not used
            self.encoder = PyramidEncoder(options.backbone, options.image_size, levels=(0, 2, 3))
            self.cell, self.no_decay = self.encoder.cell, _NOT_DECAYED
            self.ops = ("selective_scan",) if "vmamba" in options.backbone or "vim" in options.backbone else ()
        else:
            self.encoder = ResNetEncoder(options.backbone, output_stride=16)
        assert options.decoder_dim is not None
        channels, classes, dim = self.encoder.channels, len(self.classes), options.decoder_dim
        self.decoder = DeepLabV3Plus(channels[0], channels[-1], classes, dim)
        self.aux = AuxiliaryHead(channels[-2], classes, 2 * dim)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K, H, W)."""
        self.check_size(images)
        maps = self.encoder(images)
        return self._whole(self.decoder(maps[0], maps[-1]), images)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Cross entropy at full size, and that of the auxiliary head on labels at its own size.

        Raises: TypeError or ValueError for labels that are no train ids.
        """
        self.check_size(batch.images)
        maps = self.encoder(batch.images)
        logits = self._whole(self.decoder(maps[0], maps[-1]).float(), batch.images)
        missing = [-side % self.cell for side in batch.images.shape[-2:]]
        labels = F.pad(batch.labels, (0, missing[1], 0, missing[0]), value=IGNORE) if any(missing) else batch.labels
        return {
            "loss_seg": pixel_loss(logits, batch.labels),
            "aux.loss_seg": AUX_WEIGHT * pixel_loss(self.aux(maps[-2]), labels),
        }

    def _whole(self, logits: Tensor, images: Tensor) -> Tensor:
        """Return logits of the maps' size at that of the images."""
        height, width = images.shape[-2:]
        covered = [-(-side // self.cell) * self.cell for side in (height, width)]
        return resized(logits, covered)[..., :height, :width]


MODEL = ERM
RELEASES = tuple(
    Release({"backbone": name}, f"erm/{name}-gta", marks, robustnet.source, lacks=(*robustnet.LACKS[name], robustnet.STYLES))
    for name, marks in robustnet.MARKS.items()
)
