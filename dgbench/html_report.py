"""The report of runs as one file of HTML: gathered from records, matrices and logs, with pictures made anew by the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dgbench import atomic, results
from dgbench.errors import DgbenchError, ResultError
from dgbench.progress import Progress
from dgbench.report.compare import Comparison
from dgbench.report.page import Page, gather
from dgbench.results import Record
from dgbench.runs import find_run


@dataclass(frozen=True, slots=True)
class Written:
    """A report's file."""

    file: Path
    bytes: int
    runs: int
    pictures: int
    notes: tuple[str, ...]  # what is missing in it, and why


def records_of(given: Sequence[str], runs: Path) -> list[Record]:
    """Return the records of runs, oldest first, each of them once.

    Args:
        given: runs, records, folders of runs, or `latest`: paths, or names below `runs`.

    Raises: ResultError if there is nothing of a name, or no record in it.
    """
    found: dict[str, Record] = {}
    for text in given:
        folder = _folder(text, runs)
        own = results.query(folder)
        if not own:
            raise ResultError(f"there are no records in {folder}", "name a run that was scored: dgbench eval RUN")
        found |= {record.id: record for record in own}
    return sorted(found.values(), key=lambda record: (record.created, record.id))


def _folder(text: str, runs: Path) -> Path:
    path = next((path for path in (Path(text), runs / text) if path.is_dir()), None)
    # a folder of runs, or a baseline, needs no recipe
    return path if path is not None and text != "latest" else find_run(text, runs)


def build(
    records: Sequence[Record],
    *,
    progress: Progress,
    gallery: bool = True,
    with_images: bool = False,
    comparison: Comparison | None = None,
    device: str | None = None,
    root: Path | None = None,
) -> Page:
    """Gather a report.

    Args:
        gallery: segment the examples' images by the runs' weights.
        with_images: pictures of domains that may not be redistributed, too.
        comparison: shown in front.

    Raises: ResultError without scores; DgbenchError where the device cannot be used.
    """
    from dgbench.cost.tradeoff import of_board
    from dgbench.engine import swept

    page = gather(records, comparison=comparison)
    runs = []
    for run in page.runs:
        own = [one for one in records if one.run == run.folder and one.checkpoint == run.newest.checkpoint]
        runs.append(dataclasses.replace(run, severities=swept.of_run(run.folder, own, root)))
    page = dataclasses.replace(page, runs=tuple(runs))
    try:
        page = dataclasses.replace(page, tradeoff=of_board(page.board, progress))
    except DgbenchError as error:  # a recipe of another version, say
        page = dataclasses.replace(page, notes=(*page.notes, f"no mIoU against operations: {error.message}"))
    if not gallery:
        return page
    from dgbench.engine.gallery import with_pictures

    return with_pictures(page, progress=progress, device=device, root=root, locked=with_images)


def write(page: Page, path: Path) -> Written:
    """Write a report whole."""
    from dgbench.render.report import report_page

    text = report_page(page)
    atomic.write(path, text)
    targets = [target for run in page.runs for target in run.targets]
    pictures = sum(len(example.pictures) for target in targets for example in target.examples)
    notes = dict.fromkeys(page.notes)
    notes |= dict.fromkeys(note for run in page.runs for note in (*run.notes, *(target.note for target in run.targets)) if note)
    return Written(path, len(text.encode()), len(page.runs), pictures, tuple(notes))
