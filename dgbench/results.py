"""Records: one immutable, typed JSON file per result, kept in the folder of the run that made it.

There is no database: deleting a run's folder deletes its results. A file is written completely or not at all, and a reader
only considers names `record-*.json`, which partly written files never have.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dgbench import atomic
from dgbench.errors import ResultError
from dgbench.runs import RUNS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from pydantic import TypeAdapter

    from dgbench.matrices import Matrices

SCHEMA = 2
_READS = (1, SCHEMA)  # fields that a schema does not have take their default
_log = logging.getLogger(__name__)
_RECORD_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One measurement: a checkpoint on a split of a domain, or the end of a training.

    `severity` is a score that no leaderboard ranks: on corrupted images, or on fewer than its run is scored on.

    Fractions are 0..1, seconds are wall time. None means unknown or undefined, never zero.
    """

    __pydantic_config__: ClassVar[dict[str, bool]] = {"strict": True, "allow_inf_nan": False}  # of what is read

    id: str
    kind: Literal["eval", "train", "severity"]
    created: str  # UTC, ISO 8601
    method: str
    variant: str = ""  # towers and options that distinguish builds of a method, e.g. "dinov2_l + eva02, mvfuser"
    recipe: str
    recipe_hash: str
    source: str
    target: str  # the source itself for its validation split
    split: str
    protocol: str = ""
    protocol_digest: str = ""  # of the protocol alone
    protocol_hash: str = ""  # of the protocol and what determines the domain's pixels and labels
    miou: float | None = None
    iou: tuple[float | None, ...] = ()  # per class, None for a class in neither label nor prediction
    interval: tuple[float | None, float | None] = (None, None)  # 95 %, over images: metrics.interval
    n_images: int = 0
    n_available: int = 0  # images of the complete split; more than n_images marks a partial score
    n_extra: int = 0  # images on the disk in addition to the published ones; it is not known which ones were scored
    rendered: bool = False  # the target is an export of a rendered domain in the files of a real set
    source_images: int = 0  # images trained on; 0: unknown, as in schema 1
    source_available: int = 0  # images of the complete source split; of a rendered source as many as were drawn
    source_rendered: bool = False  # trained on an export of a rendered domain
    seconds: dict[str, float | None] = field(default_factory=dict)  # data, model, metric, total; compile, where there was any
    seed: int = 0
    steps: int = 0
    checkpoint: str = ""  # sha256 of the weights
    backends: dict[str, str] = field(default_factory=dict)  # op -> backend that ran
    environment: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    dirty: bool | None = None
    confusion: str | None = None  # file beside the record with the (n, K, K) counts
    confusion_sha256: str = ""  # of that file; "": unknown, as in older records
    extra: dict[str, float | str | None] = field(default_factory=dict)  # what one kind alone measures, e.g. the last loss
    digest: str = ""  # sha256 of the file's text with this value left empty; "": unknown, as in older records
    schema: int = SCHEMA
    path: Path | None = field(default=None, compare=False)  # where it was read from; not in the file

    @property
    def complete(self) -> bool:
        """Whether the images of the split were scored: all of them, and no others."""
        return 0 < self.n_available == self.n_images and not self.n_extra

    @property
    def source_complete(self) -> bool | None:
        """Whether the model was trained on the images of the source's split, all of them and no others; None: unknown."""
        if not (self.source_images and self.source_available):
            return None
        return self.source_images == self.source_available

    @property
    def run(self) -> Path | None:
        """The folder it was read from."""
        return self.path.parent if self.path else None


_STORED = frozenset(f.name for f in dataclasses.fields(Record)) - {"path"}


def new_id(now: datetime | None = None) -> str:
    """Return a new record id that sorts by time: `20261124T021500123Z-9f3a1c`."""
    now = now or datetime.now(UTC)
    return f"{now:%Y%m%dT%H%M%S}{now.microsecond // 1000:03d}Z-{os.urandom(3).hex()}"


def now_iso() -> str:
    """Return the UTC time in ISO 8601, to the millisecond: records of one evaluation keep their order."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def write(
    record: Record, folder: Path, confusion: NDArray[np.int64] | None = None, images: Sequence[str] | None = None
) -> Record:
    """Write a record, and the per-image matrices (n, K, K) beside it; return it with `path` and `confusion` filled in.

    Args:
        images: the ids of the n images, by which matrices of two records are paired.

    The matrices come first, so a record never names a file that is not there. Records are never overwritten.

    Raises: ResultError if a record of this name exists; OSError naming the path if it cannot be written.
    """
    name = file_stem(record.id, record.kind, record.target, record.split)
    path = folder / f"record-{name}.json"
    if path.exists():
        raise ResultError(f"{path} exists; records are never overwritten", "give the new record its own id")
    if confusion is not None:
        file_name = f"confusion-{name}.npz"
        from dgbench import matrices

        packed = matrices.packed(confusion, images)
        atomic.write(folder / file_name, packed)
        record = dataclasses.replace(record, confusion=file_name, confusion_sha256=hashlib.sha256(packed).hexdigest())
    record = dataclasses.replace(record, digest="")
    record = dataclasses.replace(record, digest=_digest(to_json(record).encode()))
    atomic.write(path, to_json(record) + "\n")
    return dataclasses.replace(record, path=path)


def _digest(text: bytes) -> str:
    return hashlib.sha256(text.rstrip(b"\n")).hexdigest()


_DIGEST = re.compile(rb'(?<="digest": ")[0-9a-f]{64}(?="\n\}\n?\Z)')


def file_stem(id_: str, kind: str, target: str, split: str) -> str:
    """Return the common part of the names of a record's files: `record-STEM.json`, `confusion-STEM.npz`."""
    # "@" and "/" may occur in names of domains, the file must stay one portable name
    return f"{id_}-{kind}-{re.sub(r'[^A-Za-z0-9._-]+', '_', target)}-{split}"


def to_json(record: Record) -> str:
    """Return the record as it is stored: indented JSON in field order, non-finite numbers as null."""
    content = {f.name: getattr(record, f.name) for f in dataclasses.fields(record) if f.name != "path"}
    digest = {"digest": content.pop("digest")}  # comes last
    return json.dumps(
        {"schema": content.pop("schema"), **finite(content), **digest}, indent=1, ensure_ascii=False, allow_nan=False
    )


def read(path: Path) -> Record:
    """Read one record. Its content is not trusted: the type of every field is checked, and the bounds of numbers and texts.

    Raises: ResultError naming the file and the field at fault.
    """
    from pydantic import ValidationError

    from dgbench import bounds, untrusted

    try:
        data = untrusted.read_bytes(path, _RECORD_BYTES)
        content = untrusted.read_object(data)
    except FileNotFoundError:
        raise ResultError(f"no record {path}", "`dgbench leaderboard` lists the records") from None
    except ValueError as error:
        raise ResultError(f"{path} {error}", "restore or remove the file") from None
    if content is None or "schema" not in content:
        raise ResultError(f"{path} is not a record of dgbench", "records are written by `dgbench train` and `dgbench eval`")
    schema = content["schema"]
    if type(schema) is not int or schema not in _READS:
        raise ResultError(
            f"{path} has record schema {untrusted.shortened(schema)}, this dgbench reads schemas 1 and {SCHEMA}",
            "score the checkpoint again with `dgbench eval`, or use the dgbench version that wrote it",
        )
    if strange := sorted(content.keys() - _STORED):
        raise ResultError(f"{path}: {strange[0][:40]}: unknown field", "restore or remove the file")
    try:
        # validated from the text, because in JSON mode pydantic accepts a list for a tuple
        record = _adapter().validate_json(data)
        problem = bounds.problem(record)
    except ValidationError as error:
        problem = untrusted.in_words(error.errors(include_url=False)[0])
    if not problem and record.digest and _digest(_DIGEST.sub(b"", data)) != record.digest:
        problem = "is damaged or was changed: its content does not match its digest"
    if problem:
        raise ResultError(f"{path}: {problem}", "restore or remove the file")
    return dataclasses.replace(record, path=path)


@cache
def _adapter() -> TypeAdapter[Record]:
    from pydantic import TypeAdapter

    return TypeAdapter(Record)


def query(root: Path | str = RUNS) -> list[Record]:
    """Return all records below a folder, oldest first. A file that cannot be read is skipped with a warning.

    Raises: ResultError if there is no such folder; only the default one may be missing, before the first run.
    """
    records, problems = scan(root)
    for problem in problems:
        _log.warning("%s; it is left out", problem)
    return records


def scan(root: Path | str = RUNS) -> tuple[list[Record], list[str]]:
    """Return all records below a folder, oldest first, and a line for each file or folder that cannot be read.

    Raises: as `query`.
    """
    root = Path(root)
    if root == Path(RUNS) and not root.exists():
        return [], []
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "there is no such folder"
        raise ResultError(f"no runs in {root}: {what}", "name the folder that holds them: --runs FOLDER")
    found: list[Record] = []
    problems: list[str] = []
    for path in sorted(_record_files(str(root), problems)):
        try:
            found.append(read(Path(path)))
        except ResultError as error:
            problems.append(error.message)
    return sorted(found, key=lambda record: (record.created, record.id)), problems


def _record_files(root: str, problems: list[str]) -> Iterator[str]:
    """Paths of records at any depth; links to folders are not followed. Folders that cannot be listed go into `problems`."""
    folders = [root]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    elif entry.name.startswith("record-") and entry.name.endswith(".json"):
                        yield entry.path
        except OSError as error:
            problems.append(f"{folder} cannot be listed: {error.strerror}")


def read_matrices(record: Record) -> Matrices:
    """Return the per-image matrices kept beside a record, and the ids of the images; ids are None in older files.

    Raises: ResultError if the record has none or the file is missing, damaged or not the one that was written with it.
    """
    from dgbench import matrices

    if record.path is None or record.confusion is None:
        raise ResultError(f"record {record.id} has no per-image matrices", "score the checkpoint again with `dgbench eval`")
    path = record.path.parent / record.confusion
    try:
        return matrices.unpacked(path, record.confusion_sha256)
    except FileNotFoundError:
        raise ResultError(f"{path} is not there", "score the checkpoint again with `dgbench eval`") from None
    except (OSError, ValueError) as error:
        raise ResultError(f"{path} cannot be read: {error}", "score the checkpoint again with `dgbench eval`") from error


def read_confusion(record: Record) -> NDArray[np.int64]:
    """Return the per-image matrices (n, K, K) alone.

    Raises: as `read_matrices`.
    """
    return read_matrices(record).counts


def paired(a: Record, b: Record) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the matrices of two records for `report.statistics.difference`: (n, K, K) each, matched by the images' ids.

    Raises: ResultError if they are scores of different things, a file has no ids, or the ids differ.
    """
    from dgbench import matrices

    for name in ("target", "split", "protocol_hash"):
        if (one := getattr(a, name)) != (other := getattr(b, name)):
            raise ResultError(
                f"records {a.id} and {b.id} cannot be paired: {name} is {one} in one and {other} in the other",
                "pair scores of one split under one protocol",
            )
    try:
        return matrices.paired(read_matrices(a), read_matrices(b))
    except ValueError as error:
        raise ResultError(
            f"records {a.id} and {b.id} cannot be paired: {error}",
            "score both checkpoints again on the same images with `dgbench eval`",
        ) from None


def finite(value: Any) -> Any:
    """Return JSON-able data with NaN and infinities as None, since JSON does not have them."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if type(value).__module__ == "numpy":
        return finite(value.item())
    return value
