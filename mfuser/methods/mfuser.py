"""MFuser: a vision foundation tower and a vision-language tower, stepped block by block and fused after each.

    v = vlm.block(v);  d = vfm.block(d);  dd, dv = fuser(d, v);  d += dd;  v += dv
The fused tokens of four depths become feature maps; the last ones, with the class texts refined by them (MTEnhancer), feed
a text-queried mask decoder ("Mamba as a Bridge", CVPR 2025). Everything follows the authors' release; where it departs
from the paper, a comment says so.

The official code has bugs, and its weights rely on them. The variant `sane` has none of these:
- MVFuser adds the bias of its steps twice and passes its gate through SiLU twice (`fusion.MVFuser`);
- MTEnhancer's steps start at 0.69, not in 1e-3..1e-1 (`fusion.MTEnhancer`), and gamma as noise of std 1, not at 1e-4;
- the pixel decoder's feed-forward width is 2048, not the configured 1024;
- CLIP's class embedding is added twice, and its frozen blocks drop paths in training (`vit.VisionEncoder`);
- weight decay on group and batch norms, on layer norms not called "norm", on A_log, D and the level encodings;
- the alignment loss is divided by ignored pixels, too (`criterion.alignment_loss`);
- SigLIP's context comes after the first word piece, and its text is read at a padding token (`text.TextEncoder`).

What each part adds can be measured by leaving it out: `fuser: mvfuser_no_gate` or `none`, `enhancer: single_copy` or `none`, and
`image_tower: vfm` or `vlm`, a model of one image tower. Its class texts still come from the vision-language tower's text encoder,
its fuser is a Mamba adapter of its own tokens, and its maps are half as wide. A foundation tower alone has a trained linear layer
to the texts' space.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.decoder.criterion import MaskCriterion, alignment_loss
from mfuser.decoder.mask_decoder import class_scores
from mfuser.decoder.mtenhancer import MTEnhancer
from mfuser.decoder.neck import four_scales, four_taps, upsampling
from mfuser.decoder.pixel_decoder import PixelDecoder
from mfuser.decoder.points import Draw, uniform
from mfuser.decoder.queries import TextMaskDecoder
from mfuser.decoder.sizes import SIZES
from mfuser.fusion import FUSERS, JointFuser, Site
from mfuser.ops import dispatch
from mfuser.releases.mfuser import RELEASES
from mfuser.segmentor import Batch, Segmentor
from mfuser.towers.embedding import EMBEDDINGS, VisionEmbedding
from mfuser.towers.table import TIMM, tower, with_text
from mfuser.towers.table import TOWERS as TABLE
from mfuser.towers.text import TextEncoder, listed_ids
from mfuser.towers.vit import VisionEncoder

__all__ = ["ABSENT", "BACKBONES", "FIDELITY", "LATER", "MODEL", "PAPER", "RELEASES", "TITLE", "TOWERS", "MFuser", "Options"]

TITLE = "MFuser"
PAPER = "Mamba as a Bridge: Where Vision Foundation Models Meet Vision Language Models, CVPR 2025"

FIDELITY = "exact"
# what it is tabulated with: the options of each
BACKBONES = (
    {"vfm": "dinov2_l", "vlm": "eva02"},
    {"vfm": "dinov2_l", "vlm": "clip"},
    {"vfm": "dinov2_l", "vlm": "siglip"},
    {"vfm": "dinov2_l", "vlm": "siglip2"},
    {"vfm": "dinov2_b", "vlm": "eva02_b"},
    {"vfm": "dinov2_b", "vlm": "clip_b"},
    {"vfm": "dinov2_b", "vlm": "siglip_b"},
    {"vfm": "small", "vlm": "small"},
    {"vfm": "mini_vfm", "vlm": "mini_vlm"},
    {"vfm": "tiny", "vlm": "tiny"},
)
TOWERS = {
    "vfm": {"trunk": "vfm.trunk"},
    "vlm": {"trunk": "vlm.trunk", "head": "embedding", "text": "text.tower"},
}
# no published head fits a foundation tower alone
ABSENT = {"image_tower": {"vfm": ("vlm.trunk", "embedding"), "vlm": ("vfm.trunk",)}}
LATER = ("enhancer", "image_tower")
_NONE = "none"
_ENHANCERS = ("mtenhancer", "single_copy", _NONE)
_IMAGE_TOWERS = ("both", "vfm", "vlm")

# sizes by that of the vision-language tower: the decoder's, and MFuser's own; an option left at None takes them from here
_SIZES: dict[str, dict[str, int | float]] = {
    "full": {**SIZES["full"], "state": 16, "mte_dim": 256, "mte_heads": 4, "dropout": 0.1},
    "small": {**SIZES["small"], "state": 8, "mte_dim": 128, "mte_heads": 4, "dropout": 0.1},
    "tiny": {**SIZES["tiny"], "state": 4, "mte_dim": 64, "mte_heads": 2, "dropout": 0.0},
}


@dataclass(frozen=True)
class Bugs:
    """Known bugs of the official code, one by one; see the module's head."""

    double_bias: bool
    double_gate: bool
    large_steps: bool  # MTEnhancer's, at first
    noisy_gamma: bool
    wide_pixel_ffn: bool
    class_token_twice: bool
    drop_path: bool
    decay_norms: bool
    count_ignored: bool
    context_behind_word: bool
    read_padding: bool


_BUGS = {variant: Bugs(**{field.name: variant == "release" for field in fields(Bugs)}) for variant in ("release", "sane")}


@dataclass(frozen=True)
class Options:
    """What a model is built from. Sizes at None are the release's, or smaller ones with the towers `tiny` and `small`."""

    vfm: str = "dinov2_l"  # vision foundation tower, one of `dgbench models` or `timm:<model>`
    vlm: str = "eva02"  # vision-language tower: a row of the table that has a text tower
    fuser: str = "mvfuser"  # one of the fusers of docs/mfuser.md; none: nothing is added to the towers' tokens
    enhancer: str = "mtenhancer"  # single_copy: without the copy of the texts before the image; none: texts do not see the image
    image_tower: str = "both"  # vfm or vlm: that one alone, with the texts of the vision-language tower
    variant: str = "release"  # or "sane", without the known bugs of the official code; see the module's head
    image_size: tuple[int, int] = (512, 512)  # (H, W) of training crop and test window
    patch: int | None = None  # pixels of a token's side; None: the vision-language tower's own
    decoder_dim: int | None = None  # width of pixel and mask decoder
    heads: int | None = None  # attention heads of both
    pixel_layers: int | None = None
    mask_layers: int | None = None
    ffn_dim: int | None = None
    points: int | None = None  # of deformable attention, per head and scale
    groups: int | None = None  # of the decoder's group norms
    state: int | None = None  # N, state size of the scans
    mte_dim: int | None = None  # width of MTEnhancer
    mte_heads: int | None = None
    mask_points: int | None = None  # sampled per mask by the criterion
    dropout: float | None = None  # of fusers and MTEnhancer
    freeze_towers: bool | None = None  # image and text towers keep their weights; None: towers that have any do
    backend: str = "auto"  # of the custom operators
    # (K, 5), a NumPy array or a tensor of integers, too; None: by the tower's tokenizer
    token_ids: list[list[int]] | None = None

    def __post_init__(self) -> None:
        row = TABLE.get(self.vlm)
        for name, value in (_SIZES[row.size if row else "full"] | {"freeze_towers": not (row and row.scratch)}).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for kind in ("vfm", "vlm"):
            name = getattr(self, kind)
            if name not in TABLE and not name.startswith(TIMM):
                raise ValueError(f"{kind} `{name}` is unknown; choose from {', '.join(sorted(TABLE))}, or {TIMM}<model> for vfm")
        if self.vlm not in with_text():
            raise ValueError(
                f"vlm `{self.vlm}` has no text tower; choose from {', '.join(sorted(with_text()))}; other towers are for vfm"
            )
        tower(self.vfm)  # timm knows the model
        if self.fuser not in (*FUSERS, _NONE):
            raise ValueError(f"fuser `{self.fuser}` is unknown; choose from {', '.join(sorted(FUSERS))}, {_NONE}")
        for option, known in (("enhancer", _ENHANCERS), ("image_tower", _IMAGE_TOWERS)):
            if (value := getattr(self, option)) not in known:
                raise ValueError(f"{option} `{value}` is unknown; choose from {', '.join(known)}")
        if self.variant not in _BUGS:
            raise ValueError(f"variant `{self.variant}` is unknown; choose from {', '.join(_BUGS)}")
        if self.token_ids is not None:
            object.__setattr__(self, "token_ids", listed_ids(self.token_ids, len(Segmentor.classes)))


def _towers(options: Options) -> tuple[VisionEncoder | None, VisionEncoder | None]:
    """Foundation and vision-language tower; None for one that `image_tower` leaves out.

    Raises: ValueError for two that cannot be fused block by block.
    """
    # one grid for both towers: the vision-language tower's patch size decides
    patch = options.patch or TABLE[options.vlm].patch
    vfm = None if options.image_tower == "vlm" else VisionEncoder(options.vfm, options.image_size, patch=patch)
    if options.image_tower == "vfm":
        return vfm, None
    does = _BUGS[options.variant]
    vlm = VisionEncoder(
        options.vlm, options.image_size, patch=patch, class_token_twice=does.class_token_twice, drop_path=does.drop_path
    )
    if vfm is None:
        return None, vlm
    if vfm.depth != vlm.depth:
        raise ValueError(f"`{options.vfm}` has {vfm.depth} blocks and `{options.vlm}` {vlm.depth}; they must be equal")
    if vfm.dim != vlm.dim:
        raise ValueError(f"`{options.vfm}` is {vfm.dim} wide and `{options.vlm}` {vlm.dim}; they must be equal")
    return vfm, vlm


class MFuser(Segmentor):
    """The model; see the module's head for the idea and `Options` for the sizes."""

    ops = tuple(dispatch.TABLE)  # all there are

    def __init__(self, options: Options) -> None:
        super().__init__()
        o: Any = options
        self.image_size = o.image_size
        does = _BUGS[o.variant]
        self.count_ignored = does.count_ignored
        kind = tower(o.vlm).text.embedding  # type: ignore[union-attr]
        self.no_decay = ("norm",) if kind == "projected" else ("norm", "level_embed", "query_embed")
        if not does.decay_norms:
            self.no_decay = ("norm", "level_embed", "level_encoding", "query_embed", "A_log", ".D")
            self.no_decay_types = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
        self.vfm, self.vlm = _towers(options)
        towers = [each for each in (self.vfm, self.vlm) if each is not None]
        dim, depth, self.grid = towers[0].dim, towers[0].depth, towers[-1].grid
        self.taps = four_taps(depth)
        scan = {
            "state": o.state,
            "dropout": o.dropout,
            "backend": o.backend,
            "double_bias": does.double_bias,
            "double_gate": does.double_gate,
        }
        site = Site(dim, self.grid, (towers[0].prefix, towers[-1].prefix), **scan)
        self.adapters = nn.ModuleList(FUSERS[o.fuser](site) for _ in range(0 if o.fuser == _NONE else depth))
        if len(towers) == 1 and not all(isinstance(fuser, JointFuser) for fuser in self.adapters):
            raise ValueError(f"fuser `{o.fuser}` needs two image towers; choose mvfuser or {_NONE}, or image_tower both")
        # the release wraps CLIP's fusion alone in linear layers
        wrapped = len(self.adapters) if kind == "projected" and len(towers) == 2 else 0
        self.adapter_proj1 = nn.ModuleList(nn.Linear(dim, dim) for _ in range(wrapped))
        self.adapter_proj2 = nn.ModuleList(nn.Linear(dim, dim) for _ in range(wrapped))

        self.text = TextEncoder(
            o.vlm,
            torch.tensor(o.token_ids),
            dim=o.decoder_dim,
            context_first=not does.context_behind_word,
            skip_padding=not does.read_padding,
        )
        width = self.text.dim
        self.contexts = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, self.text.contexts, self.text.width)))
        # the release means 1e-4 and then overwrites it with a truncated normal of std 1
        gamma = nn.init.trunc_normal_(torch.empty(width)) if does.noisy_gamma else torch.full((width,), 1e-4)
        self.gamma: nn.Parameter | None = nn.Parameter(gamma)
        self.embedding: nn.Module = EMBEDDINGS[kind](self.vfm, self.vlm, width) if self.vlm else VisionEmbedding(towers[0], width)
        copied = o.enhancer != "single_copy"
        self.context_decoder: MTEnhancer | None = MTEnhancer(
            width, dim=o.mte_dim, heads=o.mte_heads, mamba_steps=not does.large_steps, copied=copied, **scan
        )
        if o.enhancer == _NONE:
            self.gamma = self.context_decoder = None

        channels = len(towers) * dim
        self.fpn1, self.fpn2 = upsampling(channels)
        self.pixel_decoder = PixelDecoder(
            channels,
            width,
            dim=o.decoder_dim,
            layers=o.pixel_layers,
            heads=o.heads,
            points=o.points,
            # the release configures 1024 and overrides it with the mask decoder's width
            ffn_dim=o.ffn_dim if does.wide_pixel_ffn else min(o.ffn_dim, 1024),
            groups=o.groups,
            backend=o.backend,
        )
        self.mask_decoder = TextMaskDecoder(width, dim=o.decoder_dim, layers=o.mask_layers, heads=o.heads, ffn_dim=o.ffn_dim)
        self.criterion = MaskCriterion(len(self.classes), points=o.mask_points)
        # scale of the score map in its loss: 1 / 0.07, or SigLIP's own
        self.register_buffer("logit_scale", torch.tensor(1 / 0.07))
        self.register_buffer("logit_bias", torch.tensor(0.0))
        self.backend = o.backend
        if o.freeze_towers:
            frozen: list[nn.Module] = [*towers, self.text]
            for part in frozen:
                part.requires_grad_(False)
            for name, parameter in self.embedding.named_parameters():
                parameter.requires_grad_("adapter" in name or self.vlm is None)
        else:
            # words without a class would only drift by weight decay
            self.text.tower.token_embedding.requires_grad_(False)

    logit_scale: Tensor
    logit_bias: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """Class scores (B, K, H, W): at most the number of queries, not probabilities."""
        return self.scored(*self.masks(images))

    def scored(self, class_logits: Tensor, mask_logits: Tensor) -> Tensor:
        """Return class scores (B, K, H, W) of what `masks` returns."""
        scores = class_scores(class_logits, mask_logits)
        return F.interpolate(scores, self.image_size, mode="bilinear", align_corners=False)

    def masks(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Class and mask logits of the last decoder layer, one query a class."""
        features, *tokens = self.step(images)
        # texts that do not see the image need no embedding of it
        text = self.plain_texts(len(images)) if self.context_decoder is None else self.described(*tokens)
        mask_features, maps = self.pixel_decoder(features, text)
        return self.mask_decoder(maps, mask_features, text, last=True)[-1]

    def loss(self, batch: Batch, *, draw: Draw = uniform) -> dict[str, Tensor]:
        """Class, mask and dice terms of every decoder output, and the alignment of image and text."""
        outputs, score_map = self.training_outputs(batch.images)
        terms = self.criterion(outputs, batch.labels, draw=draw, present=batch.present)
        logits = score_map * self.logit_scale + self.logit_bias
        return terms | {"scr_map.loss_seg": alignment_loss(logits, batch.labels, count_ignored=self.count_ignored)}

    def training_outputs(self, images: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Return decoder outputs, and the score map (B, K, g, g) of cosine similarities."""
        features, global_, visual = self.encode(images)
        text = self.texts(global_, visual)
        score_map = torch.einsum("bld,bkd->bkl", F.normalize(visual, dim=-1), F.normalize(text, dim=-1))
        mask_features, maps = self.pixel_decoder(features, text)
        return self.mask_decoder(maps, mask_features, text), score_map.unflatten(2, self.grid)

    def encode(self, images: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Return four maps as `step`, and the embeddings, global (B, 1, D) and visual (B, g*g, D)."""
        features, *tokens = self.step(images)
        return features, *self.embed(*tokens)

    def step(self, images: Tensor) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        """Step both towers and fuse them after every block.

        Returns: four maps (B, 2C, H, W) of 4, 2, 1 and 1/2 times the grid, and the last tokens of both towers; of one tower
        alone maps of C channels, and None for the other's tokens.
        """
        self.check_size(images)
        if self.vfm is None or self.vlm is None:
            return self._step_alone(images)
        d, v = self.vfm.embed(images), self.vlm.embed(images)
        rope_d, rope_v = self.vfm.rope(), self.vlm.rope()
        tapped = []
        for i in range(self.vfm.depth):
            d, v = self.pair(i, d, v, rope_d, rope_v)
            if i in self.taps:
                tapped += [self.tap(d, v)] * self.taps.count(i)
        return self.scales(tapped), d, v

    def pair(self, i: int, d: Tensor, v: Tensor, rope_d: Tensor | None, rope_v: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the tokens of both towers behind their i-th blocks and the fuser between them."""
        assert self.vfm is not None
        assert self.vlm is not None
        v, d = self.vlm.block(i, v, rope_v), self.vfm.block(i, d, rope_d)
        if self.adapters:
            dd, dv = self._fused(i, d, v)
            d, v = d + dd, v + dv
        return d, v

    def tap(self, d: Tensor, v: Tensor) -> Tensor:
        """Return a map (B, 2C, rows, columns) of the tokens of both towers."""
        assert self.vfm is not None
        assert self.vlm is not None
        return torch.cat([self.vfm.as_map(d), self.vlm.as_map(v)], 1)

    def scales(self, maps: list[Tensor]) -> list[Tensor]:
        """Return four maps (B, 2C, H, W) of 4, 2, 1 and 1/2 times the grid, of those of four depths."""
        return four_scales(maps, self.fpn1, self.fpn2)

    def _fused(self, i: int, d: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is added to the tokens of both towers behind a block."""
        if not self.adapter_proj1:
            dd, dv = self.adapters[i](d, v)
            return dd, dv
        dd, dv = self.adapters[i](self.adapter_proj1[i](d), v)
        return self.adapter_proj2[i](dd), dv

    def _step_alone(self, images: Tensor) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        """Do as `step` with the one tower that there is."""
        tower = self.vfm or self.vlm
        assert tower is not None
        tokens, rope, tapped = tower.embed(images), tower.rope(), []
        for i in range(tower.depth):
            tokens = tower.block(i, tokens, rope)
            if self.adapters:
                adapter = self.adapters[i]
                assert isinstance(adapter, JointFuser)
                tokens = tokens + adapter.mix(tokens)
            tapped += [tower.as_map(tokens)] * self.taps.count(i)
        features = self.scales(tapped)
        return (features, tokens, None) if self.vlm is None else (features, None, tokens)

    def embed(self, d: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the embeddings of the last tokens in the texts' space, global (B, 1, D) and visual (B, g*g, D)."""
        global_, visual = self.embedding(self.vfm, d) if self.vlm is None else self.embedding(self.vfm, self.vlm, d, v)
        return global_, visual

    def take_scalars(self, option: str, scalars: dict[str, Tensor]) -> None:
        """Take SigLIP's own scale and bias of the score map; the others' maps use 1 / 0.07."""
        if option == "vlm" and "logit_bias" in scalars:
            self.logit_scale.copy_(scalars["logit_scale"].exp().reshape(()))
            self.logit_bias.copy_(scalars["logit_bias"].reshape(()))

    def texts(self, global_: Tensor, visual: Tensor) -> Tensor:
        """Class embeddings (B, K, D), refined by the image."""
        text = self.plain_texts(len(visual))
        if self.context_decoder is None or self.gamma is None:
            return text
        refined: Tensor = text + self.gamma * self.context_decoder(text, torch.cat([global_, visual], 1))
        return refined

    def described(self, d: Tensor | None, v: Tensor | None) -> Tensor:
        """Return class embeddings (B, K, D), refined by the last tokens of the towers."""
        return self.texts(*self.embed(d, v))

    def plain_texts(self, batch: int) -> Tensor:
        """Return class embeddings (B, K, D), the same for all images."""
        text: Tensor = self.text(self.contexts).expand(batch, -1, -1)
        return text


MODEL = MFuser
