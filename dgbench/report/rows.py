"""Types of the leaderboard: scores, rows, groups of comparable rows, and the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Score:
    """One mIoU in 0..1 with its 95 % interval."""

    miou: float
    low: float | None = None
    high: float | None = None
    n_images: int | None = None
    partial: bool = False  # not the images of the published split, no more and no fewer: shown, never ranked or averaged
    deviation: float | None = None  # sample standard deviation over seeds, of a row of several
    iou: tuple[float | None, ...] = ()  # by class, only where it was asked for
    conditions: Mapping[str, float | None] = field(default_factory=dict)  # condition -> mIoU of its images, likewise

    @property
    def half(self) -> float | None:
        """Half the interval's width."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


@dataclass(frozen=True, slots=True)
class Shift:
    """How much is lost from the source's validation split to unseen targets; all in 0..1, None where a score is missing."""

    gap: float | None = None  # source val less the mean over the targets
    retention: float | None = None  # the mean over the targets over source val
    spread: float | None = None  # the highest target less the lowest
    worst: str = ""  # the target with the lowest score


@dataclass(frozen=True, slots=True)
class Row:
    """One model: checkpoints of ours that differ in the seed alone, a recipe's reference result, or a line of a paper's table."""

    kind: Literal["run", "reference", "published"]
    method: str
    variant: str
    recipe: str
    recipe_hash: str
    origin: str  # run folder (of several seeds the newest), where the reference comes from, or paper and table
    created: str
    source_score: Score | None  # on the source's own validation split
    scores: Mapping[str, Score | None]  # by target, in the order of the group's targets
    mean: Score | None = None  # over all targets, only if each is there in full
    rank: int | None = None
    note: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)  # those that differ from rows of the same method and recipe
    source_images: int = 0  # number of training images and that of its source: only if they differ
    source_available: int = 0
    shift: Shift = Shift()
    seeds: int = 1  # training runs
    runs: tuple[str, ...] = ()  # their folders, newest first
    commits: tuple[str, ...] = ()  # of the code that scored it; `+` behind one that was changed
    weights: tuple[str, ...] = ()  # published ones that its training started from: tower, file and sha256
    untested: str = ""  # why its rank rests on the order of the means, and on no paired comparison; "": it has none, or it does
    test_size: str = ""  # of a published row: the image size that it was tested at, as far as is known
    reported_by: Literal["", "own", "other"] = ""  # of a published row: the method's own paper or repository, or another work
    printed_mean: bool = True  # of a published row: its mean was read, too, and not computed of the others
    digits: int = 2  # of a published row, in percent after the point

    @property
    def partial_source(self) -> bool:
        """Whether it was trained on other images than its source's (usually a part): shown, but not ranked."""
        return self.source_images != self.source_available


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that may be compared with each other."""

    source: str
    targets: tuple[str, ...]
    protocol: str
    protocol_hashes: tuple[str, ...]
    rows: tuple[Row, ...]
    other_targets: tuple[str, ...] = ()  # scored by some row, but in no table
    protocol_digest: str = ""  # of the protocol alone; "" for published rows and records from before it was kept
    rendered: bool = False  # the targets are exports of rendered scenes, not the published sets
    source_rendered: bool = False
    title: str = ""  # of a published table, what sets it apart
    test_sizes: Mapping[str, str] = field(default_factory=dict)  # of a published table: name -> what it means


@dataclass(frozen=True, slots=True)
class Leaderboard:
    """Own and reference rows by group, and the published tables."""

    groups: tuple[Group, ...]
    published: tuple[Group, ...]
