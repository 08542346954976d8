"""Rein: a frozen foundation tower, refined behind every block by learned tokens that are also the decoder's queries.

    d_i = mlp(softmax(f T_i') V(T_i) + f);  f_(i+1) = block(f + scale d_i)
("Stronger, Fewer, & Superior", CVPR 2024). The tokens T_i are products of low-rank factors (`adapter: lora`) or whole (`full`);
all layers behind them are shared by the blocks. `mfuser.adapters.Reins` has the tokens, `mfuser.token_tuned` the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

from mfuser.adapters import Reins
from mfuser.releases.rein import RELEASES
from mfuser.token_tuned import TokenTuned, complete_options

__all__ = ["BACKBONES", "FIDELITY", "MODEL", "PAPER", "RELEASES", "TITLE", "TOWERS", "Options", "Rein"]

TITLE = "Rein"
PAPER = "Stronger, Fewer, & Superior: Harnessing Vision Foundation Models for Domain Generalized Semantic Segmentation, CVPR 2024"
FIDELITY = "exact"
BACKBONES = (
    {"vfm": "dinov2_l"},
    {"vfm": "eva02_l_mim"},
    {"vfm": "dinov2_b"},
    {"vfm": "dinov2_s"},
    {"vfm": "dinov3_l"},
    {"vfm": "small"},
    {"vfm": "mini_vfm"},
    {"vfm": "tiny"},
)
TOWERS = {"vfm": {"trunk": "vfm.trunk"}}

_ADAPTERS = ("lora", "full")


@dataclass(frozen=True)
class Options:
    """What a model is built from. Sizes at None are the published ones, or smaller ones with the towers `tiny` and `small`."""

    vfm: str = "dinov2_l"  # a tower of `dgbench models`, or `timm:<model>`
    adapter: str = "lora"  # the tokens are products of low-rank factors; full: they are whole
    rank: int = 16  # of the factors
    tokens: int = 100  # of every block; as many object queries
    patch: int = 16  # pixels of a token's side; the tower's patch kernel is resampled to it
    image_size: tuple[int, int] = (512, 512)  # (H, W) of training crop and test window
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
        complete_options(self)
        if self.adapter not in _ADAPTERS:
            raise ValueError(f"adapter `{self.adapter}` is unknown; choose from {', '.join(_ADAPTERS)}")


class Rein(TokenTuned):
    """The model; see the module's head."""

    def __init__(self, options: Options) -> None:
        o = options
        rank = o.rank if o.adapter == "lora" else None
        width: int = o.decoder_dim  # type: ignore[assignment]
        super().__init__(o, lambda vfm: Reins(vfm.depth, vfm.dim, tokens=o.tokens, rank=rank, query_dim=width, patch=o.patch))


MODEL = Rein
