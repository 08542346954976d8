"""tqdm: a mask transformer whose queries are the class texts ("Textual Query-Driven Mask Transformer", Pak et al., ECCV 2024).

    t = text(class names, learned context);  t' = t + gamma * context_decoder(t, image tokens)
    score map = cos(image tokens, t');  query k = MLP(t'_k), which answers for class k
The image tower of a vision-language model is trained at a low rate, its text tower is frozen. Three regularisers keep both in
line: t' near the texts of "a clean origami of a {class}", the image's global embedding near that of the tower at its start, and
the score map on the labels. MFuser's release took the decode head from here. Everything follows the authors' release; the
variant `sane` has none of its known bugs:
- gamma starts as noise of std 1, not at 1e-4;
- the pixel decoder's feed-forward width is 2048, not the configured 1024;
- CLIP's class embedding is added twice (`vit.VisionEncoder`);
- the copy of the tower at its start is in training mode, so that with CLIP its blocks drop paths;
- weight decay on group and batch norms and on layer norms not called "norm";
- the score map's loss is divided by ignored pixels, too (`criterion.alignment_loss`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.decoder.context_decoder import ContextDecoder
from mfuser.decoder.criterion import MaskCriterion, alignment_loss
from mfuser.decoder.mask_decoder import Output, class_scores
from mfuser.decoder.neck import four_scales, upsampling
from mfuser.decoder.pixel_decoder import PixelDecoder
from mfuser.decoder.points import Draw, uniform
from mfuser.decoder.queries import TextMaskDecoder
from mfuser.decoder.sizes import SIZES
from mfuser.releases.tqdm import RELEASES
from mfuser.segmentor import Batch, Segmentor
from mfuser.towers.embedding import LinearEmbedding
from mfuser.towers.table import TOWERS as TABLE
from mfuser.towers.table import with_text
from mfuser.towers.text import TextEncoder, listed_ids, tokenize
from mfuser.towers.vit import VisionEncoder

__all__ = ["BACKBONES", "FIDELITY", "MODEL", "PAPER", "RELEASES", "TITLE", "TOWERS", "Options", "Tqdm"]

TITLE = "tqdm"
PAPER = "Textual Query-Driven Mask Transformer for Domain Generalized Segmentation, ECCV 2024"
FIDELITY = "exact"
BACKBONES = (
    {"vlm": "eva02"},
    {"vlm": "clip_b"},
    {"vlm": "eva02_b"},
    {"vlm": "clip"},
    {"vlm": "small"},
    {"vlm": "mini_vlm"},
    {"vlm": "tiny"},
)
TOWERS = {"vlm": {"trunk": "vlm.trunk", "head": "embedding", "text": "text.tower"}}

PROMPT = "a clean origami of a {}"  # the sentence whose text each class stays near to
TEMPERATURE = 0.07  # of the score map in its loss

# sizes by that of the tower: the decoder's, and the context decoder's; an option left at None takes them from here
_SIZES: dict[str, dict[str, int | float]] = {
    "full": {
        **SIZES["full"],
        "context_dim": 256,
        "context_heads": 4,
        "context_layers": 3,
        "dropout": 0.1,
    },
    "small": {
        **SIZES["small"],
        "context_dim": 128,
        "context_heads": 4,
        "context_layers": 2,
        "dropout": 0.1,
    },
    "tiny": {
        **SIZES["tiny"],
        "context_dim": 64,
        "context_heads": 2,
        "context_layers": 1,
        "dropout": 0.0,
    },
}
_VARIANTS = ("release", "sane")


def _clips() -> list[str]:
    """Return the towers whose image embedding is a linear layer's: those of CLIP's kind."""
    return [name for name in with_text() if TABLE[name].text.embedding != "pooled"]  # type: ignore[union-attr]


@dataclass(frozen=True)
class Options:
    """What a model is built from. Sizes at None are the release's, or smaller ones with the towers `tiny` and `small`."""

    vlm: str = "eva02"  # vision-language tower of CLIP's kind, one of `dgbench models`
    variant: str = "release"  # or "sane", without the known bugs of the release; see the module's head
    image_size: tuple[int, int] = (512, 512)  # (H, W) of training crop and test window
    patch: int | None = None  # pixels of a token's side; None: the tower's own
    decoder_dim: int | None = None  # width of pixel and mask decoder
    heads: int | None = None  # attention heads of both
    pixel_layers: int | None = None
    mask_layers: int | None = None
    ffn_dim: int | None = None
    points: int | None = None  # of deformable attention, per head and scale
    groups: int | None = None  # of the decoder's group norms
    context_dim: int | None = None  # width of the context decoder
    context_heads: int | None = None
    context_layers: int | None = None
    mask_points: int | None = None  # sampled per mask by the criterion
    dropout: float | None = None  # of the context decoder
    freeze_text: bool | None = None  # the text tower keeps its weights; None: one that has any does
    backend: str = "auto"  # of deformable attention
    # (K, 5), a NumPy array or a tensor of integers, too; None: by the tower's tokenizer
    token_ids: list[list[int]] | None = None

    def __post_init__(self) -> None:
        row = TABLE.get(self.vlm)
        for name, value in (_SIZES[row.size if row else "full"] | {"freeze_text": not (row and row.scratch)}).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.vlm not in _clips():
            raise ValueError(f"vlm `{self.vlm}` is no tower of CLIP's kind with a text tower; choose from {', '.join(_clips())}")
        if self.variant not in _VARIANTS:
            raise ValueError(f"variant `{self.variant}` is unknown; choose from {', '.join(_VARIANTS)}")
        if self.token_ids is not None:
            object.__setattr__(self, "token_ids", listed_ids(self.token_ids, len(Segmentor.classes)))


class Tqdm(Segmentor):
    """The model; see the module's head for the idea and `Options` for the sizes."""

    ops = ("ms_deform_attn",)

    def __init__(self, options: Options) -> None:
        super().__init__()
        o: Any = options
        self.image_size, self.backend = o.image_size, o.backend
        self.released = o.variant == "release"
        if not self.released:
            self.no_decay = ("norm", "level_embed", "level_encoding", "query_embed")
            self.no_decay_types = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
        self.vlm = VisionEncoder(o.vlm, o.image_size, patch=o.patch, class_token_twice=self.released)
        dim, depth = self.vlm.dim, self.vlm.depth
        # blocks 7, 11, 15 and 23 of 24
        self.taps = tuple(math.ceil(depth * share) - 1 for share in (1 / 3, 1 / 2, 2 / 3, 1))
        self.text = TextEncoder(o.vlm, torch.tensor(o.token_ids), dim=o.decoder_dim)
        width = self.text.dim
        row: Any = TABLE[o.vlm].text
        self.embedding = LinearEmbedding(self.vlm, width, bias=row.embedding == "sum")
        self.contexts = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, self.text.contexts, self.text.width)))
        # the release means 1e-4 and then overwrites it with a truncated normal of std 1
        self.gamma = nn.Parameter(nn.init.trunc_normal_(torch.empty(width)) if self.released else torch.full((width,), 1e-4))
        self.context_decoder = ContextDecoder(
            width, dim=o.context_dim, heads=o.context_heads, layers=o.context_layers, dropout=o.dropout
        )
        self.fpn1, self.fpn2 = upsampling(dim)
        self.pixel_decoder = PixelDecoder(
            dim,
            width,
            dim=o.decoder_dim,
            layers=o.pixel_layers,
            heads=o.heads,
            points=o.points,
            # the release configures 1024 and overrides it with the mask decoder's width
            ffn_dim=o.ffn_dim if self.released else min(o.ffn_dim, 1024),
            groups=o.groups,
            backend=o.backend,
        )
        self.mask_decoder = TextMaskDecoder(width, dim=o.decoder_dim, layers=o.mask_layers, heads=o.heads, ffn_dim=o.ffn_dim)
        self.criterion = MaskCriterion(len(self.classes), points=o.mask_points)
        if o.freeze_text:
            self.text.requires_grad_(False)
            self.eval_parts = ("text",)
        else:
            # words without a class would only drift by weight decay
            self.text.tower.token_embedding.requires_grad_(False)
        if not self.released:
            self.eval_parts = (*self.eval_parts, "training_only.start")

    def forward(self, images: Tensor) -> Tensor:
        """Class scores (B, K, H, W): at most the number of queries, not probabilities."""
        return self.scored(*self.masks(images))

    def scored(self, class_logits: Tensor, mask_logits: Tensor) -> Tensor:
        """Return class scores (B, K, H, W) of what `masks` returns."""
        scores = class_scores(class_logits, mask_logits)
        return F.interpolate(scores, self.image_size, mode="bilinear", align_corners=False)

    def masks(self, images: Tensor) -> Output:
        """Class and mask logits of the last decoder layer, one query a class."""
        features, global_, visual = self.encode(images)
        text = self.texts(global_, visual)
        mask_features, maps = self.pixel_decoder(features, text)
        return self.mask_decoder(maps, mask_features, text, last=True)[-1]

    def encode(self, images: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Step the image tower.

        Returns: four maps (B, C, H, W) of 4, 2, 1 and 1/2 times the grid, and the embeddings, global (B, 1, D) and
        visual (B, g*g, D).
        """
        self.check_size(images)
        tapped = []
        for i, tokens in enumerate(_steps(self.vlm, images)):
            tapped += [self.vlm.as_map(tokens)] * self.taps.count(i)
        global_, visual = self.embedding(self.vlm, tokens)
        return four_scales(tapped, self.fpn1, self.fpn2), global_, visual

    def texts(self, global_: Tensor, visual: Tensor) -> Tensor:
        """Class embeddings (B, K, D), refined by the image."""
        text = self.text(self.contexts).expand(len(visual), -1, -1)
        refined: Tensor = text + self.gamma * self.context_decoder(text, torch.cat([global_, visual], 1))
        return refined

    def enter_training(self) -> None:
        """Keep the image tower as it is at the start, and the texts of the classes as sentences."""
        start = nn.ModuleDict({"vlm": self.vlm, "embedding": self.embedding})
        texts = nn.Module()
        texts.register_buffer("embeddings", self.clean_texts())
        self.training_only = nn.ModuleDict({"start": copy.deepcopy(start).requires_grad_(False), "texts": texts})

    @torch.no_grad()
    def clean_texts(self) -> Tensor:
        """Embeddings (K, D) of "a clean origami of a {class}", normalised."""
        length = len(self.text.tower.positional_embedding)
        ids = tokenize(self.text.name, [PROMPT.format(name) for name in self.classes], length)
        return F.normalize(self.text.sentences(torch.tensor(ids, device=self.gamma.device)), dim=-1)

    @torch.no_grad()
    def _global_at_start(self, images: Tensor) -> Tensor:
        """Return the global embedding (B, 1, D) by the tower as it was before the training."""
        vlm, embedding = self.training_only["start"]["vlm"], self.training_only["start"]["embedding"]  # type: ignore[index]
        for tokens in _steps(vlm, images):
            last = tokens
        found: Tensor = embedding(vlm, last)[0]
        return found

    def loss(self, batch: Batch, *, draw: Draw = uniform) -> dict[str, Tensor]:
        """Class, mask and dice terms of every decoder output, and the three regularisers."""
        features, global_, visual = self.encode(batch.images)
        text = self.texts(global_, visual)
        mask_features, maps = self.pixel_decoder(features, text)
        outputs = self.mask_decoder(maps, mask_features, text)
        terms = self.criterion(outputs, batch.labels, draw=draw, present=batch.present)
        clean: Any = self.training_only["texts"].embeddings
        logits = score_map(visual, text).unflatten(2, self.vlm.grid) / TEMPERATURE
        return terms | {
            "reg.textual.loss": textual_loss(text, clean),
            "reg.visual.loss": F.mse_loss(global_.float(), self._global_at_start(batch.images).float()),
            "scr_map.loss_seg": alignment_loss(logits, batch.labels, count_ignored=self.released),
        }


def _steps(tower: VisionEncoder, images: Tensor) -> Iterator[Tensor]:
    """Yield the tokens (B, L, C) after each block."""
    tokens, rope = tower.embed(images), tower.rope()
    for i in range(tower.depth):
        tokens = tower.block(i, tokens, rope)
        yield tokens


def score_map(visual: Tensor, text: Tensor) -> Tensor:
    """Cosine similarities (B, K, L) of image tokens (B, L, D) and texts (B, K, D)."""
    return torch.einsum("bld,bkd->bkl", F.normalize(visual, dim=-1), F.normalize(text, dim=-1))


def textual_loss(text: Tensor, clean: Tensor) -> Tensor:
    """Cross entropy, in fp32, of which of `clean` (K, D), normalised, each of `text` (B, K, D) is nearest to by cosine."""
    with torch.autocast(text.device.type, enabled=False):
        near = F.normalize(text.float(), dim=-1) @ clean.float().T  # (B, K, K)
    target = torch.arange(len(clean), device=text.device).expand(len(text), -1)
    return F.cross_entropy(near.flatten(0, 1), target.flatten())


MODEL = Tqdm
