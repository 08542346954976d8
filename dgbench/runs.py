"""Run folders: creating a new one, claiming one of the user's choice, and finding one by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from dgbench import locks, temporaries
from dgbench.errors import ResultError, suggest

RUNS = "runs"  # the usual folder of runs, in the working folder
_OF_SEED = "seed-"  # a run of `train --seeds`, in a folder of all its runs
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
    if any(folder.glob(f"{_OF_SEED}*/recipe.yaml")):
        raise ResultError(f"{folder} holds runs of several seeds already", f"go on with them: dgbench train --resume {folder}")
    if folder.exists() and (not folder.is_dir() or any(path.name not in locks.OURS for path in folder.iterdir())):
        raise ResultError(f"{folder} exists and is not empty", "choose a new folder for --out")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def belongs_to_run(path: Path) -> bool:
    """Whether a file is one that a run consists of: its recipe, log, records, matrices or checkpoint."""
    whole = Path(path).absolute()
    if whole.match("checkpoint/step-*/*"):
        return True
    own = whole.name in ("recipe.yaml", "log.jsonl", "speed.jsonl") or re.fullmatch(r"(record|confusion)-.+\..+", whole.name)
    # a recipe of the user's own has none of these beside it
    begun = any(path for name in ("checkpoint", "log.jsonl", "record-*.json") for path in whole.parent.glob(name))
    return bool(own) and begun and (whole.parent / "recipe.yaml").is_file()


def seed_run(folder: Path, seed: int) -> Path:
    """Return the run of this seed in a folder of runs that differ in their seeds."""
    return folder / f"{_OF_SEED}{seed}"


def runs_in(folder: Path, *, needs: str = "recipe.yaml") -> list[Path]:
    """Return the runs in a folder of runs, by name, those of several seeds in their order; a run itself holds none."""
    found = {p.parent for p in (*folder.glob(f"*/{needs}"), *folder.glob(f"*/{_OF_SEED}*/{needs}"))}
    return sorted(found, key=lambda run: (run.parent, _number(run), run.name))


def of_one_call(runs: Sequence[Path]) -> bool:
    """Whether these are runs that one call of `train --seeds` began."""
    return len({run.parent for run in runs}) == 1 and all(run.name.startswith(_OF_SEED) for run in runs)


def find_runs(text: str = "latest", root: Path | str = RUNS, *, needs: str = "recipe.yaml") -> list[Path]:
    """Return the run meant by `text` as `find_run` does, or all runs of the folder of runs that it names.

    `latest` means all runs of `train --seeds` if that began the newest.

    Args:
        needs: what a run must hold if it was not named itself.

    Raises: ResultError saying which runs exist.
    """
    if text == "latest":
        run = find_run(text, root, needs=needs)
        return runs_in(run.parent, needs=needs) if run.parent != Path(root) else [run]
    for folder in (Path(text), Path(root) / text):
        if not (folder / "recipe.yaml").exists() and (found := runs_in(folder, needs=needs)):
            return found
    return [find_run(text, root)]


def find_run(text: str = "latest", root: Path | str = RUNS, *, needs: str = "recipe.yaml") -> Path:
    """Return the run folder meant by `text`: a folder, a record in it, a name below `root`, or `latest`.

    Args:
        needs: what a folder must hold to count as a run; `latest` skips those without it.

    Raises: ResultError saying which runs exist.
    """
    runs = sorted(runs_in(Path(root), needs=needs), key=_age)
    if text == "latest":
        if not runs:
            raise ResultError(f"no run with {needs} in {root}", "train one: dgbench train streets/mfuser")
        return runs[-1]
    path = next((p for p in (Path(text), Path(root) / text) if p.exists()), None)
    if path is None:
        names = [run.relative_to(root).as_posix() for run in runs]
        close = suggest(text, names)
        latest = ", ".join(names[-3:]) or "none yet"
        raise ResultError(f"no run `{text}`", f"did you mean `{close}`?" if close else f"runs in {root}: {latest}")
    folder = path.parent if path.is_file() else path
    if not (folder / needs).exists():
        what = "a run" if needs == "recipe.yaml" else f"a run with {needs}"
        raise ResultError(f"{folder} is not {what}: it has no {needs}", "give a run folder, a record in one, or `latest`")
    return folder


def scored_run(text: str, root: Path | str = RUNS) -> Path:
    """Return the run folder meant by `text`, whose checkpoint is to be used.

    Raises: ResultError saying which runs exist.
    """
    # a run that stopped early is passed over by `latest`, but is refused by its own name with what to do about it
    return find_run(text, root, needs="checkpoint" if text == "latest" else "recipe.yaml")


def _age(run: Path) -> tuple[str, int, str]:
    # the name tells the time even after a copy has changed the files' dates; of several seeds, that of their folder
    stamp = _STAMP.match(run.name) or (_STAMP.match(run.parent.name) if run.name.startswith(_OF_SEED) else None)
    return stamp[0] if stamp else _stamp(datetime.fromtimestamp(run.stat().st_mtime, UTC)), _number(run), run.name


def _number(run: Path) -> int:
    number = run.name.removeprefix(_OF_SEED)
    return int(number) if run.name.startswith(_OF_SEED) and number.isdecimal() else 0


def _stamp(now: datetime | None = None) -> str:
    return (now or datetime.now(UTC)).strftime("%Y%m%dT%H%M%SZ")
