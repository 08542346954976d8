"""Score a checkpoint on domains it never saw, as a protocol says: one confusion matrix per image, one record per domain."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
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
from dgbench.data.domains import lookup
from dgbench.data.resizing import as_tested
from dgbench.data.workers import worker_init
from dgbench.engine import checkpoints
from dgbench.engine.device import device_name, pick_device
from dgbench.engine.scoring import score
from dgbench.errors import DataError
from dgbench.progress import Progress
from dgbench.recipe import Recipe, load_recipe, recipe_hash
from dgbench.resources import usable_cores
from mfuser import ops
from mfuser.segmentor import Segmentor


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


def evaluate(run: Path, targets: Sequence[str] | None = None, *, progress: Progress, device: str | None = None,
             include_source: bool = False, root: Path | None = None,
             protocol_name: str | None = None) -> list[results.Record]:  # fmt: skip
    """Score the run's newest checkpoint and write a record per domain into the run's folder.

    Args:
        run: a run folder; its recipe gives protocol, sizes and default targets.
        targets: domain names; None takes the recipe's.
        include_source: score the source's validation split too, first.
        protocol_name: score under this protocol instead of the recipe's.

    Raises: DataError, RecipeError, CheckpointError, BackendError for what a user can mend. Domains scored before an error
        keep their records.
    """
    on = pick_device(device)  # refused before any time is spent
    recipe = load_recipe(str(run / "recipe.yaml"))
    names = list(targets) if targets is not None else list(recipe.data.targets)
    domains = [lookup(name, root).name for name in names]  # every name is checked before any time is spent
    if include_source and "val" in lookup(recipe.data.source).splits:
        domains = [recipe.data.source, *(d for d in domains if d != recipe.data.source)]
    if not domains:
        raise DataError("no target domain to score", "name some: --targets streets-city streets-world")
    rules = protocol.lookup(protocol_name or recipe.eval.protocol)
    datasets = [
        SegDataset(
            d,
            "val",
            root=root,
            # files are read as they are: what brings them to a size is the protocol's to choose
            size=recipe.data.size if lookup(d, root).procedural else None,
            limit=recipe.data.val_images,
            label_map=protocol.label_map(rules, lookup(d, root)),
        )
        for d in domains
    ]
    folder = checkpoints.folder_of(run)
    model = checkpoints.load_for(recipe, folder).to(on)
    model.check_backends()
    sha = checkpoints.sha256(folder)
    seen = checkpoints.seen_by(folder)
    return [_score(recipe, rules, model, dataset, run, sha, seen, on, progress) for dataset in datasets]


def _score(recipe: Recipe, rules: protocol.Protocol, model: Segmentor, dataset: SegDataset, run: Path, sha: str,
           seen: checkpoints.Seen | None, device: torch.device, progress: Progress) -> results.Record:  # fmt: skip
    dataset.prepare(progress)
    size = None if dataset.domain.procedural else recipe.data.size
    started, ran = time.perf_counter(), ops.tally()
    seconds = {"data": 0.0, "model": 0.0, "metric": 0.0}
    n_classes = len(labels.CLASSES)
    counts = np.zeros((len(dataset), n_classes, n_classes), np.int64)  # in the dataset's order, whatever is batched with what
    progress.start(f"scoring {dataset.domain.name} {dataset.split}", len(dataset), "images")
    try:
        for batch, waited in _batches(_TestView(dataset, rules, size), recipe):
            seconds["data"] += waited
            before = time.perf_counter()
            prediction = _predict(model, batch, rules, device)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds["model"] += time.perf_counter() - before
            before = time.perf_counter()
            for pred, item in zip(prediction, batch, strict=True):
                counts[item.index] = metrics.confusion(pred, item.label.to(device), n_classes)
            seconds["metric"] += time.perf_counter() - before
            progress.advance(len(batch))
    finally:
        progress.stop()
    total, absent, classes = counts.sum(0), rules.absent_classes, protocol.CLASS_SETS[rules.classes]
    iou = metrics.iou(total, absent=absent)
    if few := metrics.rare(counts, classes=classes, absent=absent):
        logging.getLogger(__name__).warning(rarely_seen(dataset.domain.name, dataset.split, few))
    commit, dirty = results.commit()
    row = protocol.domain_row(dataset.domain, dataset.split, dataset.policy, dataset.size or size, dataset.revision)
    record = results.Record(
        id=results.new_id(), kind="eval", created=results.now_iso(), method=model.method,
        variant=recipe.method.variant, recipe=recipe.name, recipe_hash=recipe_hash(recipe), source=recipe.data.source,
        target=dataset.domain.name, split=dataset.split, protocol=rules.name,
        protocol_digest=rules.digest, protocol_hash=protocol.protocol_hash(rules, row),
        miou=metrics.miou(total, classes=classes, absent=absent),
        iou=tuple(None if np.isnan(v) else float(v) for v in iou),
        interval=metrics.interval(counts, classes=classes, absent=absent),
        n_images=len(dataset), n_available=dataset.available, n_extra=dataset.extra, rendered=dataset.exported,
        **checkpoints.in_record(seen),
        seconds={**seconds, "total": time.perf_counter() - started}, seed=recipe.train.seed,
        steps=recipe.train.steps, checkpoint=sha, backends=ops.ran_since(ran),
        environment=results.environment(device_name(device), torch.get_num_threads()), commit=commit, dirty=dirty,
        extra=extra_scores(recipe.data.source, total, rules),
    )  # fmt: skip
    return results.write(record, run, counts, [dataset.name(i) for i in range(len(dataset))])


def rarely_seen(domain: str, split: str, few: dict[int, int]) -> str:
    """Return one line that names the classes whose IoU a few images decide, with their number of images."""
    first = sorted(few, key=lambda k: (few[k], k))[:6]
    named = ", ".join(f"{labels.CLASSES[k]} ({few[k]})" for k in first)
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


def _batches(view: _TestView, recipe: Recipe) -> Iterator[tuple[list[_Item], float]]:
    """Lists of items of one size, and the seconds spent waiting for them."""
    workers = min(recipe.train.workers, usable_cores())
    loader = DataLoader(view, batch_size=recipe.eval.batch_size, num_workers=workers, collate_fn=list, worker_init_fn=worker_init)
    before = time.perf_counter()
    for items in loader:
        waited = time.perf_counter() - before
        by_size: dict[Any, list[_Item]] = {}
        for item in items:
            by_size.setdefault((item.views[0].shape, item.label.shape), []).append(item)
        for same in by_size.values():
            yield same, waited
            waited = 0.0
        before = time.perf_counter()


@torch.inference_mode()
def _predict(model: Segmentor, batch: list[_Item], rules: protocol.Protocol, device: torch.device) -> Tensor:
    """Train ids (B, H, W) on the label grid."""
    views = [
        torch.stack(same).to(device, non_blocking=True).permute(0, 3, 1, 2).contiguous().float() / 255
        for same in zip(*(item.views for item in batch), strict=True)
    ]
    height, width = batch[0].label.shape
    return score(model, views, (height, width), rules).argmax(1)
