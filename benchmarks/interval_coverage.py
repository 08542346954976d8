"""Simulate the coverage and width of 95 % intervals of the mIoU over images, by method.

    python benchmarks/interval_coverage.py --repeats 500

Images are drawn from a model: a class occurs in one with its own probability (1 to 0.5 for common classes, `--present`
for rare ones), on a log-normal number of pixels; it is recognised with a probability that varies by image and by class in
the image; its other pixels go to a few classes of that image. The truth is the mIoU of 200,000 images, over all classes. In a
few images rare ones may be missing altogether, and the score is the mean over those that occur: of the second coverage, the
truth is over the classes that the sample has labels of. The third is of the difference of two models on the same images.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy import special

from dgbench import metrics
from dgbench.report.statistics import difference

K = 19
LEVEL = 0.95
RESAMPLES = 500
Array = NDArray[np.float64]
Interval = tuple[float, float]


# ---- images


class World:
    """A distribution of images, and its true mIoU."""

    def __init__(
        self, rare: int, present: float, rng: np.random.Generator, images: int, *, own: float = 0.6, better: float = 0.1
    ) -> None:
        """Args: own: deviation of what a model sees of its own in an image's class.  better: of the second model, in log odds."""
        common = K - rare
        self.rng, self.own, self.better = rng, own, better
        self.present = np.concatenate([np.linspace(1.0, 0.5, common), np.full(rare, present)])
        self.pixels = np.log(np.concatenate([np.geomspace(3e4, 1e3, common), np.geomspace(8e3, 8e2, max(rare, 1))[:rare]]))
        self.ease = np.concatenate([np.linspace(2.6, 0.3, common), np.linspace(1.0, -0.8, max(rare, 1))[:rare]])
        taken = np.exp(self.pixels) * self.present + 20
        self.taken = taken / taken.sum()  # share of wrong predictions that fall on each class
        totals = [self.draw(images // 10).sum(axis=1) for _ in range(10)]  # as much as memory takes at a time
        self.truth = [metrics.iou(sum(total[model] for total in totals)) for model in (0, 1)]

    def draw(self, n: int) -> NDArray[np.int64]:
        """Return (2, n, K, K): the matrices of two models, the second a little better, on the same n images."""
        rng = self.rng
        there = rng.random((n, K)) < self.present
        labelled = np.where(there, 1 + rng.lognormal(self.pixels, 1.0, (n, K)), 0).astype(np.int64)
        image, place = rng.normal(0, 0.7, (n, 1)), rng.normal(0, 0.8, (n, K))
        taken = rng.gamma(0.3 * K * self.taken, 1.0, (n, K)) + 1e-12
        counts = np.zeros((2, n, K, K), np.int64)
        for model, better in enumerate((0.0, self.better)):
            odds = self.ease + better + image + place + rng.normal(0, self.own, (n, K))
            hits = rng.binomial(labelled, 1 / (1 + np.exp(-odds)))
            misses = (labelled - hits)[..., None] * (taken / taken.sum(axis=1, keepdims=True))[:, None]
            counts[model] = misses  # cut off to whole pixels; what falls on the class itself is a hit
            counts[model, :, np.arange(K), np.arange(K)] += hits.T
        return counts


# ---- methods: hits, labels and predictions of each image, (n, 3, K), to an interval


def sums(counts: NDArray[np.int64]) -> Array:
    """Reduce (n, K, K) to (n, 3, K), all that an IoU needs."""
    return np.stack([np.diagonal(counts, axis1=1, axis2=2), counts.sum(axis=2), counts.sum(axis=1)], axis=1).astype(np.float64)


def iou(total: Array) -> Array:
    hits, union = total[..., 0, :], total[..., 1, :] + total[..., 2, :] - total[..., 0, :]
    return np.divide(hits, union, out=np.full(hits.shape, np.nan), where=union > 0)


def mean(total: Array) -> Array:
    return np.asarray(np.nanmean(iou(total), axis=-1))


def weighted(x: Array, weights: NDArray[np.floating]) -> Array:
    return (weights @ x.reshape(len(x), -1)).reshape(-1, 3, K)


def drawn(n: int, rng: np.random.Generator, size: int = RESAMPLES) -> Array:
    return rng.multinomial(n, np.full(n, 1 / n), size=size).astype(np.float64)


def between(values: Array, low: float, high: float) -> Interval:
    found = np.nanquantile(values, np.clip((low, high), 0, 1))
    return float(found[0]), float(found[1])


def quantile(freedom: float) -> float:
    return float(special.stdtrit(freedom, (1 + LEVEL) / 2))


def around(score: float, half: float) -> Interval:
    return score - half, score + half


def percentile(x: Array, rng: np.random.Generator) -> Interval:
    return between(mean(weighted(x, drawn(len(x), rng))), (1 - LEVEL) / 2, (1 + LEVEL) / 2)


def bias_corrected(x: Array, rng: np.random.Generator) -> Interval:
    """Return the BCa interval (Efron 1987)."""
    values, score, without = mean(weighted(x, drawn(len(x), rng))), mean(x.sum(axis=0)), mean(x.sum(axis=0) - x)
    normal = NormalDist()
    below = float(np.mean(values < score) + np.mean(values == score) / 2)
    z0 = normal.inv_cdf(min(max(below, 1 / RESAMPLES), 1 - 1 / RESAMPLES))
    away = without.mean() - without
    a = float((away**3).sum() / max(6 * (away**2).sum() ** 1.5, 1e-30))
    tails = [z0 + (z0 + z) / (1 - a * (z0 + z)) for z in (normal.inv_cdf((1 - LEVEL) / 2), normal.inv_cdf((1 + LEVEL) / 2))]
    return between(values, normal.cdf(tails[0]), normal.cdf(tails[1]))


def bayesian(x: Array, rng: np.random.Generator) -> Interval:
    """Return percentiles under Dirichlet weights (Rubin 1981), which never remove a class."""
    weights = rng.exponential(size=(RESAMPLES, len(x)))
    return between(mean(weighted(x, weights)), (1 - LEVEL) / 2, (1 + LEVEL) / 2)


def linear(x: Array, weights: Array | None = None) -> tuple[Array, Array]:
    """Return the mIoU of each weighting, (R,), and its standard error by the delta method, (R,)."""
    n = len(x)
    weights = np.ones((1, n)) if weights is None else weights
    total, union = weighted(x, weights), x[:, 1] + x[:, 2] - x[:, 0]
    of_class = iou(total)
    unions = total[:, 1] + total[:, 2] - total[:, 0]
    share = np.divide(1.0, unions, out=np.zeros_like(unions), where=unions > 0)
    influence = (share @ x[:, 0].T - (np.nan_to_num(of_class) * share) @ union.T) / (unions > 0).sum(axis=1, keepdims=True)
    return np.nanmean(of_class, axis=1), np.sqrt((weights * influence**2).sum(axis=1) * n / (n - 1))


def delta_method(x: Array, rng: np.random.Generator) -> Interval:
    score, error = linear(x)
    return around(float(score[0]), quantile(len(x) - 1) * float(error[0]))


def studentised(x: Array, rng: np.random.Generator) -> Interval:
    score, error = linear(x)
    values, errors = linear(x, drawn(len(x), rng))
    low, high = between((values - score) / np.maximum(errors, 1e-12), (1 - LEVEL) / 2, (1 + LEVEL) / 2)
    return float(score[0] - high * error[0]), float(score[0] - low * error[0])


def pooled(x: Array, rng: np.random.Generator) -> Interval:
    """Apply the delta method with pooled variances: rare classes use the others' variance by image, scaled by IoU (1 - IoU)."""
    n, total = len(x), x.sum(axis=0)
    of_class, union = iou(total), x[:, 1] + x[:, 2] - x[:, 0]
    seen = ~np.isnan(of_class)
    influence = (x[:, 0] - of_class * union)[:, seen] / union.sum(axis=0)[seen]
    values, images = of_class[seen], (x[:, 1] > 0).sum(axis=0)[seen].astype(np.float64)
    own, count = (influence**2).sum(axis=0), seen.sum()
    spread, weight = values * (1 - values), np.maximum(images - 1, 0)
    single = own * images**2 / np.maximum(images - 1, 0.5)  # the variance of one image
    usable = (images > 1) & (spread > 0)
    factor = (weight * single / np.where(spread > 0, spread, 1))[usable].sum() / max(weight[usable].sum(), 1)
    guess = (values * images + values.mean()) / (images + 1)
    shrunk = (weight * single + 2 * factor * guess * (1 - guess)) / (weight + 2) / np.maximum(images, 1)
    square = ((influence.sum(axis=1) / count) ** 2).sum() * n / (n - 1) + np.maximum(shrunk - own, 0).sum() / count**2
    freedom = min(shrunk.sum() ** 2 / (shrunk**2 / (weight + 2)).sum(), n - 1)
    return around(float(values.mean()), quantile(max(freedom, 1)) * float(np.sqrt(square)))


def jackknife(x: Array, rng: np.random.Generator) -> Interval:
    n, without = len(x), mean(x.sum(axis=0) - x)
    error = np.sqrt((n - 1) * without.var())
    return around(float(mean(x.sum(axis=0))), quantile(n - 1) * float(error))


def calibrated(x: Array, rng: np.random.Generator) -> Interval:
    """Apply the percentile method at levels that are calibrated by a bootstrap of the bootstrap (Loh 1987)."""
    n, score = len(x), float(mean(x.sum(axis=0)))
    places = []
    for weights in drawn(n, rng, 100):
        again = rng.multinomial(n, weights / n, size=60).astype(np.float64)
        places.append(float(np.mean(mean(weighted(x, again)) <= score)))
    low, high = np.quantile(places, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return between(mean(weighted(x, drawn(n, rng))), low, high)


METHODS: dict[str, Callable[[Array, np.random.Generator], Interval]] = {
    "percentile bootstrap": percentile,
    "BCa": bias_corrected,
    "Bayesian bootstrap": bayesian,
    "calibrated bootstrap": calibrated,
    "studentised bootstrap": studentised,
    "delta method, t": delta_method,
    "delta method, pooled variances": pooled,
    "jackknife, t of n - 1": jackknife,
}
OURS = "jackknife, Satterthwaite: `metrics.interval`"


# ---- what is counted


def simulate(world: World, n: int, repeats: int, names: list[str]) -> dict[str, tuple[float, float, float, float]]:
    """Return by method: coverage of the mIoU, of that over classes seen, of a difference (ours alone); the median width."""
    inside: dict[str, list[tuple[bool, bool, bool, float]]] = defaultdict(list)
    truth = np.nanmean(world.truth[0])
    for _ in range(repeats):
        counts = world.draw(n)
        x, labelled = sums(counts[0]), counts[0].sum(axis=(0, 2)) > 0
        seen = np.nanmean(world.truth[0][labelled])
        for name in names:
            low, high = METHODS[name](x, world.rng)
            inside[name].append((bool(low <= truth <= high), bool(low <= seen <= high), False, high - low))
        low, high = metrics.interval(counts[0])
        found_ = difference([counts[0]], [counts[1]])
        apart = bool(found_.low <= np.nanmean(world.truth[1] - world.truth[0]) <= found_.high)
        inside[OURS].append((bool(low <= truth <= high), bool(low <= seen <= high), apart, high - low))
    found = {}
    for name, rows in inside.items():
        all_, of_seen, differences, widths = zip(*rows, strict=True)
        found[name] = float(np.mean(all_)), float(np.mean(of_seen)), float(np.mean(differences)), float(np.median(widths))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=500, help="samples of each size")
    parser.add_argument("--images", type=int, nargs="+", default=[20, 50, 100, 200, 500])
    parser.add_argument("--rare", type=int, nargs="+", default=[0, 4, 8], help="classes of 19 that are rare")
    parser.add_argument("--present", type=float, default=0.04, help="share of images that have a rare class")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="NAME")
    parser.add_argument("--truth", type=int, default=200_000, help="images whose mIoU is the truth")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print("| rare | images | method | holds the mIoU | of the classes seen | a difference | width |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    begun = time.perf_counter()
    for rare in given.rare:
        world = World(rare, given.present, np.random.default_rng(given.seed), given.truth)
        for n in given.images:
            for name, (all_, seen, apart, width) in simulate(world, n, given.repeats, given.methods).items():
                difference = f"{apart:.1%}" if name == OURS else ""
                print(f"| {rare} | {n} | {name} | {all_:.1%} | {seen:.1%} | {difference} | {width:.3f} |", flush=True)
    print(f"\n{given.repeats} samples each, rare classes in {given.present:.0%} of images, {time.perf_counter() - begun:.0f} s.")


if __name__ == "__main__":
    main()
