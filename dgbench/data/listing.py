"""What `dgbench data` tells about domains: the list, how often each class occurs, a contact sheet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dgbench.data import domains
from dgbench.progress import Progress


@dataclass(frozen=True, slots=True)
class DomainState:
    """One domain and whether it can be used here."""

    name: str
    title: str
    splits: dict[str, int | None]  # split -> images in the complete split
    size: str  # W x H
    access: str
    licence: str
    aliases: tuple[str, ...]
    where: str | None  # its folder, "rendered" if it needs none, None if it is not on this disk


@dataclass(frozen=True, slots=True)
class ClassShare:
    """How much of a domain one class makes up."""

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
    """Return every domain, in the table's order."""
    base = domains.data_root(root)
    found = []
    for domain in domains.DOMAINS.values():
        folder = domain.root(base)
        where = "rendered" if domain.procedural else None if folder is None else str(folder)
        found.append(
            DomainState(
                domain.name,
                domain.title,
                {name: split.count for name, split in domain.splits.items()},
                domain.size,
                domain.access,
                domain.licence,
                domain.aliases,
                where,
            )
        )
    return found


def class_shares(
    name: str, split: str, *, progress: Progress, images: int | None = None, root: Path | None = None
) -> list[ClassShare]:
    """Return the share of each class, in class order, counted over the first `images` of a split.

    Raises: DataError for an unknown domain or split, or missing files.
    """
    from dgbench.data.dataset import SegDataset
    from dgbench.data.labels import NAMES
    from dgbench.data.sampling import class_counts

    dataset = SegDataset(name, split, root=root, limit=images)
    dataset.prepare(progress)
    counts = class_counts(dataset, progress)  # (n, K)
    total = max(int(counts.sum()), 1)
    return [
        ClassShare(dataset.domain.name, split, class_name, float(counts[:, k].sum() / total),
                   float((counts[:, k] > 0).mean()), len(dataset))
        for k, class_name in enumerate(NAMES)
    ]  # fmt: skip


def sheet(name: str, split: str, out: Path, *, progress: Progress, images: int = 6, root: Path | None = None) -> Sheet:
    """Write image, label overlay and legend of the first images of a split to `out`.

    Raises: DataError for an unknown domain or split, missing or damaged files.
    """
    from dgbench.data.dataset import SegDataset
    from dgbench.data.sheet import contact_sheet, save_image

    dataset = SegDataset(name, split, root=root)
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
