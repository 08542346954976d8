"""Time `render_many`: images a second of pretraining scenes with captions, at 128x256.

    python benchmarks/pairs.py                        # one process
    python benchmarks/pairs.py --workers 16 --n 4096  # and a pool, wall-clock time with its start

One process is measured in its own processor time, in which what else the machine does should not count.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from importlib import metadata

from dgbench.data.pretraining import render_many

REPEATS = 3


def rate(count: int, boxes: int) -> float:
    """Return the median of images a second of one process over `REPEATS` sets of scenes."""
    rates = []
    for repeat in range(REPEATS):
        start = time.process_time()
        render_many(range(repeat * count, (repeat + 1) * count), boxes=boxes, workers=1)
        rates.append(count / (time.process_time() - start))
    return statistics.median(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=256, help="images of each measurement")
    parser.add_argument("--workers", type=int, default=1, help="processes of the pool")
    given = parser.parse_args()
    render_many(range(8), workers=1)  # builds the atlas
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("numpy", "opencv-python-headless"))
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, {versions}")
    for boxes in (0, 4, 8):
        print(f"one process, {boxes} parts: {rate(given.n, boxes):.1f} images a second of processor time")
    if given.workers > 1:
        start = time.perf_counter()
        render_many(range(given.n), boxes=4, workers=given.workers)
        wall = time.perf_counter() - start
        print(f"{given.workers} processes, 4 parts: {given.n / wall:.1f} images a second of wall-clock time")


if __name__ == "__main__":
    main()
