"""Run folders: creating a new one, claiming one of the user's choice, and finding one by name."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path

from dgbench import locks, temporaries
from dgbench.errors import ResultError, suggest

RUNS = "runs"  # the default folder of runs, in the working folder
_STAMP = re.compile(r"^\d{8}T\d{6}Z")


def new_run(root: Path | str, stem: str) -> Path:
    """Create and return a run folder `<root>/<utc time>-<stem>`, never one that exists."""
    base = f"{_stamp()}-{re.sub(r'[^A-Za-z0-9._-]+', '-', stem).strip('-')}"
    Path(root).mkdir(parents=True, exist_ok=True)
    for name in (base, *(f"{base}-{n}" for n in range(2, 100))):
        try:
            (Path(root) / name).mkdir()
        except FileExistsError:
            continue
        return Path(root) / name
    raise ResultError(f"100 runs named {base} exist in {root}", "remove some of them")


def claim_run(folder: Path, *, locked: bool = False) -> Path:
    """Create and return a run folder of the user's choice.

    Args:
        locked: this process holds the folder already.

    Raises: ResultError if it is not empty, or another process trains in it.
    """
    if not locked:
        locks.check_free(folder)
    if folder.is_dir():
        temporaries.clear(folder, shared=True)  # a kill while the first file was written leaves a folder that can be trained in
    if (folder / "recipe.yaml").is_file():
        raise ResultError(f"{folder} holds a run already", f"go on with it: dgbench train --resume {folder}")
    if folder.exists() and (not folder.is_dir() or any(path.name not in locks.OURS for path in folder.iterdir())):
        raise ResultError(f"{folder} exists and is not empty", "choose a new folder for --out")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def find_run(text: str = "latest", root: Path | str = RUNS, *, needs: str = "recipe.yaml") -> Path:
    """Return the run folder meant by `text`: a folder, a record in it, a name below `root`, or `latest`.

    Args:
        needs: what a folder must hold to count as a run; `latest` skips those without it.

    Raises: ResultError saying which runs exist.
    """
    runs = sorted((p.parent for p in Path(root).glob(f"*/{needs}")), key=_age)
    if text == "latest":
        if not runs:
            raise ResultError(f"no run with {needs} in {root}", "train one: dgbench train streets/mfuser")
        return runs[-1]
    path = next((p for p in (Path(text), Path(root) / text) if p.exists()), None)
    if path is None:
        close = suggest(text, [run.name for run in runs])
        latest = ", ".join(run.name for run in runs[-3:]) or "none yet"
        raise ResultError(f"no run `{text}`", f"did you mean `{close}`?" if close else f"runs in {root}: {latest}")
    folder = path.parent if path.is_file() else path
    if not (folder / needs).exists():
        what = "a run" if needs == "recipe.yaml" else f"a run with {needs}"
        raise ResultError(f"{folder} is not {what}: it has no {needs}", "give a run folder, a record in one, or `latest`")
    return folder


def _age(run: Path) -> tuple[str, str]:
    # the name contains the time, which is still right after a copy has changed the files' dates
    if stamp := _STAMP.match(run.name):
        return stamp[0], run.name
    return _stamp(datetime.fromtimestamp(run.stat().st_mtime, UTC)), run.name


def _stamp(now: datetime | None = None) -> str:
    return (now or datetime.now(UTC)).strftime("%Y%m%dT%H%M%SZ")
