"""All decoder outputs' losses at once: bit for bit what one output after the other has, with the same draws."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mfuser.decoder.criterion import MaskCriterion
from mfuser.decoder.matching import Hungarian, Matcher, Targets, fixed, present_classes
from mfuser.decoder.points import sample, uniform

Outputs = list[tuple[Tensor, Tensor]]


def scene(queries: int, *, images: int = 3, outputs: int = 4) -> tuple[Outputs, Tensor]:
    torch.manual_seed(0)
    made = [(torch.randn(images, queries, 20), torch.randn(images, queries, 16, 16)) for _ in range(outputs)]
    labels = torch.randint(0, 19, (images, 6, 6)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    labels[:, :9] = 255
    labels[1] = 255  # nothing but ignored pixels
    return [(c.requires_grad_(), m.requires_grad_()) for c, m in made], labels


def one_by_one(criterion: MaskCriterion, outputs: Outputs, labels: Tensor) -> dict[str, Tensor]:
    """Each output's terms by themselves, written as the formulas are."""
    targets = Targets.of(labels, 19)
    count, terms = torch.tensor(float(len(targets))).clamp(min=1), {}
    for i, (class_logits, mask_logits) in enumerate(outputs):
        query = criterion.matcher(i, class_logits, mask_logits, targets, uniform)
        wanted = torch.full(class_logits.shape[:2], 19)
        wanted[targets.image, query] = targets.label
        loss = F.cross_entropy(class_logits.flatten(0, 1).float(), wanted.flatten(), criterion.class_weight, reduction="sum")
        prefix = "decode." if i == len(outputs) - 1 else f"decode.d{i}."
        terms[f"{prefix}loss_cls"] = loss / criterion.class_weight[wanted.flatten()].sum() * 2.0
        logits = mask_logits[targets.image, query][:, None].float()
        over = uniform(i, "over", (len(logits), criterion.candidates, 2), logits)
        chosen = sample(logits.detach(), over)[:, 0].abs().topk(criterion.uncertain, 1, largest=False, sorted=False).indices
        rest = uniform(i, "uniform", (len(logits), criterion.points - criterion.uncertain, 2), logits)
        points = torch.cat([torch.stack([over[..., axis].gather(1, chosen) for axis in (0, 1)], -1), rest], 1)
        target, value = sample(targets.masks, points)[:, 0], sample(logits, points)[:, 0]
        mask = F.binary_cross_entropy_with_logits(value, target, reduction="sum") / (count * criterion.points)
        share = value.sigmoid()
        dice = 1 - (2 * (share * target).sum(1) + 1) / (share.sum(1) + target.sum(1) + 1)
        terms |= {f"{prefix}loss_mask": mask * 5.0, f"{prefix}loss_dice": dice.sum() / count * 5.0}
    return terms


def gradients(outputs: Outputs, terms: dict[str, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(torch.stack(list(terms.values())).sum(), [tensor for pair in outputs for tensor in pair]))


def by_criterion(criterion: MaskCriterion, outputs: Outputs, labels: Tensor, **given: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The terms, and the next number of the generator that points were drawn from."""
    torch.manual_seed(7)
    return criterion(outputs, labels, **given), torch.rand(())


@pytest.mark.parametrize(("matcher", "queries"), [(fixed, 19), (Hungarian(50), 30)], ids=["fixed", "Hungarian"])
@pytest.mark.parametrize(("points", "at_once"), [(96, None), (100, None), (128, 2**20), (128, 17000)])
def test_losses_gradients_and_draws_are_bit_for_bit_those_of_one_output_after_the_other(matcher, queries, points, at_once):
    """The number of points matters where several outputs are sampled together: see `MaskCriterion`."""
    outputs, labels = scene(queries)
    criterion = MaskCriterion(matcher=matcher, points=points, at_once=at_once)
    terms, after = by_criterion(criterion, outputs, labels)
    torch.manual_seed(7)
    expected = one_by_one(criterion, outputs, labels)
    assert torch.equal(after, torch.rand(()))
    assert list(terms) == list(expected)
    assert all(torch.equal(terms[name], value) for name, value in expected.items())
    assert all(map(torch.equal, gradients(outputs, terms), gradients(outputs, expected)))


def test_classes_that_are_known_beforehand_change_nothing():
    outputs, labels = scene(19)
    criterion = MaskCriterion(points=64)
    present = present_classes(labels, 19)
    assert [sorted(set(image.flatten().tolist()) - {255}) for image in labels] == [
        row.nonzero()[:, 0].tolist() for row in present
    ]
    terms, _ = by_criterion(criterion, outputs, labels)
    again, _ = by_criterion(criterion, outputs, labels, present=present)
    assert all(torch.equal(terms[name], value) for name, value in again.items())


@pytest.mark.parametrize("labels", [torch.uint8, torch.int64])
def test_present_classes_of_any_integers(labels):
    given = torch.tensor([[[0, 255], [18, 3]], [[255, 255], [255, 255]]]).to(labels)
    assert present_classes(given, 19).nonzero().tolist() == [[0, 0], [0, 3], [0, 18]]


class _Counting(Hungarian):
    """Counts how often queries are asked for, which a GPU is waited for."""

    asked = 0

    def assigned(self, costs: Sequence[Tensor], targets: Targets) -> Tensor:
        type(self).asked += 1
        return super().assigned(costs, targets)


def test_a_step_asks_once_for_the_queries_of_all_outputs():
    outputs, labels = scene(30)
    matcher: Matcher = _Counting(20)
    MaskCriterion(matcher=matcher, points=64)(outputs, labels)
    assert _Counting.asked == 1
