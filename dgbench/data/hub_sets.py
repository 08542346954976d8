"""Rows that `dgbench download --hub` stored below a domain's folder: `hub/<split>/` of `datasets`, and `hub/source.json`.

`source.json` says which repository and commit they are from and how their labels are read. A folder of them below the data
root is a domain with the folder's name.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgbench.data.domain import Domain, Layout, Role, Split
from dgbench.errors import DataError

if TYPE_CHECKING:
    import datasets

HUB = "hub"
SOURCE = f"{HUB}/source.json"
BESIDE = ("panoptic",)  # encodings with a further file beside the labels


def names(root: Path) -> list[str]:
    """Return the folders below the data root that hold such rows."""
    return sorted(path.parents[1].name for path in root.glob(f"*/{SOURCE}"))


def domain(name: str, root: Path) -> Domain | None:
    """Return the row of a downloaded data set; None if there is none of this name.

    Raises: DataError if its description is damaged.
    """
    told = _source(root / name)
    if told is None:
        return None
    splits = {split: Split(int(count)) for split, count in told.get("splits", {}).items()}
    role: Role = "both" if len(splits) > 1 else "source" if "train" in splits else "target"
    pinned = [told[key] for key in ("repository", "revision", "encoding", "label_map")] + [told.get("columns")]
    return Domain(
        name=name,
        title=f"{told['repository']} on the Hub",
        role=role,
        splits=splits,
        size="varies",
        label_map=told["label_map"],
        licence=told.get("licence") or "",
        access="own",
        folders=(name,),
        digest=hashlib.sha256(json.dumps(pinned, sort_keys=True).encode()).hexdigest()[:12],
    )


def layout(folder: Path, split: str) -> Layout | None:
    """Return how the rows of a split in a domain's folder are read; None if there are none. `images` is the folder of the rows.

    Raises: DataError if their description is damaged.
    """
    if not (folder / HUB / split / "dataset_info.json").is_file():
        return None
    told = _source(folder)
    if told is None:
        return None
    revision = f"hub {told['repository']}@{told['revision']}"
    return Layout(f"rows of {told['repository']}", f"{HUB}/{split}", (), told["encoding"], told["label_map"], revision=revision)


def opened(path: Path) -> datasets.Dataset:
    """Return the rows of a folder: `id` (string), `image` and `label`, each {"bytes", "path"} with the bytes as stored.

    A path or URL in a row is not trusted, and may be another machine's: it is replaced by None, and
    a row without bytes is refused when it is read.

    Raises: DataError if the folder is damaged or holds something else.
    """
    import datasets

    try:
        rows = datasets.load_from_disk(path)
        kinds = rows.features
        if getattr(kinds["id"], "dtype", None) != "string" or not all(isinstance(kinds[p], datasets.Image) for p in _PARTS):
            raise ValueError("it does not hold an id, an image and a label")
        rows = rows.select_columns(["id", *_PARTS])
        for part in _PARTS:
            rows = rows.cast_column(part, datasets.Image(decode=False))
        return rows.with_transform(_bytes_alone)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged: {error}", f"remove {path.parents[1]} and download the set again") from None


_PARTS = ("image", "label")


def _bytes_alone(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    kept = dict(batch)
    for part in [part for part in _PARTS if part in batch]:
        kept[part] = []
        for place, value in enumerate(batch[part]):
            content = value["bytes"] if value is not None else None
            if content is None:
                row = batch["id"][place] if "id" in batch else place
                raise DataError(f"row {row} has no bytes of its {part}", "a path in a row is never opened: fetch the set again")
            kept[part].append({"bytes": content, "path": None})
    return kept


_SPLIT = re.compile(r"\w[\w.-]*")  # the name of a folder, not a path that leads elsewhere


def _source(folder: Path) -> dict[str, Any] | None:
    path = folder / SOURCE
    try:
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}", f"remove {folder} and download the set again") from None
    lacking = {"repository", "revision", "encoding", "label_map"} - set(told) if isinstance(told, dict) else {"everything"}
    if lacking:
        raise DataError(f"{path} lacks {', '.join(sorted(lacking))}", f"remove {folder} and download the set again")
    told.setdefault("splits", {})
    splits = told["splits"]
    sound = isinstance(splits, dict) and all(
        _SPLIT.fullmatch(name) and type(count) is int and count > 0 for name, count in splits.items()
    )
    if not sound or not all(isinstance(told[key], str) for key in ("repository", "revision", "encoding", "label_map")):
        raise DataError(
            f"{path} is damaged: `splits` are names with counts, everything else is text",
            f"remove {folder} and download the set again",
        )
    if told["encoding"] in BESIDE:
        raise DataError(
            f"{path}: rows cannot hold `{told['encoding']}` labels, whose table lies in a file beside them",
            f"remove {folder}, and lay the set's files out in folders (docs/data.md)",
        )
    return told
