"""Information on domains for `dgbench data`: the list, class frequencies, contact sheets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dgbench.data import catalog
from dgbench.data.places import data_root
from dgbench.errors import DataError
from dgbench.progress import Progress

if TYPE_CHECKING:
    from dgbench.data.domain import Domain


@dataclass(frozen=True, slots=True)
class SplitState:
    """The files of a split on this disk."""

    layout: str  # name of the one that was found
    folder: str
    n_pairs: int
    n_expected: int  # pairs of the complete split, without those known to be bad; fewer than n_pairs: some do not belong to it
    rendered: bool = False  # by `dgbench data export`: not the published set


@dataclass(frozen=True, slots=True)
class DomainState:
    """One domain and whether it can be used here."""

    name: str
    title: str
    role: str  # "source", "target", "both" or "pretrain"
    splits: dict[str, int | None]  # split -> images in the complete split
    size: str  # H x W
    access: str
    licence: str
    homepage: str
    label_maps: tuple[str, ...]  # the default one first; none where there is no agreed map to the 19 classes
    aliases: tuple[str, ...]
    where: str | None  # its folder, "rendered" if it needs none, None if it is not on this disk
    here: dict[str, SplitState]  # split -> its files on this disk


@dataclass(frozen=True, slots=True)
class ClassShare:
    """Frequency of one class in a domain."""

    domain: str
    split: str
    name: str
    pixels: float  # share of the labelled pixels, 0..1
    images: float  # share of the images it occurs in, 0..1
    n_images: int


@dataclass(frozen=True, slots=True)
class Sheet:
    """A contact sheet that was written."""

    domain: str
    split: str
    n_images: int
    path: Path


def states(root: Path | None = None) -> list[DomainState]:
    """Return every domain, in the table's order, then those that the user declared."""
    return [_state(catalog.lookup(name, root), root) for name in catalog.names(root)]


def _state(domain: Domain, root: Path | None) -> DomainState:
    folder = domain.root(data_root(root))
    here = {} if folder is None else {split: state for split in domain.splits if (state := _split_state(domain, split, root))}
    return DomainState(
        name=domain.name,
        title=domain.title,
        role=domain.role,
        size=domain.size,
        access=domain.access,
        licence=domain.licence,
        splits={name: split.count for name, split in domain.splits.items()},
        homepage=domain.homepage,
        label_maps=tuple(dict.fromkeys((*filter(None, (domain.label_map,)), *domain.label_maps))),
        aliases=domain.aliases,
        where="rendered" if domain.procedural else None if folder is None else str(folder),
        here=here,
    )


def _split_state(domain: Domain, split: str, root: Path | None) -> SplitState | None:
    from dgbench.data.index import find

    try:
        found = find(domain, split, root)
    except DataError:
        return None
    return SplitState(found.layout.name, str(found.folder), len(found), found.expected, found.rendered)


def usual_split(name: str, root: Path | None = None) -> str:
    """Return the split that a command uses when none is named: val if there is one."""
    splits = catalog.lookup(name, root).splits
    return "val" if "val" in splits else next(iter(splits))


def class_shares(
    name: str,
    split: str | None = None,
    *,
    progress: Progress,
    images: int | None = None,
    root: Path | None = None,
    label_map: str | None = None,
) -> list[ClassShare]:
    """Return the share of each class, in class order, counted over the first `images` of a split.

    Raises: DataError for an unknown domain or split, or missing files.
    """
    from dgbench.data.dataset import SegDataset
    from dgbench.data.labels import NAMES
    from dgbench.data.sampling import class_counts

    split = split or usual_split(name, root)
    dataset = SegDataset(catalog.lookup(name, root), split, root=root, limit=images, label_map=label_map)
    dataset.prepare(progress)
    counts = class_counts(dataset, progress)  # (n, K)
    total = max(int(counts.sum()), 1)
    return [
        ClassShare(
            dataset.domain.name,
            split,
            class_name,
            float(counts[:, k].sum() / total),
            float((counts[:, k] > 0).mean()),
            len(dataset),
        )
        for k, class_name in enumerate(NAMES)
    ]


def sheet(
    name: str,
    split: str | None,
    out: Path,
    *,
    progress: Progress,
    images: int = 6,
    root: Path | None = None,
    label_map: str | None = None,
) -> Sheet:
    """Write image, label overlay and legend of the first images of a split to `out`.

    Raises: DataError for an unknown domain or split, missing or damaged files.
    """
    from dgbench.data.dataset import SegDataset
    from dgbench.data.sheet import check_ending, contact_sheet, save_image

    check_ending(out)
    split = split or usual_split(name, root)
    dataset = SegDataset(catalog.lookup(name, root), split, root=root, label_map=label_map)
    count = min(images, len(dataset))
    progress.start(f"drawing {dataset.domain.name} {split}", count, "images")
    samples = []
    try:
        for index in range(count):
            samples.append(dataset[index])
            progress.advance()
    finally:
        progress.stop()
    save_image(contact_sheet(samples, f"{dataset.domain.name}, {split}: {dataset.domain.title}"), out)
    return Sheet(dataset.domain.name, split, count, out)
