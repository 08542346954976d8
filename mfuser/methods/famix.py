"""FAMix: CLIP's ResNet, nearly frozen, and feature patches with styles that were mined by text.

Before the first step, styles (means and deviations of channels) are sought with which patches of the finest map look to CLIP like
prompts such as "Urban Grit style road" ("A Simple Recipe for Language-guided Domain Generalized Segmentation", CVPR 2024). In
every step each of nine patches gets a style between its own and one that was mined for its class. Only the last block and the
decoder are trained.

The authors' mining needs embeddings of 1024 numbers, as ResNet-50 has them; ResNet-101's have 512, for which it fails as
released. Here styles are mined with the same tower that is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.decoder.project_deeplab import ProjectDeepLabV3Plus
from mfuser.decoder.separable_deeplab import enlarged
from mfuser.labels import IGNORE, train_ids
from mfuser.patch_styles import StyleBank, dominant, mixed
from mfuser.releases.famix import RELEASES as RELEASES
from mfuser.segmentor import Batch, ExtraFile, Segmentor, TrainingData
from mfuser.style_mining import STYLES, Miner, mine
from mfuser.towers.clip_resnet import CLIPResNetEncoder, clip_resnets

TITLE = "FAMix"
PAPER = "A Simple Recipe for Language-guided Domain Generalized Segmentation, CVPR 2024, arXiv:2311.17922"
FIDELITY = "exact"
BACKBONES = (
    {"backbone": "clip_rn101"},
    {"backbone": "clip_rn50"},
    {"backbone": "tiny_clip_rn"},
)
TOWERS = {"backbone": {"trunk": "encoder.trunk"}}

TINY, NOTHING = "tiny_clip_rn", "none"
SMOOTHING = 0.1  # of the labels
SHARE = 0.1  # both parameters of the Beta distribution that mixes styles


@dataclass(frozen=True)
class Options:
    """What a model is built from."""

    backbone: str = "clip_rn101"  # one of CLIP's ResNets of `dgbench models`
    trained_from: str | None = None  # stage or block from which on the trunk is trained, or none; None: layer4.2, tiny: layer2
    mining_steps: int | None = None  # of SGD for each batch of styles; None: 100, with tiny_clip_rn 10
    templates: int | None = None  # of the prompts, the first of CLIP's 80; None: all, with tiny_clip_rn 1
    decoder_dim: int | None = None  # width of the decoder; None: 256, with tiny_clip_rn 64
    image_size: tuple[int, int] = (768, 768)  # (H, W) of training crop and test window

    def __post_init__(self) -> None:
        if self.backbone not in clip_resnets():
            raise ValueError(f"backbone `{self.backbone}` is no ResNet of CLIP's; choose from {', '.join(clip_resnets())}")
        tiny = self.backbone == TINY
        usual = {"trained_from": "layer2" if tiny else "layer4.2", "mining_steps": 10 if tiny else 100}
        usual |= {"templates": 1 if tiny else 80, "decoder_dim": 64 if tiny else 256}
        for name, value in usual.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        assert self.mining_steps is not None
        assert self.templates is not None
        if self.mining_steps < 1 or not 1 <= self.templates <= 80:
            raise ValueError(f"mining_steps {self.mining_steps} must be at least 1, templates {self.templates} 1 to 80")


class FAMix(Segmentor):
    """CLIP's ResNet of output stride 16 and a DeepLabV3+ decoder; in training, a bank of mined styles."""

    any_size = True
    min_batch = 2  # a batch norm stands behind the global pooling
    no_decay = ()  # the authors decay all parameters
    files = (ExtraFile("prompts", "a text file with one style of the prompts a line", optional=True),)

    def __init__(self, options: Options) -> None:
        super().__init__()
        assert options.trained_from is not None
        assert options.mining_steps is not None
        assert options.templates is not None
        assert options.decoder_dim is not None
        self.image_size, self.mining_steps, self.templates = options.image_size, options.mining_steps, options.templates
        self.styles: tuple[str, ...] = STYLES
        self.encoder = CLIPResNetEncoder(options.backbone, output_stride=16)
        channels = self.encoder.channels
        self.decoder = ProjectDeepLabV3Plus(channels[0], channels[3], len(self.classes), options.decoder_dim)
        self._freeze(options.trained_from)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K, H, W)."""
        self.check_size(images)
        low = self.encoder.low(images)
        return enlarged(self.decoder(low, self.encoder.high(low)[-1]), images.shape[-2:])

    def enter_training(self) -> None:
        """Make an empty bank of styles."""
        self.training_only = nn.ModuleDict({"bank": StyleBank(self.encoder.channels[0])})

    def take_file(self, name: str, path: Path) -> None:
        """Read the styles of the prompts, in place of the authors' twenty."""
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except UnicodeDecodeError:
            raise ValueError(f"{path} is no text in UTF-8") from None
        self.styles = tuple(line for line in lines if line)
        if not self.styles:
            raise ValueError(f"{path} holds no line; write one style a line, such as `{STYLES[0]}`")

    @torch.no_grad()
    def before_step(self, step: int, steps: int, data: TrainingData) -> None:
        """Mine the styles before the first step, with one pass over the training images.

        Raises: WeightsNotFound for the text tower's weights.
        """
        bank = self._bank()
        if len(bank):
            return
        from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

        templates = [template("{}") for template in OPENAI_IMAGENET_TEMPLATES[: self.templates]]
        like = next(self.encoder.trunk.parameters())
        miner = Miner(self.encoder.name, self.encoder.trunk, published=not self.random_towers).to(like.device, like.dtype)
        mine(miner, data.batches(step), bank, self.classes, steps=self.mining_steps, styles=self.styles, templates=templates)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Cross entropy with smoothed labels, of patches with mixed styles; 0 where no pixel is labelled.

        Before `before_step` has mined styles, patches keep their own.

        Raises: TypeError or ValueError for labels that are no train ids.
        """
        self.check_size(batch.images)
        labels = train_ids(batch.labels, len(self.classes))
        low = self._mixed(self.encoder.low(batch.images), labels)
        logits = enlarged(self.decoder(low, self.encoder.high(low)[-1]).float(), batch.images.shape[-2:])
        total = F.cross_entropy(logits, labels, ignore_index=IGNORE, label_smoothing=SMOOTHING, reduction="sum")
        return {"loss_seg": total / (labels != IGNORE).sum().clamp(min=1)}

    def _mixed(self, low: Tensor, labels: Tensor) -> Tensor:
        """Return a finest map (B, C, h, w) whose patches have styles between their own and drawn ones."""
        none = len(self.classes)
        means, deviations, there = self._bank().drawn(dominant(labels, none), none)
        # in fp32: draws of so small parameters underflow in 16 bits
        amount = torch.full(low.shape[:2], SHARE, device=low.device)
        share = torch.distributions.Beta(amount, amount).sample()
        return mixed(low, means.float(), deviations.float(), share, there)

    def _bank(self) -> StyleBank:
        bank = self.training_only["bank"]
        assert isinstance(bank, StyleBank)
        return bank

    def _freeze(self, first: str) -> None:
        """Freeze the blocks of the trunk before `first`, in evaluation mode."""
        trunk = self.encoder.trunk
        blocks = [f"layer{stage}.{i}" for stage in (1, 2, 3, 4) for i in range(len(trunk.get_submodule(f"layer{stage}")))]
        known = [block for block in blocks if f"{block}.".startswith(f"{first}.")]
        start = len(blocks) if first == NOTHING else blocks.index(known[0]) if known else 0
        if start < len(trunk.layer1):
            choice = f"{NOTHING}, layer2, layer3, layer4, or one of {', '.join(blocks[len(trunk.layer1) :])}"
            raise ValueError(f"trained_from is `{first}`; choose from {choice}: styles are those of layer1, which is frozen")
        self.encoder.requires_grad_(False)
        for block in blocks[start:]:
            trunk.get_submodule(block).requires_grad_(True)
        stem = [f"bn{i}" for i in (1, 2, 3)]
        self.eval_parts = tuple(f"encoder.trunk.{name}" for name in (*stem, *blocks[:start]))


MODEL = FAMix
