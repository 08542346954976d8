"""Confusion matrices, IoU and its uncertainty, by the Cityscapes rule.

One matrix is kept per image; everything else (a domain's mIoU, its interval, a paired comparison) is arithmetic on the
stored matrices. mIoU here means: sum the matrices of all images, IoU = TP / (TP + FP + FN) per class, mean over the
classes that occur in label or prediction. It is not the mean of per-image IoUs, and a class that is predicted but
absent from the labels counts as 0. Papers differ in what they do with absent classes and in which classes they average
(16 or 13 for SYNTHIA): `absent` and `classes` say so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Counts = NDArray[np.int64]
Absent = Literal["skip", "unlabelled", "zero"]

FEW_IMAGES = 5  # with a class in fewer, the interval of the mean may be too short (benchmarks/interval_coverage.md)


def confusion(pred: NDArray[np.integer[Any]] | Tensor, label: NDArray[np.integer[Any]] | Tensor, classes: int) -> Counts:
    """Count pixels by (label, prediction).

    Args:
        pred: integers of any shape, each in 0..classes - 1.
        label: integers of the same shape; values of `classes` and above (255) are ignored, whatever is predicted there.
        classes: K.

    Both may be torch tensors: the counting then runs on their device and only the K x K counts are copied.

    Returns: (K, K) int64, rows are labels, columns predictions.
    Raises: ValueError if shapes differ or a value is out of range.
    """
    if tuple(pred.shape) != tuple(label.shape):
        raise ValueError(f"prediction {tuple(pred.shape)} and label {tuple(label.shape)} differ in shape")
    if isinstance(pred, np.ndarray) and isinstance(label, np.ndarray):
        if not (np.issubdtype(pred.dtype, np.integer) and np.issubdtype(label.dtype, np.integer)):
            raise ValueError(f"prediction ({pred.dtype}) and label ({label.dtype}) must be integers")
        _check_range(int(pred.min(initial=0)), int(pred.max(initial=0)), int(label.min(initial=0)), classes)
        # one extra row collects the ignored pixels: 4x faster than masking them away first
        index = np.minimum(label.astype(np.int64), classes) * classes + pred
        counts = np.bincount(index.reshape(-1), minlength=(classes + 1) * classes)
    else:
        counts = _count_on_device(cast("Tensor", pred), cast("Tensor", label), classes)
    return counts.reshape(classes + 1, classes)[:classes].astype(np.int64)


def _count_on_device(pred: Tensor, label: Tensor, classes: int) -> Counts:
    if pred.is_floating_point() or label.is_floating_point():
        raise ValueError(f"prediction ({pred.dtype}) and label ({label.dtype}) must be integers")
    if pred.numel():
        _check_range(int(pred.min()), int(pred.max()), int(label.min()), classes)
    index = (label.long().clamp(max=classes) * classes + pred).flatten()
    return cast("Counts", index.bincount(minlength=(classes + 1) * classes).cpu().numpy())


def _check_range(lowest: int, highest: int, lowest_label: int, classes: int) -> None:
    if lowest < 0 or highest >= classes:
        raise ValueError(f"predicted classes {lowest}..{highest} are not within 0..{classes - 1}")
    if lowest_label < 0:
        raise ValueError(f"label {lowest_label} is negative; ignored pixels are 255")


def iou(confusion: NDArray[Any], *, absent: Absent = "skip") -> NDArray[np.float64]:
    """Return TP / (TP + FP + FN) per class, (..., K, K) -> (..., K).

    Args:
        absent: which classes have no IoU, that is NaN. `skip`: those in neither label nor prediction (Cityscapes,
            mmsegmentation). `unlabelled`: those without a labelled pixel, even if predicted (detectron2, CLOUDS).
            `zero`: none; those that occur nowhere have 0.
    """
    hits = np.diagonal(confusion, axis1=-2, axis2=-1).astype(np.float64)
    return iou_of(hits, confusion.sum(axis=-1), confusion.sum(axis=-2), absent)


def iou_of(
    hits: NDArray[np.float64], labelled: NDArray[Any], predicted: NDArray[Any], absent: Absent = "skip"
) -> NDArray[np.float64]:
    """Return the IoU per class from the diagonal and the sums of rows and columns of a confusion matrix, (..., K) each."""
    union = labelled + predicted - hits
    counted = labelled > 0 if absent == "unlabelled" else union > 0
    nothing = 0.0 if absent == "zero" else np.nan
    result: NDArray[np.float64] = np.divide(hits, union, out=np.full(hits.shape, nothing), where=counted)
    return result


def miou(confusion: NDArray[Any], *, classes: Sequence[int] | None = None, absent: Absent = "skip") -> float:
    """Return the mean IoU in 0..1 of one (K, K) matrix; NaN if no class has an IoU.

    Args:
        classes: train ids over which the mean runs; None: all. The others still count as wrong predictions and labels.
        absent: as `iou`'s.

    >>> round(miou(np.array([[2, 0, 1], [0, 1, 0], [0, 0, 0]])), 4)   # IoUs 2/3, 1, 0
    0.5556
    """
    return float(_mean(confusion, classes, absent))


def interval(
    per_image: NDArray[Any], *, level: float = 0.95, classes: Sequence[int] | None = None, absent: Absent = "skip"
) -> tuple[float, float]:
    """Return the interval of the mIoU over other images of the same domain: a jackknife that leaves out one image at a time.

    The standard error is that of the scores without image i (Tukey 1958), the quantile is Student's, with Satterthwaite's
    degrees of freedom from the variance of their squares (1946): they are few if a class occurs in two images only, however
    many images there are. `benchmarks/interval_coverage.py` measures its coverage and that of other methods.

    It describes how much the score varies with other images of the same domain; it does not cover other training runs, nor
    the IoU of a class that occurs in no image (see `rare`).

    Args:
        per_image: (n, K, K) counts, one matrix per image.
        level: the interval's coverage, 0.95 for 2.5 % on each side.
        classes, absent: as `miou`'s.

    Returns: (low, high) in 0..1; (NaN, NaN) for fewer than two images, or if a score depends on a single one.
    """
    if len(per_image) < 2:
        return float("nan"), float("nan")
    score = miou(per_image.sum(axis=0), classes=classes, absent=absent)
    half = _half_width(_without_each(per_image, classes, absent), level)
    return _within(score - half, 0.0, 1.0), _within(score + half, 0.0, 1.0)


def weighted(
    matrices: Sequence[NDArray[Any]],
    weights: Sequence[float],
    *,
    level: float = 0.95,
    classes: Sequence[int] | None = None,
    absent: Absent = "skip",
) -> tuple[float, float, float]:
    """Return a weighted sum of mIoUs of the same images seen in several ways, with its interval, as (sum, low, high).

    Images are left out of all at once, as in `report.statistics.difference`.

    Args:
        matrices: (n, K, K) counts each, image i of one is image i of the others.
        weights: positive numbers whose sum is 1: the result is in 0..1.
        level, classes, absent: as `interval`'s.

    Raises: ValueError if the shapes or the numbers of matrices and weights differ.
    """
    if len({one.shape for one in matrices}) != 1:
        raise ValueError(f"matrices differ in shape: {', '.join(sorted({str(one.shape) for one in matrices}))}")
    pairs = list(zip(weights, matrices, strict=True))
    total = math.fsum(weight * miou(one.sum(axis=0), classes=classes, absent=absent) for weight, one in pairs)
    if len(matrices[0]) < 2:
        return total, float("nan"), float("nan")
    without = np.sum([weight * _without_each(one, classes, absent) for weight, one in pairs], axis=0)
    half = _half_width(without, level)
    return total, _within(total - half, 0.0, 1.0), _within(total + half, 0.0, 1.0)


def trapezoid_weights(places: Sequence[float]) -> tuple[float, ...]:
    """Return by how much each value at growing places enters the mean height of the line through them; their sum is 1.

    Raises: ValueError for fewer than two places, or places that do not grow.
    """
    steps = np.diff(places)
    if len(places) < 2 or not (steps > 0).all():
        raise ValueError(f"a line needs two or more places that grow, got {', '.join(f'{place:g}' for place in places)}")
    halves = np.concatenate([[0.0], steps, [0.0]]) / 2
    return tuple(float(value) for value in (halves[1:] + halves[:-1]) / (places[-1] - places[0]))


def rare(
    per_image: NDArray[Any], *, fewer_than: int = FEW_IMAGES, classes: Sequence[int] | None = None, absent: Absent = "skip"
) -> dict[int, int]:
    """Return the classes of the mIoU that are labelled in fewer than so many images, and the number of these images.

    A few images say little about the IoU on other images: below `FEW_IMAGES`, the interval's coverage is lower than its
    level. A class in no image at all is in the result if the mean counts it (predicted somewhere, or `absent="zero"`).

    Args:
        per_image: (n, K, K) counts, one matrix per image.
        classes, absent: as `miou`'s.
    """
    images = (per_image.sum(axis=2) > 0).sum(axis=0)
    counted = ~np.isnan(iou(per_image.sum(axis=0), absent=absent))
    among = range(per_image.shape[1]) if classes is None else classes
    return {int(k): int(images[k]) for k in among if counted[k] and images[k] < fewer_than}


def _without_each(per_image: NDArray[Any], classes: Sequence[int] | None, absent: Absent) -> NDArray[np.float64]:
    """Return the mIoU without image i, (n,)."""
    return _mean(per_image.sum(axis=0) - per_image, classes, absent)


def _within(value: float, low: float, high: float) -> float:
    """Return the value clipped to a range; NaN stays NaN."""
    return float(np.clip(value, low, high))


def jackknife(without: NDArray[np.float64]) -> tuple[float, float]:
    """Return a statistic's variance from its values without each of n >= 2 images, (n,), and the degrees of freedom of it.

    The variance of a sum of squares gives the degrees of freedom; those of normal numbers are about n.
    """
    n = len(without)
    squares = (without - without.mean()) ** 2
    total = float(squares.sum())
    if total == 0:
        return 0.0, n - 1.0
    spread = float((squares**2).sum()) - total**2 / n
    freedom = min(n - 1.0, 2 * total**2 / spread) if spread > 0 else n - 1.0
    return (n - 1) / n * total, freedom


def _half_width(without: NDArray[np.float64], level: float) -> float:
    """Return half the jackknife interval's width from a statistic without each of n >= 2 images, (n,)."""
    from scipy import special

    variance, freedom = jackknife(without)
    return float(special.stdtrit(freedom, 0.5 + level / 2)) * math.sqrt(variance)


def _mean(confusion: NDArray[Any], classes: Sequence[int] | None, absent: Absent) -> NDArray[np.float64]:
    """Return the mean IoU over the classes that have one, (..., K, K) -> (...); NaN where none has (and no warning)."""
    return mean_of_classes(iou(confusion, absent=absent), classes)


def mean_of_classes(values: NDArray[np.float64], classes: Sequence[int] | None = None) -> NDArray[np.float64]:
    """Return the mean over the classes that have an IoU, (..., K) -> (...); NaN where none has (and no warning)."""
    values = values if classes is None else values[..., list(classes)]
    present = ~np.isnan(values)
    # summed class by class, as the Cityscapes scripts do: numpy's own order differs from theirs in the last bit
    sums = np.cumsum(np.where(present, values, 0.0), axis=-1)[..., -1]
    return np.asarray(np.divide(sums, present.sum(axis=-1), out=np.full(values.shape[:-1], np.nan), where=present.any(axis=-1)))
