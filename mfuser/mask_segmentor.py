"""Base of methods whose decoder is Mask2Former's: scores, losses, weight decay."""

from __future__ import annotations

from torch import Tensor

from mfuser.decoder.mask2former import NO_DECAY, NORMS, Mask2Former, window_scores
from mfuser.decoder.mask_decoder import Output
from mfuser.segmentor import Batch, Segmentor


class MaskSegmentor(Segmentor):
    """A segmentor with a `decoder`; a subclass makes its queries and masks in `decode`."""

    ops = ("ms_deform_attn",)
    no_decay: tuple[str, ...] = ("norm", *NO_DECAY)
    no_decay_types = NORMS
    decoder: Mask2Former

    def decode(self, images: Tensor, *, last: bool = False) -> list[Output]:
        """Return class logits (B, Q, K + 1) and mask logits (B, Q, h, w) of every decoder output, or of the last."""
        raise NotImplementedError(f"{type(self).__name__}.decode")

    def forward(self, images: Tensor) -> Tensor:
        """Return class scores (B, K, H, W): at most the number of queries, not probabilities."""
        return self.scored(*self.masks(images))

    def scored(self, class_logits: Tensor, mask_logits: Tensor) -> Tensor:
        """Return class scores (B, K, H, W) of what `masks` returns."""
        return window_scores(class_logits, mask_logits, self.image_size)

    def masks(self, images: Tensor) -> Output:
        """Return class and mask logits of the last decoder layer."""
        self.check_size(images)
        return self.decode(images, last=True)[-1]

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return class, mask and dice terms of every decoder output."""
        self.check_size(batch.images)
        return self.decoder.loss(self.training_outputs(batch.images), batch.labels, present=batch.present)

    def training_outputs(self, images: Tensor) -> list[Output]:
        """Return what `decode` does, of every decoder output."""
        return self.decode(images)
