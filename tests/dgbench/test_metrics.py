"""Confusion matrices, IoU and intervals against the Cityscapes scripts and against plain loops."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import t as student_t

from dgbench.metrics import Absent, confusion, interval, iou, miou, rare, trapezoid_weights, weighted
from dgbench.protocol import CLASS_SETS

# two 10 x 10 images of three classes; class 2 is predicted in the first, but is no label in either
THREE_CLASSES = np.array([[[47, 8, 5], [3, 37, 0], [0, 0, 0]], [[45, 15, 0], [2, 38, 0], [0, 0, 0]]])


def pixels_of(matrix: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return a prediction and a label with these counts."""
    label, pred = np.indices(matrix.shape).reshape(2, -1).repeat(matrix.ravel(), axis=1)
    return pred, label


def counted_one_by_one(pred: NDArray[np.int64], label: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    counts = np.zeros((classes, classes), np.int64)
    for p, t in zip(pred.ravel(), label.ravel(), strict=True):
        if t != 255:
            counts[t, p] += 1
    return counts


@pytest.fixture
def scene() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    rng = np.random.default_rng(7)
    label = rng.integers(0, 19, (37, 53)).astype(np.uint8)
    pred = np.where(rng.random(label.shape) < 0.6, label, rng.integers(0, 19, label.shape)).astype(np.uint8)
    label[rng.random(label.shape) < 0.1] = 255
    return pred, label


def test_confusion_counts_every_pixel_but_the_ignored(scene: tuple[NDArray[np.uint8], NDArray[np.uint8]]) -> None:
    pred, label = scene
    counts = confusion(pred, label, 19)
    assert counts.dtype == np.int64
    assert np.array_equal(counts, counted_one_by_one(pred.astype(int), label.astype(int), 19))
    assert counts.sum() == (label != 255).sum()


def test_confusion_of_tensors_equals_that_of_arrays(scene: tuple[NDArray[np.uint8], NDArray[np.uint8]]) -> None:
    pred, label = scene
    from_tensors = confusion(torch.from_numpy(pred).long(), torch.from_numpy(label), 19)
    assert np.array_equal(from_tensors, confusion(pred, label, 19))


def test_images_add_up(scene: tuple[NDArray[np.uint8], NDArray[np.uint8]]) -> None:
    pred, label = scene
    whole = confusion(pred, label, 19)
    assert np.array_equal(confusion(pred[:20], label[:20], 19) + confusion(pred[20:], label[20:], 19), whole)


def test_an_image_without_labels_counts_nothing() -> None:
    blank = np.full((4, 4), 255, np.uint8)
    counts = confusion(np.zeros_like(blank), blank, 3)
    assert counts.sum() == 0
    assert np.isnan(miou(counts))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_confusion_refuses_what_would_be_counted_wrongly(as_tensor: bool) -> None:
    def given(values: list[float], dtype: str) -> NDArray[np.int64]:
        array = np.array(values, dtype=dtype)
        return torch.from_numpy(array) if as_tensor else array  # type: ignore[return-value]

    with pytest.raises(ValueError, match=r"0\.\.3 are not within 0\.\.2"):
        confusion(given([0, 3], "int64"), given([0, 1], "int64"), 3)
    with pytest.raises(ValueError, match="label -1 is negative"):
        confusion(given([0, 1], "int64"), given([-1, 1], "int64"), 3)
    with pytest.raises(ValueError, match="differ in shape"):
        confusion(given([0, 1], "int64"), given([0], "int64"), 3)
    with pytest.raises(ValueError, match="must be integers"):
        confusion(given([0, 1], "float32"), given([0, 1], "int64"), 3)


def test_miou_is_the_first_of_three_meanings() -> None:
    """The same two images by the Cityscapes rule, by detectron2's, and as a mean of per-image IoUs."""
    total = THREE_CLASSES.sum(axis=0)
    assert 100 * miou(total) == pytest.approx(48.8, abs=0.05)
    per_class = iou(total)
    in_labels = total.sum(axis=1) > 0
    assert 100 * per_class[in_labels].mean() == pytest.approx(73.2, abs=0.05)
    assert 100 * np.mean([miou(image) for image in THREE_CLASSES]) == pytest.approx(60.7, abs=0.05)


def test_a_class_that_occurs_nowhere_is_left_out() -> None:
    assert np.isnan(iou(np.diag([5, 3, 0]))[2])
    assert miou(np.diag([5, 3, 0])) == 1.0


def test_other_rules_for_absent_classes() -> None:
    """Three classes right, one labelled and missed, one only predicted, one nowhere."""
    matrix = np.diag([10, 10, 10, 0, 0, 0])
    matrix[3, 0], matrix[0, 4] = 10, 10
    scores = {0: 10 / 30, 1: 1.0, 2: 1.0, 3: 0.0, 4: 0.0}
    assert iou(matrix)[:5] == pytest.approx(list(scores.values()))
    assert miou(matrix) == pytest.approx(sum(scores.values()) / 5)
    # detectron2's evaluator looks at labelled classes alone
    assert miou(matrix, absent="unlabelled") == pytest.approx(sum(scores.values()) / 4)
    assert miou(matrix, absent="zero") == pytest.approx(sum(scores.values()) / 6)
    assert interval(np.stack([matrix] * 3), absent="zero") == pytest.approx((miou(matrix, absent="zero"),) * 2)


def test_the_mean_over_some_classes_keeps_the_others_mistakes() -> None:
    rng = np.random.default_rng(3)
    matrix = rng.integers(1, 100, (19, 19))
    for classes in CLASS_SETS.values():
        assert miou(matrix, classes=classes) == pytest.approx(np.mean(iou(matrix)[list(classes)]))
    matrices = rng.integers(1, 100, (20, 19, 19))
    low, high = interval(matrices, classes=CLASS_SETS[13])
    assert low < miou(matrices.sum(0), classes=CLASS_SETS[13]) < high


def test_equal_to_cityscapesscripts_on_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Write label-id PNGs in Cityscapes' folders and let the official script find and score them."""
    evaluation = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    labels = pytest.importorskip("cityscapesscripts.helpers.labels")
    to_id = np.array([labels.trainId2label[k].id for k in range(19)], np.uint8)
    rng = np.random.default_rng(3)
    # a train is nowhere, a truck only predicted, and ids outside the evaluated ones are ignored
    present = [k for k in range(19) if k not in (14, 16)]
    total = np.zeros((19, 19), np.int64)
    truth, results = tmp_path / "gtFine/val/lindau", tmp_path / "results"
    truth.mkdir(parents=True)
    results.mkdir()
    for number in range(3):
        truth_id = rng.choice(to_id[present], (64, 128))
        truth_id[rng.random(truth_id.shape) < 0.2] = rng.choice([0, 1, 4, 9, 15, 30])
        train_id = np.array([labels.id2label[i].trainId for i in range(34)])
        label = train_id[truth_id].astype(np.uint8)
        keep = rng.random(label.shape) < 0.7
        pred = np.where(keep & (label != 255), label, rng.choice([*present, 14], label.shape)).astype(np.uint8)
        total += confusion(pred, label, 19)
        name = f"lindau_{number:06d}_000019"
        Image.fromarray(truth_id.astype(np.uint8)).save(truth / f"{name}_gtFine_labelIds.png")
        Image.fromarray(to_id[pred]).save(results / f"{name}_pred.png")
    official = Namespace(
        evalInstLevelScore=False,
        evalPixelAccuracy=False,
        evalLabels=[],
        bold="",
        nocol="",
        colorized=False,
        quiet=True,
        JSONOutput=False,
        avgClassSize={},
        printRow=5,
        normalized=True,
        predictionPath=str(results),
        predictionWalk=None,
    )
    truths = sorted(str(path) for path in truth.glob("*_gtFine_labelIds.png"))
    scores = evaluation.evaluateImgLists([evaluation.getPrediction(official, path) for path in truths], truths, official)
    capsys.readouterr()
    ours = iou(total)
    for k in range(19):
        expected = scores["classScores"][labels.trainId2label[k].name]
        assert ours[k] == expected or (np.isnan(ours[k]) and np.isnan(expected)), labels.trainId2label[k].name
    assert ours[14] == 0.0
    assert np.isnan(ours[16])
    assert miou(total) == scores["averageScoreClasses"]


@pytest.mark.parametrize("seed", range(4))
def test_equal_to_torchmetrics(seed: int) -> None:
    classification = pytest.importorskip("torchmetrics.classification")
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 17, (2, 40, 60))  # classes 17 and 18 occur nowhere
    pred = np.where(rng.random(label.shape) < 0.7, label, rng.integers(0, 17, label.shape))
    label[rng.random(label.shape) < 0.1] = 255
    settings = {"num_classes": 19, "ignore_index": 255}
    tensors = torch.from_numpy(pred), torch.from_numpy(label)
    theirs = classification.MulticlassConfusionMatrix(**settings)(*tensors)
    counts = sum(confusion(p, t, 19) for p, t in zip(pred, label, strict=True))
    assert np.array_equal(counts, theirs.numpy())
    scores = classification.MulticlassJaccardIndex(**settings, average=None)(*tensors).numpy()  # fp32
    ours = iou(counts)
    # a class that occurs nowhere has no IoU here and 0 there; their mean leaves it out all the same
    assert np.isnan(ours[17:]).all()
    assert (scores[17:] == 0).all()
    assert np.array_equal(ours[:17].astype(np.float32), scores[:17])
    assert np.array_equal(iou(counts, absent="zero").astype(np.float32), scores)
    mean = classification.MulticlassJaccardIndex(**settings)(*tensors)
    assert miou(counts) == pytest.approx(float(mean), abs=1e-6)


def simulated(n_images: int, rng: np.random.Generator, accuracy: float = 0.8) -> NDArray[np.int64]:
    """Draw images whose difficulty varies, (n, 2, 2) counts of 100 + 100 pixels."""
    difficulty = rng.beta(20 * accuracy, 20 * (1 - accuracy), (n_images, 2))
    hits = rng.binomial(100, difficulty)
    counts = np.zeros((n_images, 2, 2), np.int64)
    counts[:, 0, 0], counts[:, 0, 1] = hits[:, 0], 100 - hits[:, 0]
    counts[:, 1, 1], counts[:, 1, 0] = hits[:, 1], 100 - hits[:, 1]
    return counts


def with_rare_classes(n_images: int, rng: np.random.Generator, present: float = 0.04) -> NDArray[np.int64]:
    """The same beside four classes that stand in few images, (n, 6, 6)."""
    counts = np.zeros((n_images, 6, 6), np.int64)
    counts[:, :2, :2] = simulated(n_images, rng)
    for k in range(2, 6):
        there = rng.random(n_images) < present
        hits = rng.binomial(50, rng.beta(4, 3, n_images)) * there
        counts[:, k, k], counts[:, k, 0] = hits, 50 * there - hits
    return counts


@pytest.mark.parametrize("draw", [simulated, with_rare_classes])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(draw: Callable[..., NDArray[np.int64]]) -> None:
    rng = np.random.default_rng(11)
    truth = miou(draw(40_000, rng).sum(axis=0))
    held = [low <= truth <= high for low, high in (interval(draw(60, rng)) for _ in range(250))]
    # the percentile bootstrap holds it in 92 and 91 % of these
    assert 0.93 <= np.mean(held) <= 0.99


def plain_half_width(counts: list[NDArray[np.int64]], score: Callable[[NDArray[np.int64]], float]) -> tuple[float, float]:
    """The jackknife's standard error and degrees of freedom, written out."""
    without = [score(np.sum(counts[:i] + counts[i + 1 :], axis=0)) for i in range(len(counts))]
    n, middle = len(counts), sum(without) / len(counts)
    squares = [(value - middle) ** 2 for value in without]
    # the sum's variance is estimated by n times that of a square; a chi-squared one of f degrees has 2 / f of its mean squared
    variance = n * np.var(squares)
    return float(np.sqrt((n - 1) / n * sum(squares))), min(n - 1, 2 * sum(squares) ** 2 / variance)


@pytest.mark.parametrize("absent", ["skip", "unlabelled", "zero"])
@pytest.mark.parametrize("classes", [None, (0, 2, 3), (1, 5)])
def test_intervals_equal_a_plain_jackknife_over_the_protocols_classes(absent: Absent, classes: tuple[int, ...] | None) -> None:
    rng = np.random.default_rng(6)
    a, b = (rng.poisson(1.0, (12, 6, 6)) * rng.integers(1, 50, (12, 1, 6)) for _ in range(2))
    a[:, 4], b[:, 4], a[:, 5], b[:, :, 5] = 0, 0, 0, 0  # one without labels, one without labels here and predictions there
    a[1:, 3] = 0  # one in a single image

    def score(total: NDArray[np.int64]) -> float:
        found = []
        for k in range(6) if classes is None else classes:
            union = total[k].sum() + total[:, k].sum() - total[k, k]
            if (total[k].sum() if absent == "unlabelled" else union) > 0:
                found.append(total[k, k] / union)
            elif absent == "zero":
                found.append(0.0)
        return sum(found) / len(found)

    error, freedom = plain_half_width(list(a), score)
    middle, half = score(a.sum(axis=0)), student_t.ppf(0.95, freedom) * error
    assert interval(a, level=0.9, classes=classes, absent=absent) == pytest.approx((max(0, middle - half), min(1, middle + half)))


def test_an_interval_repeats_itself_and_brackets_the_score() -> None:
    counts = simulated(50, np.random.default_rng(1))
    assert interval(counts) == interval(counts)
    low, high = interval(counts)
    assert low < miou(counts.sum(axis=0)) < high
    assert 0 <= interval(counts[:2])[0] <= interval(counts[:2])[1] <= 1


def test_a_score_that_hangs_on_one_image_has_no_interval() -> None:
    one = simulated(1, np.random.default_rng(0))
    assert np.isnan(interval(one)).all()
    assert np.isnan(interval(np.concatenate([one, np.zeros_like(one)]))).all()


def test_the_interval_of_a_whole_validation_set_takes_no_time() -> None:
    counts = np.random.default_rng(0).integers(0, 1000, (5000, 19, 19))
    started = time.process_time()
    interval(counts)
    assert time.process_time() - started < 1


def test_classes_of_few_images_are_told() -> None:
    counts = np.zeros((20, 5, 5), np.int64)
    counts[:, 0, 0] = 100
    counts[:3, 1, 1], counts[:10, 2, 0], counts[4, 0, 3] = 5, 5, 5
    # 3 is only predicted, which the mean counts by two rules of three; 4 is nowhere
    assert rare(counts) == {1: 3, 3: 0}
    assert rare(counts, absent="unlabelled") == {1: 3}
    assert rare(counts, absent="zero") == {1: 3, 3: 0, 4: 0}
    assert rare(counts, classes=(0, 1, 2)) == {1: 3}
    assert rare(counts, fewer_than=11) == {1: 3, 2: 10, 3: 0}
    assert rare(counts, fewer_than=3, absent="unlabelled") == {}


@pytest.mark.parametrize("places", [(0.0, 1.0), (0.0, 0.25, 0.5, 0.75, 1.0), (0.1, 0.2, 0.7), (0.0, 0.2, 0.6, 1.0)])
def test_trapezoid_weights_give_numpys_area_over_the_range(places: tuple[float, ...]) -> None:
    values = np.random.default_rng(3).random(len(places))
    expected = np.trapezoid(values, places) / (places[-1] - places[0])
    assert np.dot(trapezoid_weights(places), values) == pytest.approx(expected, abs=1e-15)


def test_the_area_of_three_scores_by_hand() -> None:
    # 0.8 to 0.4 over half the range, 0.4 to 0.2 over the other: (0.6 + 0.3) / 2
    assert np.dot(trapezoid_weights((0.0, 0.5, 1.0)), (0.8, 0.4, 0.2)) == pytest.approx(0.45)


@pytest.mark.parametrize("places", [(), (0.5,), (0.0, 0.0), (0.0, 1.0, 0.5)])
def test_a_line_through_fewer_than_two_places_has_no_area(places: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="two or more places that grow"):
        trapezoid_weights(places)


def test_a_weighted_sum_is_that_of_the_scores_and_of_one_alone_its_interval() -> None:
    rng = np.random.default_rng(4)
    a, b = simulated(30, rng), simulated(30, rng)
    value, low, high = weighted([a, b], [0.25, 0.75])
    assert value == pytest.approx(0.25 * miou(a.sum(0)) + 0.75 * miou(b.sum(0)))
    assert low < value < high
    assert weighted([a], [1.0]) == (miou(a.sum(0)), *interval(a))
    assert weighted([a, a], [0.5, 0.5])[1:] == pytest.approx(interval(a))


def test_the_interval_of_a_sum_leaves_an_image_out_of_all_at_once() -> None:
    rng = np.random.default_rng(5)
    hard = simulated(40, rng)
    apart = [weighted([one], [1.0]) for one in (hard, simulated(40, rng))]
    # the same images: what makes one hard does not cancel, as it does between independent ones
    together = weighted([hard, hard], [0.5, 0.5])
    independent = weighted([hard, simulated(40, rng)], [0.5, 0.5])
    assert together[2] - together[1] == pytest.approx(apart[0][2] - apart[0][1])
    assert independent[2] - independent[1] < together[2] - together[1]


def test_a_weighted_sum_of_other_numbers_of_images_is_refused() -> None:
    a = simulated(3, np.random.default_rng(0))
    with pytest.raises(ValueError, match="differ in shape"):
        weighted([a, a[:2]], [0.5, 0.5])
    assert np.isnan(weighted([a[:1]], [1.0])[1:]).all()
