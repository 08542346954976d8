"""What `dgbench download` fetches by name: the towers' weights, the domains' official archives, sets from the Hub.

First everything is worked out and shown (`Plan`); then a few files at a time are transferred, checked and unpacked. One
domain's failure does not keep the others from coming.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dgbench.data import archives, csdownload, domains, given, hub_rows, orders
from dgbench.data.hub_rows import HubWish
from dgbench.data.orders import Need, Order, Plan
from dgbench.data.sources import Archive, source
from dgbench.data.stage import Manifest, Receipt, read_manifest
from dgbench.data.transfer import FullDiskError, InterruptedTransfer, Patience, Transfer, hashes
from dgbench.data.volumes import volumes
from dgbench.errors import DataError, DgbenchError, StoppedError, unknown
from dgbench.progress import Bars, Silent

if TYPE_CHECKING:
    from mfuser.hub import Fetched


@dataclass(frozen=True, slots=True)
class Stored:
    """One domain after `download`."""

    name: str
    state: Literal["downloaded", "unpacked", "linked", "here"]
    folder: str
    files: int | None  # that the manifest lists; None for a folder that is not of our making
    bytes: int | None
    checked: str | None  # what its archives were held against
    revision: str | None  # of a Hub repository
    note: str


@dataclass(frozen=True, slots=True)
class Problem:
    """Why one name was not downloaded, and what to do."""

    name: str
    message: str
    hint: str | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a command."""

    rows: tuple[Fetched | Stored, ...]
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class Options:
    """How to download.

    `ask` shows terms and tells whether the user accepts them; None refuses. `show` is given the plan before anything moves.
    """

    root: Path | None = None
    from_paths: tuple[Path, ...] = ()
    mirror: str | None = None
    revision: str | None = None  # of Hub repositories
    jobs: int = 4
    accept: bool = False
    ask: Callable[[str], bool] | None = None
    show: Callable[[Plan], None] = lambda _plan: None
    bars: Bars = field(default_factory=Silent)
    patience: Patience = field(default_factory=Patience)
    command: str = "dgbench download"  # as the user gave it


def plan(names: Sequence[str], options: Options | None = None, wish: tuple[str, HubWish] | None = None) -> Plan:
    """What `download` would do. Servers are asked for sizes unless DGBENCH_OFFLINE=1.

    Raises: DataError for an unknown name, or what the Hub answers.
    """
    from mfuser.hub import offline

    options = options or Options()
    towers, wanted = _worked_out(names, options, wish)
    transfer = Transfer(options.patience)
    if not offline():
        orders.ask_servers(wanted, transfer)
    transfer.close()
    return orders.plan(wanted, _tower_needs(towers), domains.data_root(options.root), options.jobs)


def download(names: Sequence[str], options: Options | None = None, wish: tuple[str, HubWish] | None = None) -> Outcome:
    """Fetch what the names stand for; all names are looked at before anything is fetched.

    Args:
        wish: name and description of a Hub repository that becomes a domain of the user's.

    Raises: DgbenchError for an unknown name, no room, or terms that are not accepted; StoppedError if the user stops it;
        mfuser's DownloadError, see there. What goes wrong later with one domain is in `problems`.
    """
    from mfuser import hub

    options = options or Options()
    towers, wanted = _worked_out(names, options, wish)
    root = domains.data_root(options.root)
    moving = [order for order in wanted if not order.here and (order.given or not order.by_hand)]
    again = f"run again: {options.command}"
    if (switch := hub.offline()) and (online := [order for order in moving if order.uses_network]):
        listed = ", ".join(f"{o.name} ({_gigabytes(o)})" for o in online)
        raise DataError(f"{switch} forbids downloads; not on this machine: {listed}",
                        f"where there is a network, run: {options.command}, and copy {root} here; archives that are here already "
                        "are taken from --from FOLDER")  # fmt: skip
    if any(order.way == "csDownload" and order.uses_network for order in moving):
        csdownload.check(_by_hand_hint("cityscapes"))
    transfer = Transfer(options.patience, options.bars.advance, options.bars.note)
    with ExitStack() as stack:
        stack.callback(transfer.close)
        for order in moving:
            if order.tree is None:
                stack.enter_context(order.stage.locked())
        orders.ask_servers(moving, transfer)
        if wanted:
            _check_room_and_terms(wanted, towers, root, options)
        rows: list[Fetched | Stored] = list(hub.download(towers, options.bars.note)) if towers else []
        problems = _Problems()
        _fetch_all(moving, transfer, options, problems, again)
        for order in wanted:
            if order.by_hand:
                problems.add(order, _by_hand(order))
            elif order not in problems.orders:
                rows.append(_stored(order))
    return Outcome(tuple(rows), tuple(problems.found))


def _worked_out(names: Sequence[str], options: Options, wish: tuple[str, HubWish] | None) -> tuple[list[str], list[Order]]:
    """The towers among the names, and an order for each domain."""
    from mfuser.pretrained import WEIGHTS

    given.check(options.from_paths)
    folders = {alias: row for row in domains.DOMAINS.values() for alias in (row.name, *row.aliases)}
    towers, rows = [], []
    for name in dict.fromkeys(names):
        if name in WEIGHTS:
            towers.append(name)
        elif name.startswith("timm:"):
            towers.append(_timm(name))
        elif name.partition("@")[0] not in folders:
            raise DgbenchError(*unknown("tower or domain", name, [*WEIGHTS, *folders]))
        else:
            row = domains.lookup(name)
            if row.procedural:
                raise DataError(f"`{row.name}` is rendered here: there is nothing to download", f"dgbench data show {row.base}")
            rows.append(row)
    root = domains.data_root(options.root)
    wanted: dict[Path, Order] = {}
    for row in rows:
        order = orders.domain_order(row, source(row.name), root, options.from_paths, options.mirror, options.revision)
        wanted.setdefault(order.stage.target, order)  # acdc and acdc-fog are one folder
    if wish is not None:
        name, what = wish
        if name in folders or name in WEIGHTS or not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
            taken = name in folders or name in WEIGHTS
            why = "there is one of that name" if taken else "use letters a-z, digits, - and _ only"
            raise DataError(f"`{name}` cannot be the name of a new domain: {why}", "choose another with --as")
        wanted[root / name] = orders.hub_order(name, what, root)
    return towers, list(wanted.values())


def _timm(name: str) -> str:
    from mfuser.encoders import tower
    from mfuser.pretrained import files

    try:
        tower(name), files(name)
    except ValueError as error:
        raise DgbenchError(str(error), "docs/mfuser.md says which models of timm's are towers") from None
    return name


def _tower_needs(towers: Sequence[str]) -> list[Need]:
    from huggingface_hub.constants import HF_HUB_CACHE

    from mfuser.pretrained import WEIGHTS, files

    needs = []
    for name in towers:
        missing = [file for file in files(name) if file.where is None]
        row = WEIGHTS.get(name)
        size = int(sum(file.gigabytes for file in missing) * 1e9)
        licence = row.licence if row else next((file.licence for file in files(name)), "")
        needs.append(Need(name, "tower", "to fetch" if missing else "here", len(missing), size, licence, HF_HUB_CACHE, ""))
    return needs


def _check_room_and_terms(wanted: Sequence[Order], towers: Sequence[str], root: Path, options: Options) -> None:
    made = orders.plan(wanted, _tower_needs(towers), root, options.jobs)
    options.show(made)
    if made.room > made.free:
        raise DataError(
            f"not enough room: {made.room / 1e9:,.1f} GB are needed in {made.place} (unpacked, with {options.jobs} archives at a "
            f"time beside), {made.free / 1e9:,.1f} GB are free",
            "make room there, name fewer domains at once, or point --root or DGBENCH_DATA at a larger disk",
        )
    asking = [order for order in wanted if order.must_be_accepted]
    if not asking or options.accept:
        return
    terms = "\n".join(f"{order.title}: {order.terms}. Full text: {order.page}" for order in asking)
    if options.ask is None:
        raise DataError(f"these terms have to be accepted before the transfer:\n{terms}",
                        f"read them, then accept them with --yes: {options.command} --yes")  # fmt: skip
    if not options.ask(terms):
        raise DataError("the terms were not accepted: nothing was transferred", None)


class _Problems:
    """What went wrong, by order; the first of each counts."""

    def __init__(self) -> None:
        self.found: list[Problem] = []
        self.orders: list[Order] = []

    def add(self, order: Order, error: DgbenchError) -> None:
        if order not in self.orders:
            self.orders.append(order)
            self.found.append(Problem(order.name, error.message, error.hint))


def _fetch_all(moving: Sequence[Order], transfer: Transfer, options: Options, problems: _Problems, again: str) -> None:
    try:
        # these ask on the terminal or draw bars of their own: one after the other, before the others begin
        for order in moving:
            try:
                if order.tree is not None:
                    _link(order)
                elif order.way == "csDownload":
                    names = [archive.name for archive in order.to_transfer]
                    csdownload.fetch(names, order.stage.archive, options.bars.note, _by_hand_hint(order.name), options.patience)
                elif order.wish is not None:
                    _hub(order, order.wish, again)
            except DgbenchError as error:
                problems.add(order, error)
                if isinstance(error, FullDiskError):
                    return
        _archives([order for order in moving if order not in problems.orders], transfer, options, problems, again)
    except KeyboardInterrupt:
        kept = sum(order.stage.kept_bytes() for order in moving if order.tree is None)
        raise StoppedError(f"stopped; {kept / 1e9:,.2f} GB that have come are kept. To go on, {again}") from None


def _archives(moving: Sequence[Order], transfer: Transfer, options: Options, problems: _Problems, again: str) -> None:
    """Transfer and unpack archives, a few at a time; put a domain into place when its last one is done."""
    pool = ThreadPoolExecutor(max(1, options.jobs), thread_name_prefix="download")
    tasks: dict[Future[None], tuple[Order, Archive | given.Given]] = {}
    left: dict[str, int] = {}
    try:
        for order in moving:
            if order.tree is not None or order.wish is not None:
                continue
            mine: list[Archive | given.Given] = [*order.given, *order.to_transfer]
            left[order.name] = len(mine)
            for one in mine:
                tasks[pool.submit(_one_archive, order, one, transfer, options, again)] = (order, one)
            if not mine:  # an earlier try had only this left to do
                _finish(order, problems)
        pending = set(tasks)
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for task in done:
                order, one = tasks[task]
                left[order.name] -= 1
                try:
                    task.result()
                except DgbenchError as error:
                    if isinstance(error, FullDiskError):
                        transfer.stop.set()
                    if isinstance(one, Archive) and not one.needed:
                        options.bars.note(f"{order.name} is complete without {one.name}: {error.message}")
                    else:
                        problems.add(order, error)
                except InterruptedTransfer:
                    problems.add(order, DataError(f"{order.name} was left unfinished", f"what has come is kept; {again}"))
                if not left[order.name] and not order.by_hand and order not in problems.orders:
                    _finish(order, problems)
    except BaseException:
        transfer.stop.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _one_archive(order: Order, one: Archive | given.Given, transfer: Transfer, options: Options, again: str) -> None:
    """Bring one archive here, check it and unpack it. A transferred archive is removed once it is unpacked, or useless."""
    if transfer.stop.is_set():
        raise InterruptedTransfer
    assert order.source is not None
    if isinstance(one, given.Given):
        path, receipt = one.path, _of_given(order, one, transfer)
    else:
        path, receipt = order.stage.archive(one.name), _of_fetched(order, one, transfer, options, again)
    gives = [archive for archive in order.source.archives if archive.name in receipt.covers]

    def check(files: object) -> None:
        for archive in gives:
            if glob := given.lacks(archive, files):  # type: ignore[arg-type]
                raise archives.ArchiveError(f"{path.name} holds no `{glob}`: it is not {archive.name} as its owner hands it out",
                                            f"see {order.page} for what has changed, or unpack it yourself and give the folder "
                                            "with --from")  # fmt: skip

    title = f"unpacking {path.name}"

    def advance(n: int) -> None:
        options.bars.advance(title, n)
        if transfer.stop.is_set():
            raise InterruptedTransfer

    options.bars.begin(title, None)
    try:
        order.stage.unpack(path, receipt, order.source.place, advance, check)
    except archives.ArchiveError as error:
        if isinstance(one, Archive):
            path.unlink(missing_ok=True)
            raise DataError(error.message, f"the archive is removed; {again}. {error.hint or ''}".strip()) from None
        raise
    finally:
        options.bars.end(title)
    if isinstance(one, Archive):
        path.unlink()


def _of_fetched(order: Order, archive: Archive, transfer: Transfer, options: Options, again: str) -> Receipt:
    path = order.stage.archive(archive.name)
    # csDownload has brought its archives already
    url = order.urls.get(archive.name, order.page)
    part = path.with_name(path.name + ".part")
    options.bars.begin(path.name, order.sizes.get(archive.name), part.stat().st_size if part.is_file() else 0)
    try:
        got = transfer.fetch(url, path, md5=archive.md5, again=again)
    finally:
        options.bars.end(path.name)
    return Receipt(archive.name, url, got.bytes, got.sha256, got.md5, (archive.name,))


def _of_given(order: Order, one: given.Given, transfer: Transfer) -> Receipt:
    assert order.source is not None
    files = volumes(one.path)
    sha256, md5 = hashes(files, transfer.stop)
    stated = order.source.known_md5(given.official_name(one.path))
    if stated is not None and md5 != stated:
        raise DataError(
            f"{one.path} is damaged, or another file than its owner states: its md5 is {md5}, stated is {stated}",
            "download it again; or, if you trust it, unpack it yourself and give the folder with --from",
        )
    return Receipt(one.path.name, str(one.path), sum(f.stat().st_size for f in files), sha256, stated, one.covers)


def _finish(order: Order, problems: _Problems) -> None:
    try:
        order.stage.finish(order.source.domain if order.source else order.name)
    except DgbenchError as error:
        problems.add(order, error)


def _hub(order: Order, wish: HubWish, again: str) -> None:
    """Fetch a repository and put it into place, with how its rows are read if it is a domain of the user's."""
    from dgbench import atomic

    assert order.listed is not None
    atomic.write(order.stage.home / "revision", order.listed.revision)
    tree = order.stage.tree
    if wish.columns is not None and not any("*" in column for column in wish.columns.values()):
        # a wrong column is known from the first file, not from the last
        first = hub_rows.fetch_one(order.listed, hub_rows.first_parquet(order.listed, wish.repo), tree, again)
        hub_rows.check_columns(order.listed, wish.columns, first)
    hub_rows.fetch(order.listed, tree, again)
    files = dict(order.listed.files)
    if wish.columns is not None:
        hub_rows.describe(order.name, order.listed, wish.columns, tree,
                          encoding=wish.encoding, label_map=wish.label_map, split=wish.split)  # fmt: skip
        files[hub_rows.HUB_FILE] = (tree / hub_rows.HUB_FILE).stat().st_size
    receipt = Receipt(wish.repo, f"the Hub, {wish.repo}", sum(files.values()), "", None, (wish.repo,), files)
    order.stage.finish(order.name, order.listed.revision, [receipt])


def _link(order: Order) -> None:
    """Let the data root's folder be the user's unpacked tree, which stays where it is."""
    assert order.tree is not None
    target, tree = order.stage.target, order.tree.resolve()
    if target.exists() or target.is_symlink():
        raise DataError(f"{target} is there already, and {order.name} cannot be read from it",
                        f"move it away; then it can point at {tree}")  # fmt: skip
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(tree, target_is_directory=True)
    try:
        order.note = _readable(order)
    except BaseException:
        target.unlink()
        raise


def _readable(order: Order) -> str:
    from dgbench.data.dataset import SegDataset

    row = domains.lookup(order.name)
    counts = []
    for split in [split for split in row.splits if split in ("train", "val")]:
        counts.append(f"{split} {len(SegDataset(row.name, split, root=order.stage.target.parent)):,}")
    return f"{', '.join(counts)} images in {order.tree}"


def _stored(order: Order) -> Stored:
    target = order.stage.target
    manifest = read_manifest(target)
    files, size = manifest.totals() if manifest else (None, None)
    state: Literal["downloaded", "unpacked", "linked", "here"] = "downloaded"
    if order.here:
        state = "here"
    elif order.tree is not None:
        state = "linked"
    elif order.given and not order.wanted:
        state = "unpacked"
    revision = manifest.revision if manifest else None
    return Stored(order.name, state, str(target), files, size, _checked(manifest), revision, order.note)


def _checked(manifest: Manifest | None) -> str | None:
    if manifest is None:
        return None
    if manifest.revision:
        return "size, sha256 of large files"
    known = sum(receipt.md5 is not None for receipt in manifest.receipts)
    others = len(manifest.receipts) - known
    return " and ".join([f"md5 of {known}"] * bool(known) + [f"size of {others}"] * bool(others)) + " archives"


def _by_hand(order: Order) -> DataError:
    assert order.source is not None
    steps = "\n".join(f"  {n}. {step}" for n, step in enumerate((*order.source.steps, _by_hand_hint(order.name)), 1))
    missing = ", ".join(a.name for a in order.wanted)
    waiting = ", ".join(receipt.name for receipt in order.stage.receipts())
    kept = f"; unpacked already and waiting for it: {waiting}" if waiting else ""
    return DataError(f"`{order.name}` is handed out in a browser only. Missing: {missing}{kept}", f"\n{steps}")


def _by_hand_hint(name: str) -> str:
    return f"download it in a browser and run: dgbench download {name} --from FOLDER"


def _gigabytes(order: Order) -> str:
    known = [size for size in order.sizes.values() if size]
    files = f"{len(order.wanted)} files" if order.wanted else "on the Hub"
    return f"{files}, about {sum(known) / 1e9:,.1f} GB" if known else files
