"""Base of Rein and SET: learned tokens adapt a frozen tower block by block, and are the queries of Mask2Former."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mfuser.adapters import Reins
from mfuser.decoder.mask2former import Mask2Former
from mfuser.decoder.mask_decoder import Output
from mfuser.decoder.neck import bilinear_scales, four_taps
from mfuser.decoder.sizes import chosen, complete
from mfuser.mask_segmentor import MaskSegmentor
from mfuser.towers.table import tower
from mfuser.towers.vit import VisionEncoder


class TokenTuned(MaskSegmentor):
    """Tower, tokens, bilinear neck, Mask2Former.

    Args:
        options: a method's, see `complete_options`.    tokens: makes the adapter of the tower.
    """

    no_decay = ("norm", "query_embed", "level_embed", "learnable_tokens", "reins.scale")

    def __init__(self, options: Any, tokens: Callable[[VisionEncoder], Reins]) -> None:
        super().__init__()
        self.image_size, self.backend = options.image_size, options.backend
        self.vfm = VisionEncoder(options.vfm, options.image_size, patch=options.patch)
        self.taps = four_taps(self.vfm.depth)
        if options.freeze_towers:
            self.vfm.requires_grad_(False)
            self.eval_parts = ("vfm",)
        else:
            self.vfm.norm.requires_grad_(False)  # behind the maps: no gradient reaches it
        self.reins = tokens(self.vfm)
        self.querys2feat = nn.Linear(options.decoder_dim, options.decoder_dim)
        self.decoder = Mask2Former(
            self.vfm.dim, queries=None, classes=len(self.classes), backend=options.backend, **chosen(options)
        )

    def decode(self, images: Tensor, *, last: bool = False) -> list[Output]:
        """Return the decoder's outputs; its queries are the same for all images."""
        features = bilinear_scales(self.features(images))
        positions = self.reins.queries()
        queries = self.querys2feat(positions).expand(len(images), -1, -1)
        outputs: list[Output] = self.decoder(features, queries, positions, last=last)
        return outputs

    def features(self, images: Tensor) -> list[Tensor]:
        """Return four adapted maps (B, C, rows, columns)."""
        return self.vfm.tapped(images, self.taps, self.reins)


def complete_options(options: Any) -> None:
    """Set what a method's frozen Options leave at None: sizes by the tower, and freezing of towers that have weights.

    Raises: ValueError for an unknown tower.
    """
    complete(options, options.vfm)
    trained_before = not tower(options.vfm).scratch
    if options.freeze_towers is None:
        object.__setattr__(options, "freeze_towers", trained_before)
