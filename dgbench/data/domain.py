"""Rows of the table of domains: a domain, its splits, and the possible layouts of a split's files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dgbench.errors import DataError

if TYPE_CHECKING:
    from dgbench.data.labels import LabelMap

UNFINISHED = ".dgbench-incomplete"  # a file in a domain's folder while `dgbench download` is adding others to it
# a file in every folder that `dgbench data export` makes, so that copied or moved folders are recognised; hidden, because
# no glob of a layout may match it
RENDERED = ".dgbench-rendered"

_FREE = ("Apache-2.0", "MIT", "CC0", "CC BY")  # how licences begin that let everybody pass images on

Role = Literal["source", "target", "both", "pretrain"]  # pretrain: towers see its images; no benchmark uses it
Access = Literal["procedural", "open", "account", "request", "own"]


@dataclass(frozen=True, slots=True)
class Layout:
    """One way in which the files of a split lie below the domain's folder."""

    name: str  # shown to the user
    images: str  # glob, relative to the domain's folder
    to_label: tuple[tuple[str, str], ...]  # replacements that turn an image's relative path into its label's
    encoding: str = "ids"  # key of dgbench.data.decode.ENCODINGS
    label_map: str | None = None  # the map of its label files; None: the domain's own, or the requested one
    only: tuple[str, ...] = ()  # a text file, at one of these places, that lists the images of the split by file name
    revision: str = "official"  # anything else: pixels or labels differ from the published files, and so do scores
    count: int | None = None  # images of the complete split in this layout, where it has fewer than the split
    halved: bool = False  # images and labels have half the published height and width
    note: str = ""  # what differs from the published files


@dataclass(frozen=True, slots=True)
class Split:
    """One split; the layouts are tried in order, and the first with the most pairs is read."""

    count: int | None  # images in the complete split; None: whatever is found (user domains)
    layouts: tuple[Layout, ...] = ()  # empty: rendered
    # file stem -> what is known about it. A listed pair is checked, and left out if it is unreadable or of two sizes; a
    # listed image without a label, or a label without an image, causes no warning
    known_bad: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Domain:
    """One domain (not "dataset": a role in a domain-generalisation experiment)."""

    name: str
    title: str
    role: Role
    splits: Mapping[str, Split]
    size: str  # H x W, as published
    label_map: str  # the default, a key of dgbench.data.labels.LABEL_MAPS; "" where no map to the 19 classes is agreed on
    licence: str
    access: Access
    homepage: str = ""
    folders: tuple[str, ...] = ()  # names its folder may have below the data root, and a folder inside that one
    label_maps: tuple[str, ...] = ()  # every map that fits its files, where there is a choice
    legend: str = ""  # a JSON in its folder that names its values
    withheld: Mapping[str, str] = field(default_factory=dict)  # split that cannot be scored -> why
    aliases: tuple[str, ...] = ()
    severity: float | None = None  # streets only, from `name@severity`
    inline_map: LabelMap | None = None  # a user domain's own label map
    digest: str = ""  # hash of a user domain's definition

    @property
    def procedural(self) -> bool:
        return self.access == "procedural"

    @property
    def redistributable(self) -> bool:
        """Whether its licence lets everybody pass its images on; where none is known, or a purpose is excluded, it does not."""
        return self.licence.startswith(_FREE) and not self.licence.startswith(("CC BY-NC", "CC BY-ND"))

    @property
    def base(self) -> str:
        return self.name.partition("@")[0]

    def roots(self, data_root: Path) -> Iterator[Path]:
        """Return the folders below `data_root` in which its files may lie, the outer ones first."""
        outer = [data_root / f for f in self.folders if (data_root / f).is_dir()]
        yield from outer
        yield from (folder / f for folder in outer for f in self.folders if (folder / f).is_dir())

    def root(self, data_root: Path) -> Path | None:
        """Return the domain's folder below `data_root`, or None when there is none."""
        return next(self.roots(data_root), None)

    def revision(self) -> str:
        """Return what identifies the data that a score was computed on; part of the protocol hash."""
        if self.procedural:
            from dgbench.streets import VERSION

            return f"streets-v{VERSION}"
        return f"user-{self.digest}" if self.digest else "official"

    def require_split(self, split: str) -> None:
        """Raise a DataError unless this split exists and has labels."""
        if reason := self.withheld.get(split):
            raise DataError(f"`{self.name}` {split} cannot be scored here: {reason}", f"its splits are {self._listed()}")
        if split not in self.splits:
            raise DataError(f"`{self.name}` has no split `{split}`", f"its splits are {self._listed()}")

    def _listed(self) -> str:
        return ", ".join(f"`{s}`" for s in self.splits)

    def read_by(self, label_map: str | None = None) -> LabelMap:
        """Return the label map of this name, by default the domain's own.

        Raises: DataError for an unknown name, or if the domain has no default.
        """
        from dgbench.data.labels import named

        name = label_map or self.label_map
        if self.inline_map is not None and name == self.inline_map.name:
            return self.inline_map
        if not name:
            raise DataError(
                f"`{self.name}` has no agreed map of its labels to the 19 classes",
                "look at its values with `dgbench data verify`, and declare a domain with a map of your own (docs/data.md); "
                "published scores use `mapillary`, whose labels lie beside these",
            )
        return named(name)


def replaced(path: str, pairs: Iterable[tuple[str, str]]) -> str:
    """Return `path` after replacements, one after another."""
    for old, new in pairs:
        path = path.replace(old, new)
    return path


def outside(path: str) -> bool:
    """Return whether a relative path may lead outside its base folder."""
    return path.startswith("/") or (".." in path and ".." in path.split("/")) or "\0" in path
