"""Examples of a report: what a run's checkpoint sees in single images, beside the truth and where it is wrong."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dgbench import protocol
from dgbench.data.labels import IGNORE, palette
from dgbench.errors import DgbenchError
from dgbench.progress import Progress
from dgbench.report.page import Page, Run, Target

if TYPE_CHECKING:
    from dgbench.engine.scenes import Scene
    from dgbench.engine.tested import Tested

Pixels = NDArray[np.uint8]

WIDTH = 420  # pixels, at most
WRONG = (213, 94, 0)  # vermilion of Okabe and Ito (2008)
_UNLABELLED = 40  # grey of pixels that do not count


def with_pictures(
    page: Page, *, progress: Progress, device: str | None = None, root: Path | None = None, locked: bool = False
) -> Page:
    """Return the page with pictures of the examples of each run whose weights are here.

    Args:
        locked: pictures of domains that may not be redistributed, too.

    Raises: DgbenchError where the device cannot be used. What is missing of a run or a domain is noted on the page.
    """
    from dgbench.engine.device import pick_device

    pick_device(device)
    runs = []
    progress.start("segmenting", sum(len(target.examples) for run in page.runs for target in run.targets), "images")
    try:
        for run in page.runs:
            runs.append(_illustrated(run, progress, device, root, locked=locked))
    finally:
        progress.stop()
    return replace(page, runs=tuple(runs))


def _illustrated(run: Run, progress: Progress, device: str | None, root: Path | None, *, locked: bool) -> Run:
    from dgbench.engine import checkpoints
    from dgbench.engine.tested import load

    if not (run.folder / "checkpoint").is_dir():
        return replace(run, notes=(*run.notes, "no pictures: the folder has no weights"))
    try:
        if checkpoints.sha256(checkpoints.folder_of(run.folder)) != run.newest.checkpoint:
            return replace(run, notes=(*run.notes, "no pictures: the weights in the folder are not those that were scored"))
        (model,) = load([run.folder], device=device, root=root)
    except (DgbenchError, OSError) as error:
        return replace(run, notes=(*run.notes, f"no pictures: {getattr(error, 'message', error)}"))
    return replace(run, targets=tuple(_pictured(target, model, progress, root, locked=locked) for target in run.targets))


def _pictured(target: Target, model: Tested, progress: Progress, root: Path | None, *, locked: bool) -> Target:
    if not target.examples:
        return target
    try:
        model = replace(model, rules=protocol.lookup(target.record.protocol))
        found = _scenes(target, model, root, locked=locked)
        if isinstance(found, str):
            return replace(target, note=found)
        examples = []
        for example, scene in zip(target.examples, found, strict=True):
            image, truth = scene.load()
            examples.append(replace(example, pictures=drawn(image, truth, scene.segment(model))))
            progress.advance()
    except (DgbenchError, OSError) as error:
        return replace(target, note=f"no pictures: {getattr(error, 'message', error)}")
    return replace(target, examples=tuple(examples))


def _scenes(target: Target, model: Tested, root: Path | None, *, locked: bool) -> Sequence[Scene] | str:
    """Return the examples' images, or why they are not shown."""
    from dgbench.data.dataset import SegDataset
    from dgbench.engine.scenes import scenes
    from dgbench.recipe import load_recipe

    record = target.record
    (row,) = load_recipe(str(model.run / "recipe.yaml"), root=root).data.rows([record.target], root)
    if not (locked or row.redistributable or SegDataset(row, record.split, root=root).exported):
        return f"no pictures: {row.name} may not be redistributed ({row.licence}); --with-images shows them"
    return scenes([row], [model], split=record.split, ids=[example.id for example in target.examples], root=root)


def drawn(image: Pixels, truth: Pixels, prediction: Pixels) -> tuple[bytes, ...]:
    """Return image, truth, prediction and error as small files: JPEG of photographs, PNG of classes.

    Args:
        image: (H, W, 3) RGB.
        truth, prediction: (H, W) train ids.
    """
    height, width = truth.shape
    across = min(WIDTH, width)
    size = (across, max(1, round(height * across / width)))
    small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    labels = [np.asarray(Image.fromarray(ids).resize(size, Image.Resampling.NEAREST)) for ids in (truth, prediction)]
    return (
        _jpeg(small),
        *(_classes(ids) for ids in labels),
        _jpeg(errors(small, *labels)),
    )


def errors(image: Pixels, truth: Pixels, prediction: Pixels) -> Pixels:
    """(H, W, 3) RGB: the image in pale grey, what is wrong in one colour, and what has no label dark."""
    grey = np.asarray(Image.fromarray(image).convert("L"))[..., None] // 3 + 160
    out = np.repeat(grey, 3, axis=2).astype(np.uint8)
    labelled = truth != IGNORE
    out[labelled & (truth != prediction)] = WRONG
    out[~labelled] = _UNLABELLED
    return out


def _jpeg(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=82, optimize=True)
    return buffer.getvalue()


def _classes(ids: Pixels) -> bytes:
    picture = Image.fromarray(ids)
    picture.putpalette(palette().tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
