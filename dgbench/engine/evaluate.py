"""Score a checkpoint on domains it never saw, as a protocol says: one confusion matrix per image, one record per domain."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dgbench import metrics, protocol, results
from dgbench.data import labels
from dgbench.data.dataset import SegDataset
from dgbench.data.domain import Domain
from dgbench.data.resizing import as_tested
from dgbench.data.workers import worker_init
from dgbench.engine import checkpoints, partial
from dgbench.engine.device import device_name, memory_refused, pick_device
from dgbench.engine.scoring import predicted
from dgbench.environment import code_commit, describe_environment
from dgbench.errors import CheckpointError, DataError, DgbenchError
from dgbench.progress import Progress
from dgbench.recipe import Recipe, load_recipe, recipe_hash
from dgbench.resources import usable_cores
from mfuser import ops
from mfuser.segmentor import Segmentor

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Item:
    index: int  # in the dataset
    views: tuple[Tensor, ...]  # (h, w, 3) uint8 at each of the protocol's scales
    label: Tensor  # (H, W) uint8 on the label grid


class _TestView(Dataset[_Item]):
    """Images at the protocol's test size, labels on its label grid."""

    def __init__(self, dataset: SegDataset, rules: protocol.Protocol, size: protocol.Size | None) -> None:
        self.dataset, self.size = dataset, size
        halved_before = dataset.found is not None and dataset.found.layout.halved
        self.rules = replace(rules, halved=()) if halved_before else rules

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> _Item:
        sample = self.dataset[index]
        views, label = as_tested(sample.image, sample.label, self.rules, self.dataset.domain.base, self.size)
        # copies: an image read from a file may be read-only
        return _Item(index, tuple(torch.from_numpy(view.copy()) for view in views), torch.from_numpy(label.copy()))


def evaluate(
    run: Path,
    targets: Sequence[str | Domain] | None = None,
    *,
    progress: Progress,
    device: str | None = None,
    include_source: bool = False,
    root: Path | None = None,
    protocol_name: str | None = None,
) -> list[results.Record]:
    """Score the run's newest checkpoint and write a record per domain into the run's folder.

    Args:
        run: a run folder; its recipe gives protocol, sizes and default targets.
        targets: domains, or their names; None takes the recipe's.
        include_source: score the validation split of each source that has one, too, first.
        protocol_name: score under this protocol instead of the recipe's.

    Raises: DataError, RecipeError, CheckpointError, BackendError, DgbenchError for what a user can mend. Domains scored before
        an error keep their records. After an interruption of any kind, the same call goes on from the images already scored.
    """
    on = pick_device(device)  # refused before any time is spent
    recipe = load_recipe(str(run / "recipe.yaml"), root=root)
    # every name is checked before any time is spent
    domains = list(recipe.data.rows(targets if targets is not None else recipe.data.targets, root))
    if include_source:
        own = [row for row in recipe.data.rows(recipe.data.sources, root) if "val" in row.splits]
        domains = [*own, *(row for row in domains if row not in own)]
    if not domains:
        raise DataError("no target domain to score", "name some: --targets streets-city streets-world")
    rules = protocol.lookup(protocol_name or recipe.eval.protocol)
    datasets = [
        SegDataset(
            d,
            "val",
            root=root,
            # files are read as they are: what brings them to a size is the protocol's to choose
            size=recipe.data.size if d.procedural else None,
            limit=recipe.data.val_images,
            label_map=protocol.label_map(rules, d),
        )
        for d in domains
    ]
    found = _checkpoint(recipe, run, on)
    partial.tidy(run, lambda about: about.get("checkpoint") != found.sha)
    with ExitStack() as stack:
        parts: list[partial.Partial] = []
        records = [_score(recipe, rules, found, dataset, run, on, progress, stack, parts) for dataset in datasets]
        # all or none: an evaluation that is interrupted is gone on with, and leaves one record of each domain
        for part in parts:
            part.remove()
    scored = [dict(part.about) for part in parts]
    partial.tidy(run, lambda about: dict(about) in scored)  # begun with other code, or on another device
    return records


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    model: Segmentor
    sha: str
    seen: checkpoints.Seen | None


def _checkpoint(recipe: Recipe, run: Path, device: torch.device) -> _Checkpoint:
    """The newest checkpoint. A training may replace it at any moment: then the next one is taken.

    Raises: CheckpointError.
    """
    for _ in range(_TRIES):
        folder = checkpoints.folder_of(run)
        before = _state(folder)
        try:
            found = _Checkpoint(checkpoints.load_for(recipe, folder), checkpoints.sha256(folder), checkpoints.seen_by(folder))
        except (CheckpointError, OSError):
            if before is not None and _state(folder) == before:
                raise
            continue
        if before is not None and _state(folder) == before:
            found.model.to(device).check_backends()
            found.model.merge()
            return found
    raise CheckpointError(
        f"{run}: its newest checkpoint was replaced {_TRIES} times while it was read",
        "wait until the training ends, or train with a larger train.checkpoint_every",
    )


_TRIES = 20


def _state(folder: Path) -> list[tuple[str, int, int, int]] | None:
    """What tells the files of a folder from others of their names; None if it is gone."""
    try:
        states = [(path.name, path.stat()) for path in sorted(folder.iterdir())]
    except OSError:
        return None
    return [(name, state.st_ino, state.st_size, state.st_mtime_ns) for name, state in states]


def _score(
    recipe: Recipe,
    rules: protocol.Protocol,
    found: _Checkpoint,
    dataset: SegDataset,
    run: Path,
    device: torch.device,
    progress: Progress,
    stack: ExitStack,
    parts: list[partial.Partial],
) -> results.Record:
    dataset.prepare(progress)
    size = None if dataset.domain.procedural else recipe.data.size
    row = protocol.domain_row(dataset.domain, dataset.split, dataset.policy, dataset.size or size, dataset.revision)
    hashed, environment = protocol.protocol_hash(rules, row), describe_environment(device_name(device), torch.get_num_threads())
    about = {"checkpoint": found.sha, "target": dataset.domain.name, "split": dataset.split, "protocol": rules.digest}
    ids = [dataset.name(i) for i in range(len(dataset))]
    key = partial.key_of(
        **about,
        protocol_hash=hashed,
        recipe=recipe_hash(recipe),
        size=size,
        images=ids,
        files=_files(dataset),
        labels=dataset.fingerprint(),
        batch=recipe.eval.batch_size,
        device=str(device),
        environment=environment,
    )
    part = stack.enter_context(partial.opened(run, key, about, ids, len(labels.CLASSES)))
    parts.append(part)
    if (before := part.record()) is not None:
        progress.note(f"{dataset.domain.name} was scored before the interruption")
        return before
    _fill(part, recipe, rules, found.model, dataset, size, device, progress)
    counts = part.counts
    total, absent, classes = counts.sum(0), rules.absent_classes, protocol.CLASS_SETS[rules.classes]
    labelled = bool(total.any())
    iou = metrics.iou(total, absent=absent)
    if not labelled:
        _log.warning(f"{dataset.domain.name} {dataset.split}: mIoU is undefined: no labelled pixel in {len(ids)} images")
    elif few := metrics.rare(counts, classes=classes, absent=absent):
        _log.warning(rarely_seen(dataset.domain.name, dataset.split, few))
    commit, dirty = code_commit()
    record = results.Record(
        id=part.id,
        kind="eval",
        created=results.now_iso(),
        method=found.model.method,
        variant=recipe.method.variant,
        recipe=recipe.name,
        recipe_hash=recipe_hash(recipe),
        source=recipe.data.source,
        target=dataset.domain.name,
        split=dataset.split,
        protocol=rules.name,
        protocol_digest=rules.digest,
        protocol_hash=hashed,
        miou=metrics.miou(total, classes=classes, absent=absent) if labelled else None,
        iou=tuple(float(v) if labelled and not np.isnan(v) else None for v in iou),
        interval=metrics.interval(counts, classes=classes, absent=absent) if labelled else (None, None),
        n_images=len(dataset),
        n_available=dataset.available,
        n_extra=dataset.extra,
        rendered=dataset.exported,
        **checkpoints.in_record(found.seen),
        seconds=dict(part.seconds),
        seed=recipe.train.seed,
        steps=recipe.train.steps,
        checkpoint=found.sha,
        backends=part.backends,
        environment=environment,
        commit=commit,
        dirty=dirty,
        extra=extra_scores(recipe.data.source, total, rules),
    )
    part.save()  # with the id: whatever happens now, there will be one record
    return results.write(record, run, counts, ids)


def _fill(
    part: partial.Partial,
    recipe: Recipe,
    rules: protocol.Protocol,
    model: Segmentor,
    dataset: SegDataset,
    size: protocol.Size | None,
    device: torch.device,
    progress: Progress,
) -> None:
    """Score the images that are not done yet, in the batches in which all would be: a batch may decide the last bit."""
    started, ran, spent, earlier = time.perf_counter(), ops.tally(), part.seconds["total"], dict(part.backends)
    n, by = len(dataset), recipe.eval.batch_size
    whole = [list(range(i, min(i + by, n))) for i in range(0, n, by)]
    batches = [batch for batch in whole if not part.done[batch].all()]
    if done := n - sum(map(len, batches)):
        progress.note(f"{dataset.domain.name}: {done} of {n} images were scored before the interruption")
    progress.start(f"scoring {dataset.domain.name} {dataset.split}", n, "images")
    progress.advance(done)

    def take_stock() -> None:
        part.seconds["total"] = spent + time.perf_counter() - started
        part.backends = {**earlier, **ops.ran_since(ran)}

    try:
        for groups, waited in _batches(_TestView(dataset, rules, size), recipe, batches):
            part.seconds["data"] += waited
            for batch in groups:
                before = time.perf_counter()
                prediction = _predict(model, batch, rules, device)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                part.seconds["model"] += time.perf_counter() - before
                before = time.perf_counter()
                for pred, item in zip(prediction, batch, strict=True):
                    part.counts[item.index] = _confusion(pred, item.label.to(device))
                part.seconds["metric"] += time.perf_counter() - before
            part.done[[item.index for batch in groups for item in batch]] = True
            take_stock()
            part.save_in_time()
            progress.advance(sum(map(len, groups)))
    except Exception as error:  # OpenCV raises one of its own kind
        if memory_refused(error) is None:
            raise
        less = "; a run trained with --set eval.batch_size=1 needs less" if by > 1 else ""
        raise DgbenchError(
            f"not enough memory to score `{dataset.domain.name}`, {by} images at once",
            f"close other programs, or use a machine with more{less}",
        ) from error
    finally:
        progress.stop()
        take_stock()
        if not part.done.all():  # whatever stopped it
            with suppress(OSError):
                part.save()
    mixed = ops.ran_since(ran)
    if any(earlier.get(op, name) != name for op, name in mixed.items()):
        # another backend than before the interruption rounds otherwise
        part.restart()
        _fill(part, recipe, rules, model, dataset, size, device, progress)


def _files(dataset: SegDataset) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the images' files; of rows of a Hub the fingerprint of labels has them all."""
    if dataset.found is None:
        return []
    paths = [dataset.found.folder / image for image, _ in dataset.found.pairs[: len(dataset)]]
    return [(str(path), (state := path.stat()).st_size, state.st_mtime_ns) for path in paths]


def rarely_seen(domain: str, split: str, few: dict[int, int]) -> str:
    """Return one line that names the classes whose IoU a few images decide, with their number of images."""
    first = sorted(few, key=lambda k: (few[k], k))[:6]
    named = ", ".join(f"{labels.CLASSES[k].name} ({few[k]})" for k in first)
    if len(few) > len(first):
        named += f" and {len(few) - len(first)} more"
    return (
        f"{domain} {split}: in fewer than {metrics.FEW_IMAGES} of the scored images: {named}; their IoU says little, and the "
        "interval of the mean may be too short: score more images"
    )


def extra_scores(source: str, total: NDArray[np.int64], rules: protocol.Protocol) -> dict[str, float | str | None]:
    """Return the means over fewer classes that a source's papers report: SYNTHIA cannot teach 3 of the 19."""
    subsets = (16, 13) if source == "synthia" else ()
    return {f"miou{n}": metrics.miou(total, classes=protocol.CLASS_SETS[n], absent=rules.absent_classes) for n in subsets}


def _batches(view: _TestView, recipe: Recipe, batches: list[list[int]]) -> Iterator[tuple[list[list[_Item]], float]]:
    """Each batch as lists of items of one size, and the seconds spent waiting for it."""
    workers = min(recipe.train.workers, usable_cores())
    loader = DataLoader(view, batch_sampler=batches, num_workers=workers, collate_fn=list, worker_init_fn=worker_init)
    before = time.perf_counter()
    for items in loader:
        waited = time.perf_counter() - before
        by_size: dict[Any, list[_Item]] = {}
        for item in items:
            by_size.setdefault((item.views[0].shape, item.label.shape), []).append(item)
        yield list(by_size.values()), waited
        before = time.perf_counter()


@torch.inference_mode()
def _predict(model: Segmentor, batch: list[_Item], rules: protocol.Protocol, device: torch.device) -> Tensor:
    """Train ids (B, H, W) on the label grid."""
    views = [torch.stack(same) for same in zip(*(item.views for item in batch), strict=True)]
    height, width = batch[0].label.shape
    return predicted(model, views, (height, width), rules, device)


def _confusion(prediction: Tensor, label: Tensor) -> NDArray[np.int64]:
    """`metrics.confusion` in parts: counting takes many times the memory of a label, and some have 100 million pixels."""
    rows = max(1, (1 << 24) // label.shape[1])
    parts = zip(prediction.split(rows), label.split(rows), strict=True)
    total = np.zeros((len(labels.CLASSES),) * 2, np.int64)
    for predicted_part, label_part in parts:
        total += metrics.confusion(predicted_part, label_part, len(labels.CLASSES))
    return total
