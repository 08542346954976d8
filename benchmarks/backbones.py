"""Backbone tables: write the shipped counts, or measure every row on a GPU.

    python benchmarks/backbones.py --counts
    python benchmarks/backbones.py --out FOLDER

The first counts all networks anew and writes dgbench/cost/backbones.json.gz, in about two minutes; run it and commit the file
after an edit of a source that `dgbench.cost.backbone_counts` names. The second needs a GPU: it measures every row, every trunk,
and trunks over image sizes, and writes both tables as Markdown (with versions), as JSON and as a plot: six files.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dgbench import render
from dgbench.cost.backbone_counts import SHIPPED, all_nets, ship
from dgbench.cost.backbone_tables import TABLES
from dgbench.cost.backbones import backbone_table


def measure(out: Path, passes: int) -> None:
    """Measure both tables, and write their files."""
    out.mkdir(parents=True, exist_ok=True)
    sweep = None
    for name in TABLES:
        found = backbone_table(name, render.progress(quiet=True), passes=passes, sweep=sweep)
        sweep = found.sweep
        if found.hardware is None:
            sys.exit(f"nothing was measured: {found.unmeasured}")
        render.show(found, "markdown", out / f"backbones-{name}.md")
        render.show(found, "json", out / f"backbones-{name}.json")
        render.draw_backbones(found, out / f"backbones-{name}.png")


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", action="store_true", help="write the shipped counts")
    parser.add_argument("--out", type=Path, help="folder for the measured tables")
    parser.add_argument("--passes", type=int, default=1, help="how often all is built and timed")
    given = parser.parse_args()
    if given.counts:
        ship(all_nets())
        print(f"{SHIPPED}: {SHIPPED.stat().st_size:,} bytes")
    if given.out is not None:
        measure(given.out, given.passes)
    if not given.counts and given.out is None:
        parser.error("give --counts or --out FOLDER")


if __name__ == "__main__":
    main()
