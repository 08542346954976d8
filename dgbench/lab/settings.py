"""Selective copying (Gu & Dao 2023, section 4.1.1, table 1): rows, published figures, and settings. Needs no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from dgbench.errors import DgbenchError

_LENGTH, _VOCAB, _MEMORIZE, _STEPS, _DEPTH, _BATCH, _LR = 4096, 16, 16, 400_000, 2, 64, 1e-4  # of the published figures


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the paper's table: a block around a layer, and its accuracy there in %."""

    architecture: str
    layer: str
    published: float
    confirmed: bool  # False: not read in the paper's table itself

    @property
    def name(self) -> str:
        """As `--rows` takes it."""
        return f"{self.architecture.replace(' ', '')}-{self.layer}"


ROWS = (
    Row("no gate", "s4", 18.3, True),
    Row("no gate", "s6", 97.0, True),
    Row("h3", "s4", 57.0, False),
    Row("h3", "hyena", 30.1, False),
    Row("h3", "s6", 99.7, False),
    Row("mamba", "s4", 56.4, True),
    Row("mamba", "hyena", 28.4, True),
    Row("mamba", "s6", 99.8, True),
)


def row_of(name: str) -> Row:
    """Return the row of this name.

    Raises: DgbenchError for another name.
    """
    for row in ROWS:
        if row.name == name:
            return row
    raise DgbenchError(f"no row `{name}`", f"choose from {', '.join(row.name for row in ROWS)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What decides the numbers of a training, beside its row and seed. The defaults are the paper's."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"strict": True, "allow_inf_nan": False, "extra": "forbid"}

    length: int = _LENGTH  # symbols among which the tokens are hidden, without them
    total: bool = False  # `length` is that of the whole sequence, with tokens and markers
    vocab: int = _VOCAB  # with noise and marker
    memorize: int = _MEMORIZE
    steps: int = _STEPS
    depth: int = _DEPTH  # blocks
    batch: int = _BATCH
    lr: float = _LR
    s4: str = "s4d"  # s4d: diagonal; s4: diagonal plus low rank
    glu: bool = True  # behind S4 without a gate, project by a gated linear unit
    rows: tuple[str, ...] = field(default_factory=lambda: tuple(row.name for row in ROWS))
    seeds: tuple[int, ...] = (0, 1, 2)
    sequences: int = 1024  # of the fixed set on which accuracy is measured
    log_every: int = 1000
    checkpoint_every: int = 5000

    def check(self) -> None:
        """Refuse what no task can be made of.

        Raises: DgbenchError naming the setting and what it may be.
        """
        least = {"length": 1, "vocab": 3, "memorize": 1, "steps": 1, "depth": 1, "batch": 1, "sequences": 1, "log_every": 1}
        for name, bound in {**least, "checkpoint_every": 1}.items():
            if getattr(self, name) < bound:
                raise DgbenchError(f"{name} is {getattr(self, name)}, but must be {bound} or more")
        if not 0 < self.lr <= 1:
            raise DgbenchError(f"lr is {self.lr:g}, but must be above 0 and at most 1")
        if self.s4 not in ("s4d", "s4"):
            raise DgbenchError(f"no form of S4 is `{self.s4}`", "choose s4d (diagonal) or s4 (diagonal plus low rank)")
        if self.noise < 0:
            raise DgbenchError(
                f"{self.length} symbols in all do not hold {self.memorize} tokens and as many markers",
                f"give a length of {2 * self.memorize} or more, or memorize less",
            )
        if not self.rows or not self.seeds:
            raise DgbenchError("no row or no seed is given")
        for given in (self.rows, self.seeds):
            if len(set(given)) < len(given):
                raise DgbenchError(f"{', '.join(map(str, given))}: one is given twice", "name each row and each seed once")
        for name in self.rows:
            row_of(name)

    @property
    def noise(self) -> int:
        """Symbols of noise."""
        return self.length - 2 * self.memorize if self.total else self.length

    @property
    def tokens(self) -> int:
        """Symbols of a sequence, noise, tokens and markers."""
        return self.noise + 2 * self.memorize

    @property
    def as_published(self) -> bool:
        """Whether task, network and training are those of the published figures."""
        asked = (self.noise, self.vocab, self.memorize, self.steps, self.depth, self.batch, self.lr)
        return asked == (_LENGTH, _VOCAB, _MEMORIZE, _STEPS, _DEPTH, _BATCH, _LR)

    @property
    def chance(self) -> float:
        """Token accuracy of guessing."""
        return 1 / (self.vocab - 2)


PAPER = Settings()
PRESETS = {
    "cpu": Settings(
        length=64, vocab=8, memorize=4, steps=600, depth=1, batch=32, lr=3e-3, seeds=(0,), log_every=25, checkpoint_every=300
    ),
    "gpu": dataclasses.replace(PAPER, seeds=(0,), log_every=100, checkpoint_every=2000),
    "paper": PAPER,
}
# at most 3 and 15 with the start of the program and the last evaluation, which are not counted
MINUTES: dict[str, float | None] = {"cpu": 2.85, "gpu": 14.7, "paper": None}


def chosen(preset: str, given: Mapping[str, Any], minutes: float | None) -> tuple[Settings, float | None]:
    """Return the settings of a preset with those that were given, and the minutes to spend (None: as many as it takes).

    Raises: DgbenchError for values of which no task can be made.
    """
    settings = dataclasses.replace(PRESETS[preset], **given)
    settings.check()
    return settings, MINUTES[preset] if minutes is None else minutes
