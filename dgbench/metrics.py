"""Confusion matrices, IoU and its uncertainty, by the Cityscapes rule.

One matrix is kept per image; everything else (a domain's mIoU, its interval, a paired comparison) is arithmetic on the
stored matrices. mIoU here means: sum the matrices of all images, IoU = TP / (TP + FP + FN) per class, mean over the
classes that occur in label or prediction. It is not the mean of per-image IoUs, and a class that is predicted but
absent from the labels counts as 0. Papers differ in what they do with absent classes and in which classes they average
(16 or 13 for SYNTHIA): `absent` and `classes` say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Counts = NDArray[np.int64]
Absent = Literal["skip", "unlabelled", "zero"]


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
    labelled = confusion.sum(axis=-1)
    union = labelled + confusion.sum(axis=-2) - hits
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


def bootstrap(
    per_image: NDArray[Any], *, resamples: int = 1000, seed: int = 0, level: float = 0.95,
    classes: Sequence[int] | None = None, absent: Absent = "skip",
) -> tuple[float, float]:  # fmt: skip
    """Return the percentile interval of the mIoU when images are drawn anew with replacement.

    It says how much the score would move with other images of the same domain; it does not cover other training runs.

    Args:
        per_image: (n, K, K) counts, one matrix per image.
        level: the interval's coverage, 0.95 for 2.5 % on each side.
        classes, absent: as `miou`'s.

    Returns: (low, high) in 0..1; (NaN, NaN) for fewer than two images.
    """
    if len(per_image) < 2:
        return float("nan"), float("nan")
    return _interval(_resampled(per_image, _weights(len(per_image), resamples, seed), classes, absent), level)


def paired_difference(
    a: NDArray[Any], b: NDArray[Any], *, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float, float]:
    """Return mIoU(b) - mIoU(a) on the same images, with its percentile interval, as (difference, low, high).

    Both sides see the same resampled images, so what makes an image hard for both cancels.

    Args:
        a, b: (n, K, K) counts of two models, image i of one is image i of the other.

    Raises: ValueError if the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"paired matrices differ in shape: {a.shape} and {b.shape}")
    difference = miou(b.sum(axis=0)) - miou(a.sum(axis=0))
    if len(a) < 2:
        return difference, float("nan"), float("nan")
    weights = _weights(len(a), resamples, seed)
    return difference, *_interval(_resampled(b, weights) - _resampled(a, weights), level)


def _weights(n: int, resamples: int, seed: int) -> NDArray[np.float64]:
    """Return how often each image is drawn in each resample, (resamples, n)."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1.0 / n), size=resamples).astype(np.float64)


def _resampled(per_image: NDArray[Any], weights: NDArray[np.float64], classes: Sequence[int] | None = None,
               absent: Absent = "skip") -> NDArray[np.float64]:  # fmt: skip
    """Return the mIoU of every resample, (resamples,)."""
    n, k, _ = per_image.shape
    # float64 holds every sum exactly: counts stay far below 2^53
    summed = weights @ per_image.reshape(n, k * k).astype(np.float64)
    return _mean(summed.reshape(-1, k, k), classes, absent)


def _interval(values: NDArray[np.float64], level: float) -> tuple[float, float]:
    tail = (1.0 - level) / 2
    low, high = np.nanquantile(values, (tail, 1.0 - tail))
    return float(low), float(high)


def _mean(confusion: NDArray[Any], classes: Sequence[int] | None, absent: Absent) -> NDArray[np.float64]:
    """Return the mean IoU over the classes that have one, (..., K, K) -> (...); NaN where none has (and no warning)."""
    values = iou(confusion, absent=absent)
    values = values if classes is None else values[..., list(classes)]
    present = ~np.isnan(values)
    # summed class by class, as the Cityscapes scripts do: numpy's own order differs from theirs in the last bit
    sums = np.cumsum(np.where(present, values, 0.0), axis=-1)[..., -1]
    return np.asarray(np.divide(sums, present.sum(axis=-1), out=np.full(values.shape[:-1], np.nan), where=present.any(axis=-1)))
