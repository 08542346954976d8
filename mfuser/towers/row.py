"""What a row of the table of towers says; importing it needs neither torch nor timm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mfuser.towers.files import HubFile, PackagedFile
from mfuser.towers.key_rules import TIMM_FILE, Rules


@dataclass(frozen=True)
class TextTower:
    """The text encoder of an image tower, and how their outputs are combined."""

    open_clip: str | None  # configuration name; None: the tiny tower
    contexts: int  # context rows that the release learns
    tokenizer: str | HubFile  # open_clip's model whose tokenizer is used, or a vocabulary that open_clip does not bring along
    # a row of mfuser.towers.embedding.EMBEDDINGS; none: the image tower's maps are never brought to the text's space
    embedding: Literal["sum", "projected", "pooled", "none"]
    causal: bool = True
    pad: int = 0  # padding id of a tokenizer from a file
    dim: int | None = None  # width of the embeddings of the tiny tower; None: the model's choice


@dataclass(frozen=True)
class Tower:
    """One row of TOWERS."""

    timm: str | None  # model name; None: built from `options` alone, or a MiT
    patch: int  # pixels of a token's side; of a convolutional tower, the stride of its coarsest map
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    options: Mapping[str, Any] = field(default_factory=dict)  # further arguments of timm's constructor
    width: int = 0
    depth: int = 0  # blocks
    weights: HubFile | PackagedFile | None = None  # None: trained from scratch
    keys: Mapping[str, Rules] = field(default_factory=lambda: TIMM_FILE)  # of that file, by part
    dead: tuple[str, ...] = ()  # patterns of unused tensors of that file
    text: TextTower | None = None
    resample: Literal["bicubic", "bilinear"] = "bicubic"  # how positions and patch kernels are fitted to other sizes
    class_token_twice: bool = False  # the class embedding is also part of the class position, see `VisionEncoder.embed`
    # of the four maps of a convolutional or hierarchical tower, finest first; () of a plain transformer
    channels: tuple[int, ...] = ()
    clip_resnet: bool = False  # CLIP's own ResNet, built by open_clip and not by timm, whose name for it is `timm`
    kind: str = ""  # `--backbone` takes it, too, for the one of its kind that a method is tabulated with
    hierarchical: bool = False  # a hierarchical transformer, see `mfuser.towers.mit`
    size: Literal["full", "small", "tiny"] = "full"  # of the decoder that goes with it, see `mfuser.decoder.sizes`

    @property
    def role(self) -> Literal["vfm", "vlm", "both", "cnn", "mit"]:
        """Its role: foundation or vision-language tower, either if trained from scratch; convolutional network; MiT."""
        if self.channels:
            return "mit" if self.hierarchical else "cnn"
        return "both" if self.scratch else "vlm" if self.text else "vfm"

    @property
    def scratch(self) -> bool:
        """Whether it has no weights of its own and is trained from scratch."""
        return self.timm is None and self.weights is None

    @property
    def described(self) -> str:
        """What it is, for messages."""
        if not self.channels:
            return "a plain transformer"
        return "a hierarchical transformer" if self.hierarchical else "a convolutional network"

    @property
    def files(self) -> list[HubFile]:
        """The files that it is loaded from: weights, and the tokenizer's vocabulary where that is a file of its own."""
        tokenizer = self.text.tokenizer if self.text else None
        return [file for file in (self.weights, tokenizer) if isinstance(file, HubFile)]
