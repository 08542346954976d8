"""Confusion matrices, IoU and intervals against the Cityscapes scripts and against plain loops."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from dgbench.metrics import bootstrap, confusion, iou, miou, paired_difference

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


def test_equal_to_cityscapesscripts_on_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Write label-id PNGs as Cityscapes has them and let the official script score them."""
    evaluation = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    labels = pytest.importorskip("cityscapesscripts.helpers.labels")
    to_id = np.array([labels.trainId2label[k].id for k in range(19)], np.uint8)
    rng = np.random.default_rng(3)
    # a train is nowhere, a truck only predicted, and ids outside the evaluated ones are ignored
    present = [k for k in range(19) if k not in (14, 16)]
    total = np.zeros((19, 19), np.int64)
    predictions, truths = [], []
    for number in range(3):
        truth_id = rng.choice(to_id[present], (64, 128))
        truth_id[rng.random(truth_id.shape) < 0.2] = rng.choice([0, 1, 4, 9, 15, 30])
        train_id = np.array([labels.id2label[i].trainId for i in range(34)])
        label = train_id[truth_id].astype(np.uint8)
        keep = rng.random(label.shape) < 0.7
        pred = np.where(keep & (label != 255), label, rng.choice([*present, 14], label.shape)).astype(np.uint8)
        total += confusion(pred, label, 19)
        name = f"city_{number:06d}_000019"
        for array, suffix, paths in ((truth_id, "_gtFine_labelIds", truths), (to_id[pred], "_pred", predictions)):
            path = tmp_path / f"{name}{suffix}.png"
            Image.fromarray(array.astype(np.uint8)).save(path)
            paths.append(str(path))
    official = Namespace(
        evalInstLevelScore=False, evalPixelAccuracy=False, evalLabels=[], bold="", nocol="", colorized=False,
        quiet=True, JSONOutput=False, avgClassSize={}, printRow=5, normalized=True,
    )  # fmt: skip
    scores = evaluation.evaluateImgLists(predictions, truths, official)
    capsys.readouterr()
    ours = iou(total)
    for k in range(19):
        expected = scores["classScores"][labels.trainId2label[k].name]
        assert ours[k] == pytest.approx(expected, abs=1e-12, nan_ok=True), labels.trainId2label[k].name
    assert ours[14] == 0.0
    assert np.isnan(ours[16])
    assert miou(total) == pytest.approx(scores["averageScoreClasses"], abs=1e-12)


def simulated(n_images: int, rng: np.random.Generator, accuracy: float = 0.8) -> NDArray[np.int64]:
    """Draw images whose difficulty varies, (n, 2, 2) counts of 100 + 100 pixels."""
    difficulty = rng.beta(20 * accuracy, 20 * (1 - accuracy), (n_images, 2))
    hits = rng.binomial(100, difficulty)
    counts = np.zeros((n_images, 2, 2), np.int64)
    counts[:, 0, 0], counts[:, 0, 1] = hits[:, 0], 100 - hits[:, 0]
    counts[:, 1, 1], counts[:, 1, 0] = hits[:, 1], 100 - hits[:, 1]
    return counts


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(11)
    truth = miou(simulated(200_000, rng).sum(axis=0))
    covered = 0
    for trial in range(300):
        low, high = bootstrap(simulated(60, rng), resamples=300, seed=trial)
        covered += low <= truth <= high
    # 95 % of 300 trials, give or take four standard errors and the percentile method's small-sample shortfall
    assert 0.89 <= covered / 300 <= 0.99


def test_bootstrap_agrees_with_drawing_images_one_by_one() -> None:
    rng = np.random.default_rng(5)
    counts = simulated(40, rng)
    values = [miou(counts[rng.integers(0, 40, 40)].sum(axis=0)) for _ in range(4000)]
    low, high = bootstrap(counts, resamples=4000)
    assert low == pytest.approx(np.quantile(values, 0.025), abs=0.003)
    assert high == pytest.approx(np.quantile(values, 0.975), abs=0.003)


def test_bootstrap_repeats_itself_and_brackets_the_score() -> None:
    counts = simulated(50, np.random.default_rng(1))
    assert bootstrap(counts) == bootstrap(counts)
    low, high = bootstrap(counts)
    assert low < miou(counts.sum(axis=0)) < high


def test_one_image_has_no_interval() -> None:
    assert np.isnan(bootstrap(simulated(1, np.random.default_rng(0)))).all()


def test_paired_difference_sees_what_unpaired_intervals_do_not() -> None:
    rng = np.random.default_rng(2)
    a = simulated(100, rng)
    b = a.copy()
    b[:, 0, 0] += np.minimum(1, b[:, 0, 1])
    b[:, 0, 1] -= np.minimum(1, b[:, 0, 1])
    difference, low, high = paired_difference(a, b)
    assert difference == pytest.approx(miou(b.sum(axis=0)) - miou(a.sum(axis=0)))
    assert 0 < low < difference < high
    assert bootstrap(a)[1] > bootstrap(b)[0]


def test_paired_difference_of_equals_is_nothing() -> None:
    counts = simulated(30, np.random.default_rng(4))
    assert paired_difference(counts, counts) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="differ in shape"):
        paired_difference(counts, counts[:10])
