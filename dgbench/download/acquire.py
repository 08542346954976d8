"""Execution of orders.

Packages are fetched through their downloader, repositories from the Hub, and archives a few at a time; each domain is put into
place when its last file is there. One order's failure leaves the others alone; a full disk and Ctrl-C end them all.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass

from dgbench import atomic
from dgbench.data import catalog
from dgbench.download import archives, csdownload, given, hub_files, hub_rows, orders
from dgbench.download.hub_rows import HubWish
from dgbench.download.orders import Order
from dgbench.download.sources import Archive
from dgbench.download.stage import Receipt, sizes_below
from dgbench.download.transfer import FULL, FullDiskError, InterruptedTransfer, Patience, Transfer, full_disk, hashes
from dgbench.download.volumes import volumes
from dgbench.errors import DataError, DgbenchError, StoppedError
from dgbench.progress import Bars


@dataclass(frozen=True, slots=True)
class Work:
    """Settings and tools of one command's downloads."""

    transfer: Transfer
    bars: Bars
    patience: Patience
    jobs: int  # archives at a time
    again: str  # advice to a user after a failure


@dataclass(frozen=True, slots=True)
class Problem:
    """Why one name was not downloaded, and what to do."""

    name: str
    message: str
    hint: str | None


class Problems:
    """Errors by order; only the first of each is kept."""

    def __init__(self) -> None:
        self.found: list[Problem] = []
        self.orders: list[Order] = []

    def add(self, order: Order, error: DgbenchError) -> None:
        if order not in self.orders:
            self.orders.append(order)
            self.add_name(order.name, error)

    def add_name(self, name: str, error: DgbenchError) -> None:
        """Add a problem that has no order: of a tower, or of a domain that could not be examined."""
        self.found.append(Problem(name, error.message, error.hint))


@contextmanager
def told() -> Iterator[None]:
    """Record errors of the file system as problems of one order, and continue with the others."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            where = error.filename or "the data folder"
            raise FullDiskError(
                f"the disk is full: {where} cannot be written",
                "make room there, or point --root or DGBENCH_DATA at a larger disk; then run the same command again",
            ) from None
        raise _refusal(error) from None


def _refusal(error: OSError) -> DataError:
    """Return the file system's error and its file in one line."""
    files = " and ".join(repr(str(name)) for name in (error.filename, error.filename2) if name is not None)
    reason = error.strerror or (str(error).splitlines() or [type(error).__name__])[0]
    return DataError(
        f"{files or 'the file system'}: {reason}", "see who may read and write there; then run the same command again"
    )


def acquire(moving: Sequence[Order], work: Work, problems: Problems) -> None:
    """Execute the orders, each completely or not at all; the errors of each are in `problems`.

    Raises: StoppedError for Ctrl-C, stating how much is kept.
    """
    try:
        # these ask questions or draw their own progress bars: one after the other, before the others
        for order in moving:
            try:
                with told():
                    if order.tree is not None:
                        _link(order)
                    elif order.way == "csDownload":
                        names = [archive.name for archive in order.to_transfer]
                        csdownload.fetch(names, order.stage.archive, work.bars.note, by_hand_hint(order.name), work.patience)
                    elif order.wish is not None:
                        _hub(order, order.wish, work.again)
            except DgbenchError as error:
                problems.add(order, error)
                if isinstance(error, FullDiskError):
                    return
        _archives([order for order in moving if order not in problems.orders], work, problems)
    except KeyboardInterrupt:
        kept = sum(order.stage.kept_bytes() for order in moving if order.tree is None)
        raise StoppedError(f"stopped; {kept / 1e9:,.2f} GB that were received are kept. To continue, {work.again}") from None


def _archives(moving: Sequence[Order], work: Work, problems: Problems) -> None:
    """Transfer and unpack archives, a few at a time; put a domain into place when its last one is done."""
    pool = ThreadPoolExecutor(max(1, work.jobs), thread_name_prefix="download")
    tasks: dict[Future[None], tuple[Order, Archive | given.Given]] = {}
    left: dict[str, int] = {}
    try:
        for order in moving:
            if order.tree is not None or order.wish is not None:
                continue
            mine: list[Archive | given.Given] = [*order.given, *order.to_transfer]
            left[order.name] = len(mine)
            for one in mine:
                tasks[pool.submit(_one_archive, order, one, work)] = (order, one)
            if not mine:  # only this step was left from an earlier try
                _finish(order, problems)
        pending = set(tasks)
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for task in done:
                order, one = tasks[task]
                left[order.name] -= 1
                try:
                    with told():
                        task.result()
                except DgbenchError as error:
                    if isinstance(error, FullDiskError):
                        work.transfer.stop.set()
                    if isinstance(one, Archive) and not one.needed:
                        work.bars.note(f"{order.name} is complete without {one.name}: {error.message}")
                    else:
                        problems.add(order, error)
                except InterruptedTransfer:
                    problems.add(order, DataError(f"{order.name} was left unfinished", f"received bytes are kept; {work.again}"))
                if not left[order.name] and not order.by_hand and order not in problems.orders:
                    _finish(order, problems)
    except BaseException:
        work.transfer.stop.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _one_archive(order: Order, one: Archive | given.Given, work: Work) -> None:
    """Transfer one archive, check it and unpack it. A transferred archive is removed once it is unpacked, or useless."""
    if work.transfer.stop.is_set():
        raise InterruptedTransfer
    assert order.source is not None
    if isinstance(one, given.Given):
        path, receipt = one.path, _of_given(order, one, work)
    else:
        path, receipt = order.stage.archive(one.name), _of_fetched(order, one, work)
    gives = [archive for archive in order.source.archives if archive.name in receipt.covers]

    def check(files: Iterable[str]) -> None:
        for archive in gives:
            if glob := given.lacks(archive, files):
                raise archives.ArchiveError(
                    f"{path.name} holds no `{glob}`: it is not {archive.name} as its owner hands it out",
                    f"see {order.page} for what has changed, or unpack it yourself and give the folder with --from",
                )

    title = f"unpacking {path.name}"

    def advance(n: int) -> None:
        work.bars.advance(title, n)
        if work.transfer.stop.is_set():
            raise InterruptedTransfer

    work.bars.begin(title, None)
    try:
        order.stage.unpack(path, receipt, order.source.place, advance, check)
    except archives.ArchiveError as error:
        if isinstance(one, Archive):
            path.unlink(missing_ok=True)
            raise DataError(error.message, f"the archive is removed; {work.again}. {error.hint or ''}".strip()) from None
        raise
    finally:
        work.bars.end(title)
    if isinstance(one, Archive):
        path.unlink()


def _of_fetched(order: Order, archive: Archive, work: Work) -> Receipt:
    path = order.stage.archive(archive.name)
    # csDownload has transferred its archives already
    url = order.urls.get(archive.name, order.page)
    part = path.with_name(path.name + ".part")
    work.bars.begin(path.name, order.sizes.get(archive.name), part.stat().st_size if part.is_file() else 0)
    try:
        got = work.transfer.fetch(url, path, md5=archive.md5, about=order.sizes.get(archive.name), again=work.again)
    finally:
        work.bars.end(path.name)
    return Receipt(archive.name, got.source, got.bytes, got.sha256, got.md5, (archive.name,))


def _of_given(order: Order, one: given.Given, work: Work) -> Receipt:
    assert order.source is not None
    files = volumes(one.path)
    sha256, md5 = hashes(files, work.transfer.stop)
    stated = order.source.known_md5(given.official_name(one.path))
    if stated is not None and md5 != stated:
        raise DataError(
            f"{one.path} is damaged, or another file than its owner states: its md5 is {md5}, stated is {stated}",
            "download it again; or, if you trust it, unpack it yourself and give the folder with --from",
        )
    return Receipt(one.path.name, str(one.path), sum(f.stat().st_size for f in files), sha256, stated, one.covers)


def _finish(order: Order, problems: Problems) -> None:
    try:
        with told():
            order.stage.finish(order.source.domain if order.source else order.name)
    except DgbenchError as error:
        problems.add(order, error)


def _hub(order: Order, wish: HubWish, again: str) -> None:
    """Download a repository and put it into place, with a description of its rows if it becomes a domain."""
    assert order.listed is not None
    atomic.write(order.stage.home / "revision", order.listed.revision)
    tree, files = order.stage.tree, order.listed.files
    if wish.columns is None:
        hub_files.fetch(order.listed, tree, again)
        # huggingface_hub's own state of the download
        shutil.rmtree(tree / ".cache", ignore_errors=True)
    else:
        apart = order.stage.home / "repository"
        apart.mkdir(parents=True, exist_ok=True)
        if not any("*" in column for column in wish.columns.values()):
            # a wrong column is reported after the first file, not after the last
            first = hub_files.fetch_one(order.listed, hub_rows.first_parquet(order.listed, wish.repo), apart, again)
            hub_rows.check_columns(order.listed, wish.columns, first)
        hub_files.fetch(order.listed, apart, again)
        archives.remove(tree)
        with full_disk(apart, None, again):
            hub_rows.convert(order.name, order.listed, wish, apart, order.stage.tree)
        files = sizes_below(tree)
    receipt = Receipt(wish.repo, f"the Hub, {wish.repo}", sum(files.values()), "", None, (wish.repo,), files)
    order.stage.finish(order.name, order.listed.revision, [receipt])


def _link(order: Order) -> None:
    """Link the data root's folder to the user's unpacked tree, which stays where it is."""
    assert order.tree is not None
    target, tree = order.stage.target, order.tree.resolve()
    if target.exists() or target.is_symlink():
        raise DataError(
            f"{target} is there already, and {order.name} cannot be read from it", f"move it away; then it can point at {tree}"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(tree, target_is_directory=True)
    order.note, folder = orders.readable(catalog.lookup(order.name, target.parent), target.parent)
    if folder is None:
        target.unlink()
        raise DataError(
            f"{tree} does not hold `{order.name}` in a layout that is known",
            f"docs/data.md lists the layouts; {order.page} has the official files",
        )
    order.note = f"{order.note}; the files stay in {tree}"


def by_hand_hint(name: str) -> str:
    """Return how to download in a browser instead."""
    return f"download it in a browser, then run: dgbench download {name} --from FOLDER"
