"""What the decoder is trained with: a matcher, losses on sampled points, and text-image alignment.

A query that no target is matched to is "no object". Mask losses are computed on points, three quarters of them where the
mask is least certain (PointRend, Kirillov et al., CVPR 2020).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.decoder.matching import Matcher, Targets, fixed, present_classes
from mfuser.decoder.points import Draw, sample, uniform
from mfuser.labels import IGNORE, train_ids
from mfuser.processes import divisor, even_rows, rows
from mfuser.resize import bilinear

_AT_ONCE = 2**25  # candidates, of 8 bytes, that are sampled together on a GPU


class MaskCriterion(nn.Module):
    """Class, mask and dice losses of every decoder output (Mask2Former's, Cheng et al., CVPR 2022).

    Args:
        classes: K.    matcher: `fixed`, with K queries, or `Hungarian()`, with any number of at least those present.
        points: sampled per mask.    oversample: candidates per point.    importance: share of uncertain points.
        no_object_weight: class weight of "no object".    weights: of the (class, mask, dice) terms.
        at_once: candidates of several outputs that are sampled together; None: 2**25 on a GPU, one output's on a CPU.
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
        at_once: int | None = None,
    ) -> None:
        super().__init__()
        self.classes, self.matcher, self.points, self.weights, self.at_once = classes, matcher, points, weights, at_once
        self.candidates, self.uncertain = int(points * oversample), int(importance * points)
        class_weight = torch.ones(classes + 1)
        class_weight[-1] = no_object_weight
        self.register_buffer("class_weight", class_weight, persistent=False)

    def forward(
        self,
        outputs: Sequence[tuple[Tensor, Tensor]],
        labels: Tensor,
        *,
        draw: Draw = uniform,
        present: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Loss terms, already weighted.

        Args:
            outputs: per decoder output, class logits (B, Q, K + 1) and mask logits (B, Q, h, w).
            labels: (B, H, W) train ids of any integer type, 255 = ignore.
            present: as `Targets.of` takes it.
        Returns: `decode.d<i>.loss_{cls,mask,dice}` for all outputs but the last, `decode.loss_*` for the last.
        Raises: TypeError or ValueError for other labels, as `train_ids` does; ValueError as the matcher does.
        """
        targets = Targets.of(train_ids(labels, self.classes), self.classes, present)

        def number(each: Tensor) -> Tensor:
            return present_classes(each, self.classes).sum()

        count = divisor(torch.full((), float(len(targets)), device=labels.device), labels=labels, of=lambda e: number(e).float())
        images, masks = even_rows(len(labels)), rows(len(targets), labels.device, labels=labels, of=number)

        def part(output: int, kind: str, shape: tuple[int, int, int], like: Tensor) -> Tensor:
            of = images if kind == "match" else masks
            return of.of(lambda total: draw(output, kind, (total, *shape[1:]), like))

        # one output's draws before the next one's, as if the outputs had their losses one after the other
        costs, drawn = [], []
        for i, (class_logits, mask_logits) in enumerate(outputs):
            if not masks.count and masks.total:
                self._draw_alike(i, mask_logits, part)
            costs.append(self.matcher.costs(i, class_logits, mask_logits, targets, part))
            if len(targets):
                over = part(i, "over", (len(targets), self.candidates, 2), mask_logits)
                drawn.append((over, part(i, "uniform", (len(targets), self.points - self.uncertain, 2), mask_logits)))
        query = self.matcher.assigned(costs, targets)
        loss_cls = self._class_losses([logits for logits, _ in outputs], targets, query, labels)
        matched = _matched([logits for _, logits in outputs], targets, query)
        loss_mask, loss_dice = self._mask_losses(matched, targets.masks, count, drawn)
        losses = zip(("cls", "mask", "dice"), (loss_cls, loss_mask, loss_dice), self.weights, strict=True)
        by_name = {name: (loss * weight).unbind() for name, loss, weight in losses}
        prefixes = [f"decode.d{i}." for i in range(len(outputs) - 1)] + ["decode."]
        return {f"{prefix}loss_{name}": by_name[name][i] for i, prefix in enumerate(prefixes) for name in by_name}

    def _class_losses(self, outputs: Sequence[Tensor], targets: Targets, query: Tensor, labels: Tensor) -> Tensor:
        """Return (O,) of O outputs' logits (B, Q, K + 1) and their targets' queries (O, P)."""
        logits = torch.stack([each.float() for each in outputs])
        each, queries = logits.shape[1] * logits.shape[2], logits.shape[2]
        target = torch.full((len(outputs), each), self.classes, device=logits.device)
        target.scatter_(1, targets.image * queries + query, targets.label.expand(len(outputs), -1))
        weight = self.class_weight.float()  # of a model in 16 bits, too
        likelihood = logits.flatten(1, 2).log_softmax(-1)
        loss = [F.nll_loss(one, right, weight, reduction="sum") for one, right in zip(likelihood, target, strict=True)]
        shares = torch.stack([share.sum() for share in weight[target]])

        def share_of(each: Tensor) -> Tensor:
            shown = present_classes(each, self.classes).sum(0)
            return (shown * weight[:-1]).sum() + (len(each) * queries - shown.sum()) * weight[-1]

        # no image has no weight
        return torch.stack(loss) / divisor(shares, torch.finfo(torch.float32).tiny, labels=labels, of=share_of)

    def _mask_losses(
        self, outputs: Sequence[Tensor], masks: Tensor, count: Tensor, drawn: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Return mask and dice losses, (O,) each, of O outputs' matched logits (P, 1, h, w) and what was drawn for them.

        Several outputs are sampled at once, and each one's values are summed by themselves, in the same order as alone.
        """
        if not len(masks):
            nothing = torch.stack([logits.sum() for logits in outputs])
            return nothing, nothing
        found: list[Tensor] = []
        overlaps: list[Tensor] = []
        # on a CPU one output at a time: its vectorised functions end with others, which differ in the last bit
        at_once = self.at_once if self.at_once is not None else _AT_ONCE if masks.is_cuda else 1
        by = max(1, at_once // (len(masks) * self.candidates))
        for first in range(0, len(outputs), by):
            some = slice(first, first + by)
            logits = torch.cat([one.float() for one in outputs[some]])
            over, rest = (torch.cat(part) for part in zip(*drawn[some], strict=True))
            points = self._points(logits.detach(), over, rest)
            with torch.no_grad():
                target = _sampled_targets(masks, points)
            value = sample(logits, points)[:, 0]
            found += F.binary_cross_entropy_with_logits(value, target, reduction="none").split(len(masks))
            probability = value.sigmoid()
            overlap = 2 * (probability * target).sum(1)
            overlaps += (1 - (overlap + 1) / (probability.sum(1) + target.sum(1) + 1)).split(len(masks))
        mask = torch.stack([each.sum() for each in found]) / (count * self.points)
        return mask, torch.stack([each.sum() for each in overlaps]) / count

    def _draw_alike(self, output: int, logits: Tensor, draw: Draw) -> None:
        """Draw what the other processes draw for their masks, which the next draws come behind."""
        if (points := getattr(self.matcher, "points", None)) is not None:
            draw(output, "match", (len(logits), points, 2), logits)
        draw(output, "over", (0, self.candidates, 2), logits)
        draw(output, "uniform", (0, self.points - self.uncertain, 2), logits)

    @torch.no_grad()
    def _points(self, logits: Tensor, candidates: Tensor, rest: Tensor) -> Tensor:
        """(M, points, 2) as (x, y) in 0..1: the least certain of M masks' candidates (M, c, 2), and the rest (M, r, 2)."""
        certainty = sample(logits, candidates)[:, 0].abs()
        chosen = certainty.topk(self.uncertain, 1, largest=False, sorted=False).indices
        # coordinate by coordinate: one gather of pairs is twenty times slower on a GPU
        uncertain = torch.stack([candidates[..., axis].gather(1, chosen) for axis in (0, 1)], -1)
        return torch.cat([uncertain, rest], 1)


def _matched(outputs: Sequence[Tensor], targets: Targets, query: Tensor) -> list[Tensor]:
    """Return (P, 1, h, w) of each output's mask logits (B, Q, h, w): those of the targets' queries (O, P)."""
    rows = targets.image * outputs[0].shape[1] + query
    # not by two indices: queries of an image differ, and the gradient need not sort them
    return [logits.flatten(0, 1).index_select(0, own)[:, None] for logits, own in zip(outputs, rows, strict=True)]


def _sampled_targets(masks: Tensor, points: Tensor) -> Tensor:
    """Return values (O P, n) of masks (P, 1, H, W) at the points (O P, n, 2) of O outputs, without O copies of the masks."""
    outputs, count = len(points) // len(masks), points.shape[1]
    by_mask = points.view(outputs, len(masks), count, 2).transpose(0, 1).reshape(len(masks), outputs * count, 2)
    values = sample(masks, by_mask)[:, 0]
    return values.view(len(masks), outputs, count).transpose(0, 1).reshape(outputs * len(masks), count)


def pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy of logits (B, K, H, W) over the labelled pixels of labels (B, H, W); 0 if there is none.

    Raises: TypeError or ValueError for labels that are no train ids, as `train_ids` does.
    """
    ids = train_ids(labels, logits.shape[1])
    total = F.cross_entropy(logits, ids, reduction="sum", ignore_index=IGNORE)
    return total / divisor(labelled(ids), labels=labels, of=labelled)


def labelled(labels: Tensor) -> Tensor:
    """Return the number of pixels of labels (B, H, W) that are not ignored."""
    return (labels != IGNORE).sum()


def alignment_loss(logits: Tensor, labels: Tensor, *, count_ignored: bool = True) -> Tensor:
    """Cross entropy of the score map (B, K, h, w), upsampled to the labels (B, H, W).

    Args:
        count_ignored: the mean is over all pixels, as in the release: ignored ones cost nothing but count in the divisor;
            else over the labelled ones.

    Raises: TypeError or ValueError for labels that are no train ids, as `train_ids` does.
    """
    ids = train_ids(labels, logits.shape[1])
    logits = bilinear(logits.float(), ids.shape[-2:])
    count = max(1, ids.numel()) if count_ignored else divisor(labelled(ids), labels=labels, of=labelled)
    return F.cross_entropy(logits, ids, reduction="sum", ignore_index=IGNORE) / count
