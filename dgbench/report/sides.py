"""One side of a comparison: the models found in a run, a record or a folder of runs, each with its training runs by seed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dgbench import results
from dgbench.errors import ResultError
from dgbench.report import settings
from dgbench.results import Record
from dgbench.runs import find_run

# of the environment of a training: what can change its last digits
ENVIRONMENT = ("device", "cpu", "platform", "threads", "python", "torch", "numpy", "timm")
# recipe keys that do not change what is trained, besides the seed
_FREE = (*settings.INCIDENTAL, "train.seed", "data.targets")


@dataclass(frozen=True, slots=True)
class Run:
    """One training run of a model: its newest record of each measurement.

    Attributes:
        scores: by (target, split, protocol).
        trained: the record of the training; None where only scores are there.
    """

    folder: Path
    seed: int
    checkpoint: str
    scores: Mapping[tuple[str, str, str], Record]
    trained: Record | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """Training runs that differ in their seed alone."""

    method: str
    variant: str
    recipe: str
    source: str
    settings: str  # all that the runs share, as JSON; "" if it is unknown
    runs: tuple[Run, ...]

    @property
    def label(self) -> str:
        """Name of the model in a table."""
        return f"{self.recipe} ({self.variant})" if self.variant else self.recipe

    @property
    def identity(self) -> tuple[str, str, str, str]:
        """What two models must share to be one model before and after a change."""
        return self.method, self.variant, self.recipe, self.source


@dataclass(frozen=True, slots=True)
class Side:
    """All models of one side.

    Attributes:
        problems: a line for each file that cannot be read.
    """

    name: str
    models: tuple[Model, ...]
    problems: tuple[str, ...] = field(default_factory=tuple)


def find(text: str, runs: Path) -> Side:
    """Return the side meant by a word: a path, a name below the folder of runs, or `latest`.

    Raises: ResultError if there is nothing of this name.
    """
    if text == "latest":
        folder = find_run("latest", runs)
        return read(folder, folder.name)
    path = next((path for path in (Path(text), runs / text) if path.exists()), Path(text))
    return read(path, text)


def read(path: Path, name: str = "") -> Side:
    """Read all records below a folder, or those of the run in which a record lies.

    Args:
        path: a folder of runs, one run, a stored baseline (a folder of records), or a record's file.
        name: what to call it; "": the path.

    Raises: ResultError if there is nothing of this name.
    """
    name = name or str(path)
    if not path.exists():
        raise ResultError(f"there is no {name}", "name a run, a record, a folder of runs, or `latest`")
    folder = path.parent if path.is_file() else path
    records, problems = results.scan(folder)
    if path.is_file():
        results.read(path)  # says what is wrong with it
    return Side(name, tuple(_models(records)), tuple(problems))


def _models(records: Iterable[Record]) -> list[Model]:
    found: dict[tuple[str, str, str, str, str], dict[int, Run]] = {}
    for (folder, checkpoint), together in _by_run(records).items():
        newest = together[-1]
        said = settings.of_run(folder)
        shared = json.dumps({k: v for k, v in said.items() if k not in _FREE}, sort_keys=True, default=str) if said else ""
        key = (newest.method, newest.variant, newest.recipe, newest.source, shared)
        scores = {(r.target, r.split, r.protocol): r for r in together if r.kind == "eval"}
        trained = next((r for r in reversed(together) if r.kind == "train"), None)
        # of two trainings with one seed the newer stands
        found.setdefault(key, {})[newest.seed] = Run(folder, newest.seed, checkpoint, scores, trained)
    return [
        Model(method, variant, recipe, source, shared, tuple(runs[seed] for seed in sorted(runs)))
        for (method, variant, recipe, source, shared), runs in found.items()
    ]


def _by_run(records: Iterable[Record]) -> dict[tuple[Path, str], list[Record]]:
    """Return the records of each checkpoint, oldest first; checkpoints in the order of their newest records."""
    found: dict[tuple[Path, str], list[Record]] = {}
    for record in sorted(records, key=lambda record: (record.created, record.id)):
        key = (record.run or Path(), record.checkpoint)
        found[key] = [*found.pop(key, []), record]
    return found


def pairs(base: Side, head: Side) -> tuple[list[tuple[Model, Model]], list[Model], list[Model]]:
    """Match the models of two sides.

    First by name and all settings; what is left by name alone where that is unambiguous; and a single model of each side
    with each other, whatever they are.

    Returns: the pairs, what is in the base alone, and what is in the head alone.
    """
    left, right = list(base.models), list(head.models)
    matched: list[tuple[Model, Model]] = []

    def match(same: Iterable[tuple[Model, Model]]) -> None:
        for a, b in same:
            if a in left and b in right:
                left.remove(a)
                right.remove(b)
                matched.append((a, b))

    match([(a, b) for a in base.models for b in head.models if a.identity == b.identity and a.settings == b.settings])
    match(
        [
            (a, b)
            for a in left
            for b in right
            if a.identity == b.identity
            and sum(a.identity == other.identity for other in left) == 1
            and sum(b.identity == other.identity for other in right) == 1
        ]
    )
    if len(base.models) == len(head.models) == 1:
        match([(base.models[0], head.models[0])])
    return matched, left, right
