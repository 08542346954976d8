"""`dgbench download`: towers' weights, domains' official archives, and data sets of the Hub, by name.

First the plan is made and shown (`Plan`); then a few files at a time are transferred, checked and unpacked. One
domain's failure does not affect the others.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dgbench.data import catalog, domains
from dgbench.data.places import data_root
from dgbench.download import csdownload, given, orders
from dgbench.download.acquire import Problem, Problems, Work, acquire, by_hand_hint, told
from dgbench.download.addresses import check_mirror
from dgbench.download.given_weights import GivenWeights, matched
from dgbench.download.hub_rows import HubWish
from dgbench.download.orders import Need, Order, Plan, State
from dgbench.download.sources import source
from dgbench.download.stage import Manifest, read_manifest
from dgbench.download.transfer import Patience, Transfer
from dgbench.errors import DataError, DgbenchError, unknown
from dgbench.progress import Bars, Silent

if TYPE_CHECKING:
    from mfuser.towers.hub import Fetched


@dataclass(frozen=True, slots=True)
class Stored:
    """One domain after `download`."""

    name: str
    state: Literal["downloaded", "unpacked", "linked", "here"]
    folder: str
    files: int | None  # in the manifest; None for a folder that dgbench did not make
    bytes: int | None
    checked: str | None  # what its archives were compared with
    revision: str | None  # of a Hub repository
    note: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a command."""

    rows: tuple[Fetched | Stored, ...]
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class Options:
    """Options of a download.

    `ask` shows terms and returns whether the user accepts them; None refuses. `show` is called with the plan before transfers.
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
    """Return what `download` would do. Sizes are asked of servers unless DGBENCH_OFFLINE=1; one that fails is reported.

    Raises: DataError for an unknown name.
    """
    options = options or Options()
    problems = Problems()
    towers, weights, wanted = _worked_out(names, options, wish, problems)
    if problems.found:
        raise DataError(problems.found[0].message, problems.found[0].hint)
    transfer = Transfer(options.patience)
    for order, refusal in orders.ask_servers([order for order in wanted if _forbidden(order) is None], transfer):
        order.note = refusal.message
    transfer.close()
    return orders.plan(wanted, _tower_needs(towers, weights), data_root(options.root), options.jobs)


def download(names: Sequence[str], options: Options | None = None, wish: tuple[str, HubWish] | None = None) -> Outcome:
    """Download towers and domains by name; all names are checked before anything is downloaded.

    Args:
        wish: name and description of a Hub repository that becomes a domain.

    Raises: DgbenchError for an unknown name, too little space, or terms that are not accepted; StoppedError if the user stops it;
        mfuser's DownloadError where it forbids downloads. Errors of a single domain or tower are in `problems`.
    """
    options = options or Options()
    problems = Problems()
    towers, weights, wanted = _worked_out(names, options, wish, problems)
    root = data_root(options.root)
    moving = [order for order in wanted if not order.here and (order.given or not order.by_hand)]
    again = f"run again: {options.command}"
    if forbidden := [order for order in moving if _forbidden(order)]:
        listed = ", ".join(f"{order.name} ({_gigabytes(order)})" for order in forbidden)
        raise DataError(
            f"{_forbidden(forbidden[0])} forbids downloads; not on this machine: {listed}",
            f"where there is a network, run: {options.command}, and copy {root} here; archives that are here already "
            "are taken from --from FOLDER",
        )
    for order in [order for order in moving if order.way == "csDownload" and order.uses_network]:
        try:
            csdownload.check(by_hand_hint(order.name))
        except DataError as error:
            problems.add(order, error)
            moving.remove(order)
            wanted.remove(order)
    transfer = Transfer(options.patience, options.bars.advance, options.bars.note)
    with ExitStack() as stack:
        stack.callback(transfer.close)
        for order in wanted:
            try:
                with told():
                    if order.here and read_manifest(order.stage.target):
                        order.stage.sweep()
                    elif order in moving and order.tree is None:
                        stack.enter_context(order.stage.locked())
            except DataError as error:
                problems.add(order, error)
        for order, refusal in orders.ask_servers([order for order in moving if order not in problems.orders], transfer):
            problems.add(order, refusal)
        moving = [order for order in moving if order not in problems.orders]
        wanted = [order for order in wanted if order not in problems.orders]
        if moving:
            _check_room_and_terms(wanted, _tower_needs(towers, weights), root, options)
        rows: list[Fetched | Stored] = list(_towers(towers, weights, options.bars, problems))
        acquire(moving, Work(transfer, options.bars, options.patience, options.jobs, again), problems)
        for order in wanted:
            if order.by_hand:
                problems.add(order, _by_hand(order))
            elif order not in problems.orders:
                rows.append(_stored(order))
    return Outcome(tuple(rows), tuple(problems.found))


def _worked_out(
    names: Sequence[str], options: Options, wish: tuple[str, HubWish] | None, problems: Problems
) -> tuple[list[str], list[GivenWeights], list[Order]]:
    """Return the towers among the names, the local files given for them, and an order for each domain that can be resolved."""
    given.check(options.from_paths)
    if options.mirror is not None:
        check_mirror(options.mirror)
    root = data_root(options.root)
    towers, rows = [], []
    for name in dict.fromkeys(names):
        if domains.built_in(name.partition("@")[0]) is None:
            towers.append(_tower(name, root))
            continue
        row = catalog.lookup(name, root)
        if row.procedural:
            raise DataError(f"`{row.name}` is rendered here: there is nothing to download", f"dgbench data show {row.base}")
        rows.append(row)
    wanted: dict[Path, Order] = {}
    for row in rows:
        try:
            with told():
                order = orders.domain_order(row, source(row.name), root, options.from_paths, options.mirror, options.revision)
        except DataError as error:
            problems.add_name(row.name, error)
            continue
        wanted.setdefault(order.stage.target, order)  # acdc and acdc-fog are one folder
    if wish is not None:
        name, what = wish
        if domains.built_in(name) is not None or not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
            taken = domains.built_in(name) is not None
            why = "there is one of that name" if taken else "use letters a-z, digits, - and _ only"
            raise DataError(f"`{name}` cannot be the name of a new domain: {why}", "choose another with --as")
        wanted[root / name] = orders.hub_order(name, what, root)
    return towers, matched(towers, options.from_paths, alone=not rows and wish is None), list(wanted.values())


def _tower(name: str, root: Path) -> str:
    from mfuser.towers.table import TOWERS
    from mfuser.towers.weights import files

    if name in TOWERS:
        return name
    if not name.startswith("timm:"):
        if name in catalog.names(root):
            raise DataError(
                f"`{name}` is a domain of your own: its declaration does not say where its files come from",
                f"put them into {root}, or fetch a set of the Hub with --hub",
            )
        known = (alias for row in domains.DOMAINS.values() for alias in (row.name, *row.aliases))
        raise DgbenchError(*unknown("tower or domain", name, [*TOWERS, *known]))
    # imported here, because importing towers takes seconds
    from mfuser.towers.table import tower

    try:
        tower(name), files(name)
    except ValueError as error:
        raise DgbenchError(str(error), "docs/mfuser.md says which models of timm's are towers") from None
    return name


def _towers(towers: Sequence[str], weights: Sequence[GivenWeights], bars: Bars, problems: Problems) -> list[Fetched]:
    if not towers:
        return []
    from mfuser.towers import hub

    taken: dict[tuple[str, str | None, str | None], Fetched] = {}
    failed: list[str] = []
    rows: list[Fetched] = []
    for given_file in weights:
        with _told_of_tower(given_file.tower, failed, problems):
            row = given_file.take()
            taken[row.name, row.repo, row.file] = row
    towers = [tower for tower in towers if tower not in failed]
    if hub.offline():
        rows += hub.download(towers, bars.note)  # which names all that is not here in one message
    else:
        for tower in towers:
            with _told_of_tower(tower, failed, problems):
                rows += hub.download([tower], bars.note)
    return [taken.get((row.name, row.repo, row.file), row) for row in rows]


@contextmanager
def _told_of_tower(tower: str, failed: list[str], problems: Problems) -> Iterator[None]:
    """Within, what goes wrong is a problem of one tower."""
    from mfuser.towers.hub import DownloadError

    try:
        with told():
            yield
        return
    except DownloadError as error:
        problems.add_name(tower, DataError(error.message, error.hint))
    except DataError as error:
        problems.add_name(tower, error)
    failed.append(tower)


def _tower_needs(towers: Sequence[str], weights: Sequence[GivenWeights]) -> list[Need]:
    if not towers:
        return []
    from huggingface_hub.constants import HF_HUB_CACHE

    from mfuser.towers.weights import files

    needs = []
    for name in towers:
        missing = [file for file in files(name) if file.where is None]
        given_files = [row.file for row in weights if row.tower == name]
        state: State = "here" if not missing else "to copy" if len(given_files) == len(missing) else "to fetch"
        missing = missing if state == "to copy" else [file for file in missing if file not in given_files]
        size = int(sum(file.gigabytes for file in missing) * 1e9)
        licence = next((file.licence for file in files(name)), "")
        needs.append(Need(name, "tower", state, len(missing), size, licence, HF_HUB_CACHE, ""))
    return needs


def _check_room_and_terms(wanted: Sequence[Order], towers: Sequence[Need], root: Path, options: Options) -> None:
    made = orders.plan(wanted, towers, root, options.jobs)
    options.show(made)
    if made.room > made.free:
        raise DataError(
            f"not enough room: {made.room / 1e9:,.1f} GB are needed in {made.place} (unpacked files and {options.jobs} archives "
            f"at a time), {made.free / 1e9:,.1f} GB are free",
            "make room there, name fewer domains at once, or point --root or DGBENCH_DATA at a larger disk",
        )
    asking = [order for order in wanted if order.must_be_accepted]
    if not asking or options.accept:
        return
    terms = "\n".join(f"{order.title}: {order.terms}. Full text: {order.page}" for order in asking)
    if options.ask is None:
        raise DataError(
            f"these terms have to be accepted before the transfer:\n{terms}",
            f"read them, then accept them with --yes: {options.command} --yes",
        )
    if not options.ask(terms):
        raise DataError("the terms were not accepted: nothing was transferred", None)


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
    # the checksums inside archives were checked in any case
    told = [f"{what} of {n} archive{'s' * (n > 1)}" for what, n in (("md5", known), ("size", others)) if n]
    return ", ".join(told)


def _by_hand(order: Order) -> DataError:
    assert order.source is not None
    last = f"run: dgbench download {order.name} --from FOLDER, the folder that your browser downloads to"
    steps = "\n".join(f"  {n}. {step}" for n, step in enumerate((*order.source.steps, last), 1))
    missing = ", ".join(a.name for a in order.wanted)
    waiting = ", ".join(receipt.name for receipt in order.stage.receipts())
    kept = f"; unpacked already and waiting for it: {waiting}" if waiting else ""
    return DataError(f"`{order.name}` can only be downloaded in a browser. Missing: {missing}{kept}", f"\n{steps}")


def _forbidden(order: Order) -> str | None:
    """Return the variable that forbids an order's transfer, as `DGBENCH_OFFLINE=1`."""
    if not order.uses_network:
        return None
    if os.environ.get("DGBENCH_OFFLINE") == "1":
        return "DGBENCH_OFFLINE=1"
    if order.wish is None:
        return None
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return "HF_HUB_OFFLINE=1" if HF_HUB_OFFLINE else None


def _gigabytes(order: Order) -> str:
    known = [size for size in order.sizes.values() if size]
    files = f"{len(order.wanted)} files" if order.wanted else "on the Hub"
    return f"{files}, about {sum(known) / 1e9:,.1f} GB" if known else files
