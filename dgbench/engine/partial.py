"""Partial results of an evaluation, stored in the run folder, from which an interrupted evaluation continues.

`.scoring-KEY.npz` holds the matrices of one domain's scored images, and the id of the future record. KEY is a hash
of all that the matrices depend on (`key_of`): weights, protocol, images, batches, device, versions and code. Scores under
other conditions have another name, so they are never mixed. The file is written every few seconds and before the record,
and removed when all records of the evaluation are written; until then a second call finds the record by its id and writes
no other. If the same evaluation runs twice at once, the one that locks `.scoring-KEY.lock` stores its results.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import mfuser
from dgbench import atomic, locks, matrices, results, temporaries, untrusted
from dgbench.errors import ResultError

_EVERY = 5.0  # seconds between two writes; more if one takes long: writing takes at most 2 % of the time
_OLD = 3600.0  # seconds after which another process's file counts as abandoned
_ID = re.compile(r"\d{8}T\d{9}Z-[0-9a-f]{6}")
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?:[^./]*-)?(?P<pid>\d{1,9})\.tmp")  # as dgbench.temporaries names them
_SECONDS = ("data", "model", "metric", "total")
COMPILE = "compile"  # is there only where something was compiled


@dataclass(slots=True)
class Partial:
    """The scored part of one domain.

    `counts` (n, K, K) is filled where `done` (n,) says so; `seconds` and `backends` are of the part that is done.
    """

    run: Path
    key: str
    about: Mapping[
        str, str
    ]  # what it is a part of, by which it is recognized as stale: checkpoint, target, split, protocol, kind
    ids: Sequence[str]  # of the n images
    counts: NDArray[np.int64]
    done: NDArray[np.bool_]
    kept: bool  # whether this process stores it
    id: str = field(default_factory=results.new_id)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_SECONDS, 0.0))
    backends: dict[str, str] = field(default_factory=dict)
    _written: float = field(default_factory=time.perf_counter)
    _cost: float = 0.0

    @property
    def path(self) -> Path:
        """The file."""
        return _path(self.run, self.key)

    def restart(self) -> None:
        """Discard all matrices, but not the time that they took."""
        self.counts[:], self.done[:] = 0, False
        self.backends.clear()

    def record(self) -> results.Record | None:
        """Return the record of this very evaluation, if it was interrupted after it had been written."""
        path = self.recorded()
        if not path.exists():
            return None
        try:
            return results.read(path)
        except ResultError:
            self.id = results.new_id()  # the record is damaged: another is written
            return None

    def recorded(self) -> Path:
        """Return where the record of this evaluation is, or will be."""
        stem = results.file_stem(self.id, self.about["kind"], self.about["target"], self.about["split"])
        return self.run / f"record-{stem}.json"

    def save(self) -> None:
        """Write what is done."""
        if not self.kept:
            return
        began = time.perf_counter()
        note = {"id": self.id, "about": dict(self.about), "seconds": self.seconds, "backends": self.backends}
        where = np.flatnonzero(self.done)
        data = matrices.packed(self.counts[where], [self.ids[int(i)] for i in where], json.dumps(note))
        atomic.write(self.path, data)
        self._written = time.perf_counter()
        self._cost = self._written - began

    def save_in_time(self) -> None:
        """Write what is done if the last write is a while ago. A failing write is ignored: that of the record will fail."""
        if time.perf_counter() - self._written > max(_EVERY, 50 * self._cost):
            with contextlib.suppress(OSError):
                self.save()

    def remove(self) -> None:
        """Remove the file, after all records of the evaluation are written."""
        if self.kept:
            self.path.unlink(missing_ok=True)

    def _load(self) -> None:
        """Read what an earlier process stored; damaged parts are scored again."""
        try:
            found = matrices.unpacked(self.path)
            note = _note(found)
        except (OSError, ValueError):
            return
        place = {name: i for i, name in enumerate(self.ids)}
        if found.ids is None or note["about"] != self.about or found.counts.shape[1:] != self.counts.shape[1:]:
            return
        if len(place) < len(self.ids) or not set(found.ids) <= place.keys():
            return
        where = [place[name] for name in found.ids]
        self.counts[where], self.done[where] = found.counts, True
        self.id, self.seconds, self.backends = note["id"], note["seconds"], note["backends"]


@contextmanager
def opened(
    run: Path, key: str, about: Mapping[str, str], ids: Sequence[str], classes: int, *, stored: bool = True
) -> Iterator[Partial]:
    """Return what is stored in `run` under `key`, or an empty one; no other process stores it meanwhile.

    Args:
        stored: False for one of several processes, another of which stores it: an empty one.
    """
    counts = np.zeros((len(ids), classes, classes), np.int64)
    if not stored:
        yield Partial(run, key, about, ids, counts, np.zeros(len(ids), bool), kept=False)
        return
    lock = _lock(run, key)
    with locks.held(lock) as ours:
        partial = Partial(run, key, about, ids, counts, np.zeros(len(ids), bool), ours)
        if ours:
            partial._load()
            _remove_temporaries(run, lambda name: partial.id in name)
        try:
            yield partial
        finally:
            if ours:
                lock.unlink(missing_ok=True)


def key_of(**what: Any) -> str:
    """Return a 16-digit hash of all that matrices depend on, including the code."""
    text = json.dumps({**what, "code": _code()}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tidy(run: Path, stale: Callable[[Mapping[str, str]], bool]) -> None:
    """Remove files of ended processes: `stale` parts; unfinished files; matrices without a record."""
    for path in run.glob(".scoring-*.npz"):
        key = path.name.removeprefix(".scoring-").removesuffix(".npz")
        try:
            note = _note(matrices.unpacked(path))
        except (OSError, ValueError):
            note = None
        if note is not None and not stale(note["about"]):
            continue
        with _if_free(_lock(run, key)) as free:
            if free:
                path.unlink(missing_ok=True)
                if note is not None:
                    _remove_lone_matrices(run, _with(note["id"]))
    for path in run.glob("..scoring-*.tmp"):
        with _if_free(_lock(run, path.name.removeprefix("..scoring-").partition(".")[0])) as free:
            if free:
                path.unlink(missing_ok=True)
    for path in run.glob(".scoring-*.lock"):
        if not path.with_suffix(".npz").exists():
            with _if_free(path):
                pass
    _remove_lone_matrices(run, lambda name: _age(run / name) > _OLD)
    # writing a record takes less than an hour on any host; all other files belong to a training, if there is one
    _remove_temporaries(run, lambda name: False)
    with contextlib.suppress(ResultError):
        if any(_of_training(parts["name"]) for _, parts in _temporaries(run)):
            with locks.training(run) as alone:
                _remove_temporaries(run, lambda name: alone and _of_training(name))


def _of_training(name: str) -> bool:
    return not name.startswith(("record-", "confusion-", ".scoring-"))


def _temporaries(run: Path) -> list[tuple[Path, re.Match[str]]]:
    """Return the unfinished files of processes that are not running on this machine."""
    found = [(path, _TEMPORARY.fullmatch(path.name)) for path in run.glob(".*.tmp")]
    return [(path, parts) for path, parts in found if parts is not None and not temporaries.runs(int(parts["pid"]))]


def _remove_temporaries(run: Path, ours: Callable[[str], bool]) -> None:
    """Remove temporary files that are `ours`, and those that no process of another host is writing."""
    for path, parts in _temporaries(run):
        if ours(parts["name"]) or _age(path) > _OLD:
            path.unlink(missing_ok=True)


def _remove_lone_matrices(run: Path, ours: Callable[[str], bool]) -> None:
    """Remove matrices that are `ours` and that no record names."""
    for path in run.glob("confusion-*.npz"):
        record = path.with_name(f"record-{path.stem.removeprefix('confusion-')}.json")
        if not record.exists() and ours(path.name):
            named = (path.name.encode() in other.read_bytes() for other in run.glob("record-*.json") if other.is_file())
            if not any(named):
                path.unlink(missing_ok=True)


def _with(id_: str) -> Callable[[str], bool]:
    return lambda name: id_ in name


@contextmanager
def _if_free(lock: Path) -> Iterator[bool]:
    with locks.held(lock) as free:
        try:
            yield free
        finally:
            if free:
                lock.unlink(missing_ok=True)


def _note(found: matrices.Matrices) -> dict[str, Any]:
    """Return the note stored with the matrices. Raises: ValueError if it is anything else than `Partial.save` writes."""
    note = untrusted.read_object(found.note.encode()) or {}
    texts = [note.get("about"), note.get("backends")]
    if not all(isinstance(t, dict) and all(isinstance(value, str) for value in t.values()) for t in texts):
        raise ValueError("it does not say what it is of")
    seconds = note.get("seconds")
    if not isinstance(seconds, dict) or set(seconds) - {COMPILE} != set(_SECONDS):
        raise ValueError("it has no times")
    if not all(isinstance(value, float) and 0 <= value < 10**12 for value in seconds.values()):
        raise ValueError("its times are none")
    if not isinstance(note.get("id"), str) or not _ID.fullmatch(note["id"]):
        raise ValueError("it has no id")
    return note


def _path(run: Path, key: str) -> Path:
    return run / f".scoring-{key}.npz"


def _lock(run: Path, key: str) -> Path:
    return run / f".scoring-{key}.lock"


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


@cache
def _code() -> str:
    """Return a hash of the code itself: a commit does not include changes of a working tree."""
    digest = hashlib.sha256()
    ours, models = Path(__file__).parents[1], Path(mfuser.__file__).parent
    for root in (ours, models, ours.parent / "cuda"):
        for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".cu", ".cuh", ".h", ".cpp", ".yaml")):
            digest.update(f"{path.relative_to(root)}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
