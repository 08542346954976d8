"""Simulates how often a difference between two models is claimed that is not there, and how often one of a point is found.

    python benchmarks/verdicts.py --repeats 2000

Images are those of `interval_coverage.py`; what two models see in one is correlated. Of two models with the same true mIoU a
claim is a false alarm, at the stated 5 %; of one whose true mIoU is a point lower, how often it is found is held against the
power that the comparison states. Ours is `report.statistics.difference`, beside percentiles of the paired bootstrap over images.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from interval_coverage import World, drawn, mean, sums, weighted
from scipy import optimize, stats

from dgbench.report.statistics import difference

SHARED = 0.7**2 + 0.8**2  # variance of what both models see, in World.draw


def own_deviation(correlation: float) -> float:
    """Return the deviation of what a model sees on its own, for this correlation of two models' log odds in an image's class."""
    return float(np.sqrt(SHARED * (1 - correlation) / correlation))


def worse_by(points: float, rare: int, own: float, truth: int) -> float:
    """Return the change of log odds by which the second model's true mIoU is so many points lower."""

    def missing(better: float) -> float:
        world = World(rare, 0.04, np.random.default_rng(1), truth, own=own, better=better)
        return float(np.nanmean(world.truth[1] - world.truth[0])) * 100 + points

    return float(optimize.brentq(missing, -1.0, 0.0, xtol=1e-3))


def simulate(world: World, n: int, repeats: int) -> tuple[int, int, float]:
    """Return how many of the repeats ours and the bootstrap tell apart, and the mean of the power stated for one point."""
    ours, bootstrap, stated = 0, 0, []
    for _ in range(repeats):
        a, b = world.draw(n)
        found = difference([a], [b])
        ours += found.p < 0.05
        stated.append(found.power(0.01))
        weights = drawn(n, world.rng)
        apart = mean(weighted(sums(b), weights)) - mean(weighted(sums(a), weights))
        low, high = np.quantile(apart, (0.025, 0.975))
        bootstrap += not low <= 0 <= high
    return ours, bootstrap, float(np.mean(stated))


def upper(count: int, repeats: int) -> float:
    """Return the upper 95 % bound of a share (Clopper and Pearson 1934)."""
    return float(stats.binomtest(count, repeats).proportion_ci(0.95, "exact").high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--images", type=int, nargs="+", default=[150, 500])
    parser.add_argument("--rare", type=int, nargs="+", default=[0, 4], help="classes of 19 that 4 %% of the images have")
    parser.add_argument("--correlation", type=float, default=0.9)
    parser.add_argument("--truth", type=int, default=100_000, help="images by which a true difference is found")
    given = parser.parse_args()
    begun = time.perf_counter()
    own = own_deviation(given.correlation)
    print("| rare | images | false alarms: ours | upper bound | bootstrap | upper bound | a point found | stated | bootstrap |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for rare in given.rare:
        better = worse_by(1.0, rare, own, given.truth)
        for n in given.images:
            same = World(rare, 0.04, np.random.default_rng(2), 1000, own=own, better=0.0)
            worse = World(rare, 0.04, np.random.default_rng(3), 1000, own=own, better=better)
            false, false_bootstrap, _ = simulate(same, n, given.repeats)
            true, true_bootstrap, stated = simulate(worse, n, given.repeats)
            alarms = [
                text for x in (false, false_bootstrap) for text in (f"{x / given.repeats:.1%}", f"{upper(x, given.repeats):.1%}")
            ]
            found = (f"{true / given.repeats:.1%}", f"{stated:.1%}", f"{true_bootstrap / given.repeats:.1%}")
            print(f"| {rare} | {n} | {' | '.join((*alarms, *found))} |", flush=True)
    print(f"\n{given.repeats} repeats, correlation {given.correlation}, {time.perf_counter() - begun:.0f} s.")


if __name__ == "__main__":
    main()
