"""Matching of queries to masks, and the losses that follow, against plain loops over the formulas of Mask2Former's paper."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from named_weights import uniform01
from torch import Tensor

from mfuser.decoder.criterion import MaskCriterion
from mfuser.decoder.matching import Hungarian, Targets, fixed
from mfuser.decoder.points import uniform


def draws(output: int, kind: str, shape: tuple[int, int, int], like: Tensor) -> Tensor:
    return torch.from_numpy(uniform01(f"match/{output}/{kind}", shape))


def scene(queries: int = 7, classes: int = 5, side: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Class logits, mask logits and labels of three images: some classes, one class, nothing but ignored pixels."""
    labels = torch.full((3, side, side), 255)
    labels[0, :3], labels[0, 3:6, :5], labels[0, 6:] = 4, 1, 2
    labels[1, 2:7, 2:7] = 0
    return torch.randn(3, queries, classes + 1), 3 * torch.randn(3, queries, side, side), labels


def bilinear(grid: Tensor, x: float, y: float) -> float:
    """The value of a map at (x, y) in 0..1: between the centres of four cells, those outside being zero."""
    height, width = grid.shape
    column, row = x * width - 0.5, y * height - 0.5
    left, top = math.floor(column), math.floor(row)
    value = 0.0
    for r, c in itertools.product((top, top + 1), (left, left + 1)):
        if 0 <= r < height and 0 <= c < width:
            value += grid[r, c].item() * (1 - abs(row - r)) * (1 - abs(column - c))
    return value


def at(grid: Tensor, points: Tensor) -> list[float]:
    return [bilinear(grid, x, y) for x, y in points.tolist()]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def cross_entropy(logits: list[float], targets: list[float]) -> float:
    """Mean binary cross entropy."""
    pairs = zip(logits, targets, strict=True)
    return -sum(t * math.log(sigmoid(x)) + (1 - t) * math.log(1 - sigmoid(x)) for x, t in pairs) / len(logits)


def dice(logits: list[float], targets: list[float]) -> float:
    masks = [sigmoid(x) for x in logits]
    overlap = sum(m * t for m, t in zip(masks, targets, strict=True))
    return 1 - (2 * overlap + 1) / (sum(masks) + sum(targets) + 1)


def costs_by_loops(class_logits: Tensor, mask_logits: Tensor, labels: Tensor, points: Tensor) -> list[list[list[float]]]:
    """[image][class that it shows][query]."""
    found = []
    for b in range(len(labels)):
        rows = []
        for k in sorted(set(labels[b].flatten().tolist()) - {255}):
            target, row = at((labels[b] == k).float(), points[b]), []
            for q in range(class_logits.shape[1]):
                weights = [math.exp(v) for v in class_logits[b, q].tolist()]
                logits = at(mask_logits[b, q], points[b])
                row.append(-2 * weights[k] / sum(weights) + 5 * cross_entropy(logits, target) + 5 * dice(logits, target))
            rows.append(row)
        found.append(rows)
    return found


def test_costs_are_those_of_the_formulas():
    class_logits, mask_logits, labels = scene()
    points = draws(1, "match", (3, 20, 2), mask_logits)
    costs = Hungarian(points=20).costs(1, class_logits, mask_logits, Targets.of(labels, 5), draws)
    expected = [row for image in costs_by_loops(class_logits, mask_logits, labels, points) for row in image]
    torch.testing.assert_close(costs, torch.tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_the_hungarian_assignment_is_the_cheapest_of_all(seed):
    torch.manual_seed(seed)
    class_logits, mask_logits, labels = scene()
    targets = Targets.of(labels, 5)
    query = Hungarian(points=20)(0, class_logits, mask_logits, targets, draws)
    points = draws(0, "match", (3, 20, 2), mask_logits)
    for b, rows in enumerate(costs_by_loops(class_logits, mask_logits, labels, points)):
        every = itertools.permutations(range(7), len(rows))
        best = min(every, key=lambda order: sum(row[q] for row, q in zip(rows, order, strict=True)))
        assert query[targets.image == b].tolist() == list(best)


def test_targets_are_one_mask_for_each_class_that_an_image_shows():
    _, _, labels = scene()
    targets = Targets.of(labels, 5)
    assert list(zip(targets.image.tolist(), targets.label.tolist(), strict=True)) == [(0, 1), (0, 2), (0, 4), (1, 0)]
    for image, label, mask in zip(targets.image, targets.label, targets.masks, strict=True):
        assert torch.equal(mask[0].bool(), labels[image] == label)


def test_query_k_is_class_ks_where_matching_is_fixed():
    class_logits, mask_logits, labels = scene(queries=5)
    targets = Targets.of(labels, 5)
    assert fixed(0, class_logits, mask_logits, targets, uniform).tolist() == [1, 2, 4, 0]


def test_fixed_matching_refuses_other_numbers_of_queries():
    class_logits, mask_logits, labels = scene(queries=7)
    with pytest.raises(ValueError, match=r"a query for each class, got 7 for 5; use Hungarian\(\)"):
        MaskCriterion(5, points=20)([(class_logits, mask_logits)], labels)


def test_too_few_queries_for_the_classes_of_an_image_are_refused():
    class_logits, mask_logits, labels = scene(queries=2)
    with pytest.raises(ValueError, match="2 queries cannot answer for the 3 classes of an image; use more"):
        MaskCriterion(5, points=20, matcher=Hungarian(20))([(class_logits, mask_logits)], labels)


def test_losses_of_matched_queries_are_those_of_the_formulas():
    class_logits, mask_logits, labels = scene()
    outputs = [(class_logits, mask_logits), (torch.randn_like(class_logits), torch.randn_like(mask_logits))]
    # every point is a random one: which are the least certain is test_decoder's concern
    criterion = MaskCriterion(5, points=12, importance=0.0, matcher=Hungarian(20))
    terms = criterion(outputs, labels, draw=draws)
    for i, (classes, masks) in enumerate(outputs):
        rows = costs_by_loops(classes, masks, labels, draws(i, "match", (3, 20, 2), masks))
        points, wanted, mask_sum, dice_sum = draws(i, "uniform", (4, 12, 2), masks), torch.full((3, 7), 5), 0.0, 0.0
        pairs = []
        for b, costs in enumerate(rows):
            every = itertools.permutations(range(7), len(costs))
            best = min(every, key=lambda order: sum(row[q] for row, q in zip(costs, order, strict=True)))
            pairs += zip([b] * len(costs), sorted(set(labels[b].flatten().tolist()) - {255}), best, strict=True)
        for (b, k, q), chosen in zip(pairs, points, strict=True):
            logits, target = at(masks[b, q], chosen), at((labels[b] == k).float(), chosen)
            mask_sum, dice_sum = mask_sum + cross_entropy(logits, target), dice_sum + dice(logits, target)
            wanted[b, q] = k
        weight = torch.where(wanted == 5, 0.1, 1.0)
        negative = -classes.log_softmax(-1).gather(-1, wanted[..., None])[..., 0]
        prefix = "decode.d0." if i == 0 else "decode."
        assert terms[f"{prefix}loss_cls"].item() == pytest.approx(2 * float((weight * negative).sum() / weight.sum()), rel=1e-5)
        assert terms[f"{prefix}loss_mask"].item() == pytest.approx(5 * mask_sum / 4, rel=1e-4)
        assert terms[f"{prefix}loss_dice"].item() == pytest.approx(5 * dice_sum / 4, rel=1e-4)


def test_a_perfect_query_is_found_wherever_it_stands():
    _, _, labels = scene(side=32)
    mask_logits = torch.full((3, 100, 32, 32), -9.0)
    class_logits = torch.zeros(3, 100, 6)
    for q, k in ((93, 1), (17, 2), (58, 4)):
        mask_logits[0, q] += 18 * (labels[0] == k)
        class_logits[0, q, k] = 9
    query = Hungarian()(0, class_logits, mask_logits, Targets.of(labels, 5), uniform)
    assert query[:3].tolist() == [93, 17, 58]


def test_a_batch_without_labels_has_no_mask_losses_and_a_gradient():
    class_logits, mask_logits = torch.zeros(2, 7, 6, requires_grad=True), torch.zeros(2, 7, 8, 8, requires_grad=True)
    criterion = MaskCriterion(5, points=20, matcher=Hungarian(20))
    terms = criterion([(class_logits, mask_logits)], torch.full((2, 8, 8), 255))
    assert terms["decode.loss_mask"] == terms["decode.loss_dice"] == 0
    sum(terms.values()).backward()
    assert torch.isfinite(class_logits.grad).all()


def test_logits_that_are_not_finite_show_in_the_loss():
    class_logits, mask_logits, labels = scene()
    mask_logits[0] = float("nan")
    terms = MaskCriterion(5, points=20, matcher=Hungarian(20))([(class_logits, mask_logits)], labels)
    assert torch.isnan(terms["decode.loss_mask"])


def test_costs_are_full_precision_under_autocast():
    class_logits, mask_logits, labels = scene()
    targets, matcher = Targets.of(labels, 5), Hungarian(points=20)
    expected = matcher.costs(0, class_logits, mask_logits, targets, draws)
    with torch.autocast("cpu", torch.bfloat16):
        actual = matcher.costs(0, class_logits, mask_logits, targets, draws)
    assert torch.equal(actual, expected)
