"""Images of domains, chosen by their ids or as the first ones, with their labels where these are known."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dgbench import protocol
from dgbench.data.dataset import SegDataset
from dgbench.data.domain import Domain
from dgbench.data.index import stem
from dgbench.engine.tested import Tested
from dgbench.errors import DataError

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Scene:
    """One image of a domain; rendered ones exist at every size that a model was trained at."""

    datasets: dict[protocol.Size | None, SegDataset]  # by the size at which they are rendered; None: files
    index: int

    @property
    def dataset(self) -> SegDataset:
        """The one whose image and label are shown: of the first model's size."""
        return next(iter(self.datasets.values()))

    @property
    def domain(self) -> Domain:
        """The domain's row."""
        return self.dataset.domain

    @property
    def id(self) -> str:
        """Its path below the domain's folder, or its number."""
        return self.dataset.name(self.index)

    @property
    def redistributable(self) -> bool:
        """Whether pictures of it may be passed on: its licence says so, or it is rendered, as exports are."""
        return self.dataset.exported or self.domain.redistributable

    def load(self) -> tuple[Pixels, Pixels]:
        """Image (H, W, 3) and train ids (H, W)."""
        sample = self.dataset[self.index]
        return sample.image, sample.label

    def segment(self, model: Tested) -> Pixels:
        """Train ids on the grid of the image that is shown."""
        dataset = self.datasets[_size(self.domain, model)]
        halved = dataset.found is not None and dataset.found.layout.halved
        height, width = self.dataset.image_size(self.index)
        return model.segment(dataset.image(self.index), self.domain, (height, width), halved=halved)


def _size(row: Domain, model: Tested) -> protocol.Size | None:
    return model.size if row.procedural else None


def scenes(
    rows: Sequence[Domain],
    models: Sequence[Tested],
    *,
    split: str | None = None,
    ids: Sequence[str] = (),
    limit: int | None = None,
    at_least_one: bool = False,
    root: Path | None = None,
) -> list[Scene]:
    """Images of each domain, in the order in which they are given.

    Args:
        split: default: val, or the first that the domain has.
        ids: those alone: a path below the domain's folder, the file's name with or without suffix, a number of a rendered
            domain; `DOMAIN:ID` for one domain alone.
        limit: without ids, the first ones; None: all.
        at_least_one: a domain that has none of the ids gives its first images, too.

    Raises: DataError for an id that no domain has, or that is not one image's alone; for missing files.
    """
    found: list[Scene] = []
    missing = set(ids)
    for row in rows:
        datasets = {
            size: SegDataset(
                row,
                split or ("val" if "val" in row.splits else next(iter(row.splits))),
                root=root,
                size=size,
                label_map=protocol.label_map(models[0].rules, row),
            )
            for size in dict.fromkeys(_size(row, model) for model in models)
        }
        dataset = next(iter(datasets.values()))
        chosen = []
        for given in ids:
            domain, colon, own = given.partition(":")
            if colon and domain != row.name:
                continue
            if (index := _index(dataset, own if colon else given)) is not None:
                missing.discard(given)
                chosen.append(index)
        if not ids or (at_least_one and not chosen):
            chosen = list(range(min(len(dataset), limit or len(dataset))))
        found += [Scene(datasets, index) for index in chosen]
    if missing:
        first = next(given for given in ids if given in missing)
        raise DataError(
            f"no image `{first}` in {', '.join(f'`{row.name}`' for row in rows)}",
            "an id is an image's path below the domain's folder, its file's name, or the number of a rendered image: 0, 1, ...",
        )
    if locked := dict.fromkeys(f"{one.domain.name} ({one.domain.licence})" for one in found if not one.redistributable):
        _log.warning(f"the licence does not let everybody pass pictures on of {', '.join(locked)}: ask before you publish them")
    return found


_log = logging.getLogger(__name__)


def _index(dataset: SegDataset, given: str) -> int | None:
    """The place of the image with this id, None if there is none.

    Raises: DataError if several files have this name.
    """
    names = [dataset.name(i) for i in range(len(dataset))]
    if given in names:
        return names.index(given)
    if dataset.domain.procedural:
        return int(given) if given.isdecimal() and int(given) < len(names) else None
    alike = [i for i, name in enumerate(names) if given in (name.rpartition("/")[2], stem(name))]
    if len(alike) > 1:
        raise DataError(
            f"{len(alike)} images of `{dataset.domain.name}` are called `{given}`", f"give the whole path: {names[alike[0]]}"
        )
    return alike[0] if alike else None
