"""SET: Rein, with tokens for the phase and tokens for the amplitude of the features' Fourier transform.

("Learning Spectral-Decomposed Tokens for Domain Generalized Semantic Segmentation", ACM MM 2024). The variant `release` is the
authors' code. Its transforms run over the axes batch and channel of every patch, so that an image's scores depend on the others
of its batch: it is scored one window at a time. The variant `sane` transforms every channel over the image plane, as the paper
describes it. `mfuser.adapters.SpectralReins` has the tokens, `mfuser.token_tuned` the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

from mfuser.adapters import SpectralReins
from mfuser.releases.set import RELEASES
from mfuser.token_tuned import TokenTuned, complete_options

__all__ = ["BACKBONES", "FIDELITY", "MODEL", "PAPER", "RELEASES", "TITLE", "TOWERS", "Options", "SpectralTokens"]

TITLE = "SET"
PAPER = "Learning Spectral-Decomposed Tokens for Domain Generalized Semantic Segmentation, ACM MM 2024"
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

_VARIANTS = ("release", "sane")


@dataclass(frozen=True)
class Options:
    """What a model is built from. Sizes at None are the published ones, or smaller ones with the towers `tiny` and `small`."""

    vfm: str = "dinov2_l"  # a tower of `dgbench models`, or `timm:<model>`
    variant: str = "release"  # transforms over batch and channel; sane: over the image plane
    rank: int = 16  # of the factors of the phase's tokens
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
        if self.variant not in _VARIANTS:
            raise ValueError(f"variant `{self.variant}` is unknown; choose from {', '.join(_VARIANTS)}")


class SpectralTokens(TokenTuned):
    """The model; see the module's head."""

    def __init__(self, options: Options) -> None:
        o = options
        width: int = o.decoder_dim  # type: ignore[assignment]
        super().__init__(
            o,
            lambda vfm: SpectralReins(
                vfm.depth,
                vfm.dim,
                grid=vfm.grid,
                spatial=o.variant == "sane",
                tokens=o.tokens,
                rank=o.rank,
                query_dim=width,
                patch=o.patch,
            ),
        )
        self.mixes_batch = o.variant == "release"


MODEL = SpectralTokens
