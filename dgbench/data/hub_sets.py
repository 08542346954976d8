"""Rows that `dgbench download --hub` left below a domain's folder: `hub/<split>/` of datasets' own, and `hub/source.json`.

`source.json` says which repository and commit they are from and how their labels are read. A folder of them below the data
root is a domain of its own, called after the folder.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dgbench.data.domain import Domain, Layout, Role, Split
from dgbench.errors import DataError

HUB = "hub"
SOURCE = f"{HUB}/source.json"


def names(root: Path) -> list[str]:
    """The folders below the data root that hold such rows."""
    return sorted(path.parents[1].name for path in root.glob(f"*/{SOURCE}"))


def domain(name: str, root: Path) -> Domain | None:
    """The row of a fetched set; None if there is none of this name.

    Raises: DataError if its description is damaged.
    """
    told = _source(root / name)
    if told is None:
        return None
    splits = {split: Split(int(count)) for split, count in told.get("splits", {}).items()}
    role: Role = "both" if len(splits) > 1 else "source" if "train" in splits else "target"
    pinned = [told[key] for key in ("repository", "revision", "encoding", "label_map")] + [told.get("columns")]
    return Domain(
        name=name, title=f"{told['repository']} on the Hub", role=role, splits=splits, size="varies",
        label_map=told["label_map"], licence=told.get("licence") or "", access="own", folders=(name,),
        digest=hashlib.sha256(json.dumps(pinned, sort_keys=True).encode()).hexdigest()[:12],
    )  # fmt: skip


def layout(folder: Path, split: str) -> Layout | None:
    """How the rows of a split in a domain's folder are read; None if there are none. `images` is the folder of the rows.

    Raises: DataError if their description is damaged.
    """
    if not (folder / HUB / split / "dataset_info.json").is_file():
        return None
    told = _source(folder)
    if told is None:
        return None
    revision = f"hub {told['repository']}@{told['revision']}"
    return Layout(f"rows of {told['repository']}", f"{HUB}/{split}", (), told["encoding"], told["label_map"], revision=revision)


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
    return told
