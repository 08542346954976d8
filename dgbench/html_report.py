"""The report of runs as one file of HTML: gathered from records, matrices and logs, with pictures made anew by the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from dgbench import atomic, results
from dgbench.errors import ResultError
from dgbench.progress import Progress
from dgbench.report.compare import Comparison
from dgbench.report.page import Page, gather
from dgbench.results import Record
from dgbench.runs import find_run


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
    by_run = {run.folder: [r for r in records if r.run == run.folder and r.checkpoint == run.newest.checkpoint] for run in page.runs}
    page = dataclasses.replace(
        page,
        tradeoff=of_board(page.board, progress),
        runs=tuple(dataclasses.replace(run, severities=swept.of_run(run.folder, by_run[run.folder], root)) for run in page.runs),
    )
    if not gallery:
        return page
    from dgbench.engine.gallery import with_pictures

    return with_pictures(page, progress=progress, device=device, root=root, locked=with_images)


def write(page: Page, path: Path) -> Path:
    """Write a report whole, and return its path."""
    from dgbench.render.report import report_page

    return atomic.write(path, report_page(page))
