"""Per-image confusion matrices in a file: (n, K, K) counts and the ids of the images they belong to."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dgbench import untrusted

_BYTES = 1 << 30  # packed or not: 25,000 images of 19 classes are 72 MB


@dataclass(frozen=True, slots=True)
class Matrices:
    """Counts (n, K, K) by image, and the images' ids; None in older files without ids."""

    ids: tuple[str, ...] | None
    counts: NDArray[np.int64]
    note: str = ""  # further text that is stored with them


def packed(counts: NDArray[np.int64], ids: Sequence[str] | None = None, note: str = "") -> bytes:
    """Return an `.npz` of counts (n, K, K), n ids and a text."""
    if ids is not None and len(ids) != len(counts):
        raise ValueError(f"{len(counts)} matrices and {len(ids)} ids")
    arrays: dict[str, NDArray[np.generic]] = {"confusion": np.asarray(counts, dtype=np.int64)}
    if ids is not None:
        arrays["images"] = np.array(ids, dtype=np.str_)
    if note:
        arrays["note"] = np.array(note, dtype=np.str_)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def unpacked(path: Path, sha256: str = "") -> Matrices:
    """Read what `packed` made, with or without ids. Nothing is unpickled.

    Args:
        sha256: of the file, where it is known.

    Raises: OSError or ValueError saying what is wrong with the file.
    """
    content = untrusted.read_bytes(path, _BYTES)
    if sha256 and hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError("it is damaged or another file: its sha256 is not the one in the record")
    data = io.BytesIO(content)
    try:
        with zipfile.ZipFile(data) as archive:
            if sum(member.file_size for member in archive.infolist()) > _BYTES:
                raise ValueError(f"it unpacks to more than {_BYTES:,} bytes")
        data.seek(0)
        with np.load(data, allow_pickle=False) as file:
            counts, ids = np.asarray(file["confusion"]), np.asarray(file["images"]) if "images" in file else None
            note = str(file["note"]) if "note" in file else ""
    except (KeyError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, RuntimeError) as error:
        raise ValueError(str(error) or type(error).__name__) from None
    if counts.ndim != 3 or counts.shape[1] != counts.shape[2] or counts.dtype.kind not in "iu" or counts.min(initial=0) < 0:
        raise ValueError(f"it holds {counts.dtype} {counts.shape}, not counts (n, K, K)")
    if ids is not None and (ids.dtype.kind != "U" or ids.shape != counts.shape[:1]):
        raise ValueError(f"its ids are {ids.dtype} {ids.shape}, not a text for each of {len(counts)} matrices")
    return Matrices(None if ids is None else tuple(ids.tolist()), counts.astype(np.int64), note)


def paired(a: Matrices, b: Matrices) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the counts of both, image i of one being image i of the other: matched by id, in the order of `a`.

    Raises: ValueError if a side has no ids, an id twice, or ids that the other has not.
    """
    if a.ids is None or b.ids is None:
        raise ValueError("the matrices do not say which images they belong to")
    place = {name: i for i, name in enumerate(b.ids)}
    if len(place) < len(b.ids) or len(set(a.ids)) < len(a.ids):
        raise ValueError("an image occurs twice")
    if lone := sorted(set(a.ids) ^ set(b.ids)):
        raise ValueError(f"{len(lone)} images are in only one of them, the first is {lone[0]}")
    if a.counts.shape != b.counts.shape:
        raise ValueError(f"the numbers of classes differ: {a.counts.shape[1]} and {b.counts.shape[1]}")
    return a.counts, b.counts[[place[name] for name in a.ids]]
