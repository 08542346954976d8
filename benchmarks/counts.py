"""Count the rows of `dgbench profile` and of the recipes again, and write the shipped file of counts.

    python benchmarks/counts.py

This takes about a minute. Run it and commit its file after an edit of a source that affects counts (`dgbench.cost.counted`).
"""

from __future__ import annotations

from dgbench.cost.counted import SHIPPED, Subject, ship
from dgbench.cost.profile import subjects
from dgbench.recipe import recipe_names


def rows() -> list[Subject]:
    """Return what `dgbench profile` counts without arguments, and the recipes' models at their own sizes."""
    return [*subjects(), *subjects(recipe_names())]


if __name__ == "__main__":
    ship(rows())
    print(f"{SHIPPED}: {SHIPPED.stat().st_size:,} bytes")
