"""What the decoder is trained with: a matcher, losses on sampled points, and text-image alignment.

A query that no target is matched to is "no object". Mask losses are computed on points, three quarters of them where the
mask is least certain (PointRend, Kirillov et al., CVPR 2020).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.decoder.matching import Matcher, Targets, fixed
from mfuser.decoder.points import Draw, sample, uniform
from mfuser.labels import IGNORE, train_ids
from mfuser.processes import divisor, even_rows, rows


class MaskCriterion(nn.Module):
    """Class, mask and dice losses of every decoder output (Mask2Former's, Cheng et al., CVPR 2022).

    Args:
        classes: K.    matcher: `fixed`, with K queries, or `Hungarian()`, with any number of at least those present.
        points: sampled per mask.    oversample: candidates per point.    importance: share of uncertain points.
        no_object_weight: class weight of "no object".    weights: of the (class, mask, dice) terms.
    """

    class_weight: Tensor

    def __init__(
        self,
        classes: int = 19,
        *,
        matcher: Matcher = fixed,
        points: int = 12544,
        oversample: float = 3.0,
        importance: float = 0.75,
        no_object_weight: float = 0.1,
        weights: tuple[float, float, float] = (2.0, 5.0, 5.0),
    ) -> None:
        super().__init__()
        self.classes, self.matcher, self.points, self.weights = classes, matcher, points, weights
        self.candidates, self.uncertain = int(points * oversample), int(importance * points)
        class_weight = torch.ones(classes + 1)
        class_weight[-1] = no_object_weight
        self.register_buffer("class_weight", class_weight, persistent=False)

    def forward(self, outputs: Sequence[tuple[Tensor, Tensor]], labels: Tensor, *, draw: Draw = uniform) -> dict[str, Tensor]:
        """Loss terms, already weighted.

        Args:
            outputs: per decoder output, class logits (B, Q, K + 1) and mask logits (B, Q, h, w).
            labels: (B, H, W) train ids of any integer type, 255 = ignore.
        Returns: `decode.d<i>.loss_{cls,mask,dice}` for all outputs but the last, `decode.loss_*` for the last.
        Raises: TypeError or ValueError for other labels, as `train_ids` does; ValueError as the matcher does.
        """
        targets = Targets.of(train_ids(labels, self.classes), self.classes)
        count = divisor(torch.tensor(float(len(targets)), device=labels.device))
        images, masks = even_rows(len(labels)), rows(len(targets), labels.device)

        def part(output: int, kind: str, shape: tuple[int, int, int], like: Tensor) -> Tensor:
            of = images if kind == "match" else masks
            return of.of(lambda total: draw(output, kind, (total, *shape[1:]), like))

        terms: dict[str, Tensor] = {}
        for i, (class_logits, mask_logits) in enumerate(outputs):
            prefix = "decode." if i == len(outputs) - 1 else f"decode.d{i}."
            if not masks.count and masks.total:
                self._draw_alike(i, mask_logits, part)
            query = self.matcher(i, class_logits, mask_logits, targets, part)
            loss_cls = self._class_loss(class_logits, targets, query)
            loss_mask, loss_dice = self._mask_losses(i, mask_logits[targets.image, query][:, None], targets.masks, count, part)
            named = zip(("cls", "mask", "dice"), (loss_cls, loss_mask, loss_dice), self.weights, strict=True)
            terms |= {f"{prefix}loss_{name}": loss * weight for name, loss, weight in named}
        return terms

    def _class_loss(self, logits: Tensor, targets: Targets, query: Tensor) -> Tensor:
        target = torch.full(logits.shape[:2], self.classes, device=logits.device)
        target[targets.image, query] = targets.label
        target = target.flatten()
        weight = self.class_weight.float()  # of a model in 16 bits, too
        loss = F.cross_entropy(logits.flatten(0, 1).float(), target, weight, reduction="sum")
        # no image has no weight
        return loss / divisor(weight[target].sum(), torch.finfo(torch.float32).tiny)

    def _mask_losses(self, output: int, logits: Tensor, masks: Tensor, count: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        if not len(logits):
            nothing = logits.sum()
            return nothing, nothing
        points = self._points(output, logits.detach().float(), draw)
        with torch.no_grad():
            target = sample(masks, points)[:, 0]
        value = sample(logits.float(), points)[:, 0]
        mask = F.binary_cross_entropy_with_logits(value, target, reduction="sum") / (count * self.points)
        probability = value.sigmoid()
        overlap = 2 * (probability * target).sum(1)
        dice = 1 - (overlap + 1) / (probability.sum(1) + target.sum(1) + 1)
        return mask, dice.sum() / count

    def _draw_alike(self, output: int, logits: Tensor, draw: Draw) -> None:
        """Draw what the other processes draw for their masks, which the next draws come behind."""
        if (points := getattr(self.matcher, "points", None)) is not None:
            draw(output, "match", (len(logits), points, 2), logits)
        draw(output, "over", (0, self.candidates, 2), logits)
        draw(output, "uniform", (0, self.points - self.uncertain, 2), logits)

    @torch.no_grad()
    def _points(self, output: int, logits: Tensor, draw: Draw) -> Tensor:
        """(P, points, 2) as (x, y) in 0..1."""
        masks = len(logits)
        candidates = draw(output, "over", (masks, self.candidates, 2), logits)
        certainty = sample(logits, candidates)[:, 0].abs()
        chosen = certainty.topk(self.uncertain, 1, largest=False, sorted=False).indices
        # coordinate by coordinate: one gather of pairs is twenty times slower on a GPU
        uncertain = torch.stack([candidates[..., axis].gather(1, chosen) for axis in (0, 1)], -1)
        rest = draw(output, "uniform", (masks, self.points - self.uncertain, 2), logits)
        return torch.cat([uncertain, rest], 1)


def pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy of logits (B, K, H, W) over the labelled pixels of labels (B, H, W); 0 if there is none.

    Raises: TypeError or ValueError for labels that are no train ids, as `train_ids` does.
    """
    labels = train_ids(labels, logits.shape[1])
    total = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE)
    return total / divisor((labels != IGNORE).sum())


def alignment_loss(logits: Tensor, labels: Tensor, *, count_ignored: bool = True) -> Tensor:
    """Cross entropy of the score map (B, K, h, w), upsampled to the labels (B, H, W).

    Args:
        count_ignored: the mean is over all pixels, as in the release: ignored ones cost nothing but count in the divisor;
            else over the labelled ones.

    Raises: TypeError or ValueError for labels that are no train ids, as `train_ids` does.
    """
    labels = train_ids(labels, logits.shape[1])
    logits = F.interpolate(logits.float(), labels.shape[-2:], mode="bilinear", align_corners=False)
    count = max(1, labels.numel()) if count_ignored else divisor((labels != IGNORE).sum())
    return F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE) / count
