"""Plan of a download, made before any transfer: which files exist, which are missing, their source and size."""

from __future__ import annotations

import heapq
import re
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dgbench.data import domains
from dgbench.data.domain import RENDERED, UNFINISHED, Domain
from dgbench.data.index import find
from dgbench.download import archives, given, hub_rows
from dgbench.download.addresses import below
from dgbench.download.given import Given
from dgbench.download.hub_files import Listed, listing
from dgbench.download.hub_rows import HubWish
from dgbench.download.sources import Archive, Source, Way
from dgbench.download.stage import Stage, read_manifest
from dgbench.download.transfer import Transfer
from dgbench.errors import DataError

State = Literal["here", "to fetch", "to copy", "to unpack", "to link", "by hand"]

# licences that allow any use; for all others, the user is asked
_FREE = ("apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-3.0", "cc-by-sa-3.0", "odbl", "pddl", "unlicense")


@dataclass(frozen=True, slots=True)
class Need:
    """One row of the plan."""

    name: str
    kind: Literal["domain", "tower"]
    state: State
    files: int  # that are missing
    bytes: int | None  # of these files; None: unknown
    licence: str
    where: str  # its folder
    note: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a command would do, and the disk space for it."""

    needs: tuple[Need, ...]
    bytes: int  # to be transferred, copied or unpacked from here, as far as known
    room: int  # bytes that the data folder must have free for it
    free: int  # that it has
    place: str


@dataclass(slots=True, eq=False)
class Order:
    """One domain to get."""

    name: str
    title: str
    licence: str
    terms: str
    page: str
    stage: Stage
    source: Source | None = None
    wish: HubWish | None = None
    here: bool = False
    tree: Path | None = None
    given: list[Given] = field(default_factory=list)
    wanted: list[Archive] = field(default_factory=list)
    urls: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int | None] = field(default_factory=dict)  # by archive
    listed: Listed | None = None
    note: str = ""

    @property
    def way(self) -> Way:
        """The way in which the remaining files can be obtained."""
        if self.wish:
            return "hub"
        assert self.source is not None
        # with a mirror, no account is needed
        return "open" if self.wanted and len(self.urls) == len(self.wanted) else self.source.way

    @property
    def by_hand(self) -> bool:
        """Whether the user has to download something first."""
        return not self.here and self.tree is None and bool(self.wanted) and self.way == "browser"

    @property
    def to_transfer(self) -> list[Archive]:
        """The archives that can be fetched without the user."""
        return [] if self.by_hand else self.wanted

    @property
    def uses_network(self) -> bool:
        """Whether there is anything to transfer."""
        return not self.here and self.tree is None and not self.by_hand and (bool(self.wanted) or self.wish is not None)

    @property
    def must_be_accepted(self) -> bool:
        """Whether the user has to agree to its terms before a transfer."""
        return self.uses_network and bool(self.terms)

    def need(self) -> Need:
        """Return its row of the plan."""
        state: State = "to fetch"
        missing = [self.sizes.get(a.name) for a in self.wanted]
        files = len(self.wanted)
        if self.here:
            state = "here"
        elif self.tree is not None:
            state, files, missing = "to link", 0, []
        elif self.by_hand:
            state = "by hand"
        elif self.wish:
            files = len(self.listed.files) if self.listed else 0
            missing = [sum(self.listed.files.values())] if self.listed else [None]
        elif self.given and not self.wanted:
            state, files = "to unpack", len(self.given)
            missing = [archives.packed_size(g.path) for g in self.given]
        known = [size for size in missing if size is not None]
        size = 0 if self.here else sum(known) if known or not missing else None
        return Need(self.name, "domain", state, 0 if self.here else files, size, self.licence, str(self.stage.target), self.note)

    def room(self, at_once: int) -> int:
        """Return the disk space that it needs at most, in bytes: everything unpacked, and `at_once` archives."""
        if self.here or self.tree is not None:
            return 0
        if self.wish:
            # rows are written twice when they are made from their files
            return (3 if self.wish.columns else 1) * sum(self.listed.files.values()) if self.listed else 0
        sizes = {a.name: self.sizes.get(a.name) or 0 for a in self.to_transfer}
        unpacked = sum(sizes[a.name] * a.grows for a in self.to_transfer)
        unpacked += sum(archives.packed_size(g.path) * 1.05 for g in self.given)
        packed = sum(sizes.values()) if self.way == "csDownload" else sum(heapq.nlargest(at_once, sizes.values()))
        return max(0, int(unpacked + packed) - self.stage.kept_bytes())


def domain_order(
    row: Domain,
    source: Source | None,
    root: Path,
    from_paths: Sequence[Path] = (),
    mirror: str | None = None,
    revision: str | None = None,
) -> Order:
    """Return the order for a domain, without using a network.

    Args:
        root: the data root.    from_paths: files that the user has.    mirror: URL to use instead of the sites'.

    Raises: DataError if the domain has no known source, or an archive of the user's does not match its name.
    """
    target = _folder(row, source, root)
    stage = Stage(target)
    terms = source.terms if source else ""
    order = Order(row.name, row.title, row.licence, terms, row.homepage, stage, source)
    manifest = read_manifest(target)
    if source is not None and source.way == "hub":
        assert source.repo is not None
        order.wish = HubWish(source.repo, revision or source.revision, source.patterns)
        order.here = manifest is not None and not manifest.lost(target)
        order.note = f"commit {manifest.revision}" if manifest and manifest.revision else ""
    elif source is not None:
        needed = [archive for archive in source.archives if archive.needed]
        in_place = manifest.covered() - manifest.lost(target) if manifest else set()
        order.here = manifest is not None and {a.name for a in needed} <= in_place
    if not order.here and manifest is None and not (target / UNFINISHED).exists():
        order.note, folder = readable(row, root)
        order.here = folder is not None
        order.stage = Stage(folder or target)
    if order.here:
        return order
    if (target / RENDERED).exists():
        raise DataError(
            f"{target} holds rendered scenes (dgbench data export), not `{row.name}`",
            "move it away: published files never go between rendered ones",
        )
    folders, named = given.trees(row, from_paths)
    if source is not None:
        order.tree = next((folder for folder in [*folders, *named] if given.holds_all(folder, source)), None)
        if order.tree is None and order.wish is None:
            _find_archives(order, source, from_paths, mirror)
    if order.tree is None and not order.given:
        # readable in a known layout that is not the official one; other folders of this name are reported
        order.tree = next((folder for folder in [*folders, *named] if _readable_at(row, folder)), next(iter(named), None))
    if source is None and order.tree is None:
        raise DataError(f"no source of `{row.name}` is known", f"put its files into {target}; see {row.homepage}")
    return order


def _folder(row: Domain, source: Source | None, root: Path) -> Path:
    """Return the folder of a domain; not one whose name is another domain's (Mapillary has two versions)."""
    family = {row.name, *((source.domain, *source.also) if source else ())}
    others = {other.folders[0] for other in domains.DOMAINS.values() if other.folders and other.name not in family}
    mine = [f for f in row.folders if f not in others]
    return next((root / f for f in mine if (root / f).is_dir()), root / mine[0])


def _find_archives(order: Order, source: Source, from_paths: Sequence[Path], mirror: str | None) -> None:
    covered = order.stage.covered()
    order.given = [g for g in given.archives_for(source, from_paths) if not set(g.covers) <= covered]
    covered |= {name for g in order.given for name in g.covers}
    untouched = order.stage.target.is_dir() and not covered  # the user's own folder may hold a part of the data set
    order.wanted = [
        archive
        for archive in source.archives
        if archive.name not in covered and not (untouched and archive.needed and given.holds(order.stage.target, archive))
    ]
    if all(not archive.needed for archive in order.wanted) and from_paths:
        order.wanted = []  # the user's files are enough
    for archive in order.wanted:
        order.sizes[archive.name] = int(archive.gigabytes * 1e9) if archive.gigabytes is not None else None
        if mirror is not None:
            order.urls[archive.name] = below(mirror, f"{source.domain}/{archive.name}")
        elif archive.url is not None:
            order.urls[archive.name] = archive.url


def hub_order(name: str, wish: HubWish, root: Path) -> Order:
    """Return the order for a repository of the Hub, without using a network.

    Raises: DataError if another set has the name.
    """
    stage = Stage(root / name)
    order = Order(name, wish.repo, "", "", f"the Hub, {wish.repo}", stage, wish=wish)
    hub = hub_rows.read(stage.target) if stage.target.is_dir() else None
    if hub is not None and read_manifest(stage.target) is not None:
        other = re.fullmatch("[0-9a-f]{40}", wish.revision) and wish.revision != hub.revision
        if (hub.repository, hub.columns) != (wish.repo, wish.columns) or other:
            raise DataError(
                f"{stage.target} holds {hub.repository} at {hub.revision[:12]} already",
                "choose another name with --as, or remove that folder",
            )
        order.here, order.note, order.licence = True, f"commit {hub.revision}", hub.licence or ""
    elif stage.target.is_dir() and any(stage.target.iterdir()):
        raise DataError(
            f"{stage.target} is there already and is no set from the Hub", "choose another name with --as, or move it away"
        )
    return order


def ask_servers(orders: Sequence[Order], transfer: Transfer) -> list[tuple[Order, DataError]]:
    """Replace published sizes by those that the servers state, and list the Hub's repositories.

    Returns: the orders whose repository could not be listed, with what the Hub answered.
    """
    asked = [(order, name, url) for order in orders if order.uses_network for name, url in order.urls.items()]
    with ThreadPoolExecutor(8) as pool:
        for (order, name, _), size in zip(asked, pool.map(lambda one: transfer.size(one[2]), asked), strict=True):
            order.sizes[name] = size or order.sizes.get(name)
    unlisted = []
    for order in orders:
        if order.uses_network and order.wish is not None:
            kept = order.stage.home / "revision"
            # a download that was started at one commit is finished at it
            revision = kept.read_text() if order.wish.revision == "main" and kept.is_file() else order.wish.revision
            try:
                order.listed = listing(order.wish.repo, revision, order.wish.patterns)
            except DataError as error:
                unlisted.append((order, error))
                continue
            order.note = f"commit {order.listed.revision}"
            if order.source is None:
                order.licence = order.listed.licence or "not stated"
                if order.licence.lower() not in _FREE:
                    order.terms = f"licence {order.licence}, see its page"
    return unlisted


def plan(orders: Sequence[Order], towers: Sequence[Need], root: Path, at_once: int) -> Plan:
    """Return the plan of a command."""
    needs = (*towers, *(order.need() for order in orders))
    moving = [need.bytes or 0 for need in needs if need.state in ("to fetch", "to copy", "to unpack")]
    place = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    return Plan(needs, sum(moving), sum(o.room(at_once) for o in orders), shutil.disk_usage(place).free, str(place))


def readable(row: Domain, root: Path) -> tuple[str, Path | None]:
    """Return what can be read of a domain's splits from existing files, and their folder; None if a split is missing."""
    told, whole, folder = [], True, None
    for split in [split for split in row.splits if split in ("train", "val")]:
        try:
            there = find(row, split, root)
        except DataError:
            return "", None
        if not len(there):
            return "", None
        folder, other = there.folder, there.expected != len(there)
        whole = whole and not other and not there.rendered
        kind = there.layout.name + (", rendered" if there.rendered else "")
        told.append(f"{split} {len(there):,}{f' of {there.expected:,}' if other else ''} ({kind})")
    return ", ".join(told) + ("" if whole else "; to get the set whole, move the folder away first"), folder


def _readable_at(row: Domain, folder: Path) -> bool:
    with tempfile.TemporaryDirectory() as apart:
        Path(apart, row.folders[0]).symlink_to(folder.resolve(), target_is_directory=True)
        return readable(row, Path(apart))[1] is not None
