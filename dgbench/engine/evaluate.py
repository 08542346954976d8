"""Score a checkpoint on domains it never saw: sliding window, one confusion matrix per image, one record per domain."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import mfuser
from dgbench import metrics, protocol, results
from dgbench.data import labels
from dgbench.data.dataset import SegDataset
from dgbench.data.domains import lookup
from dgbench.engine import checkpoints
from dgbench.engine.device import device_name, pick_device
from dgbench.errors import DataError
from dgbench.progress import Progress
from dgbench.recipe import Recipe, load_recipe, recipe_hash
from dgbench.resources import usable_cores
from mfuser import ops
from mfuser.segmentor import Segmentor


@dataclass(frozen=True, slots=True)
class _Item:
    image: Tensor  # (3, h, w) uint8 at test size
    label: Tensor  # (H, W) uint8 on the label grid


class _TestView(Dataset[_Item]):
    """Images at the protocol's test size, labels on its label grid."""

    def __init__(self, dataset: SegDataset, rules: protocol.Protocol) -> None:
        self.dataset, self.rules = dataset, rules
        self.halved_before = dataset.found is not None and dataset.found.layout.halved

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> _Item:
        sample = self.dataset[index]
        image = torch.from_numpy(sample.image.copy()).permute(2, 0, 1)
        label = torch.from_numpy(sample.label.copy())
        domain, height, width = self.dataset.domain.base, *image.shape[1:]
        halve = domain in self.rules.halved
        if halve and self.halved_before:
            # the protocol is given the size that the image once had
            height, width, halve = 2 * height, 2 * width, False
        size = self.rules.test_size(domain, (height, width))
        if size != tuple(image.shape[1:]):
            resized = F.interpolate(
                image[None].float(), size, mode="bilinear", align_corners=False, antialias=self.rules.antialias
            )
            image = resized[0].round().clamp(0, 255).to(torch.uint8)
        if self.rules.label_grid == "halved" and halve:
            label = label[::2, ::2]
        return _Item(image, label)


def evaluate(run: Path, targets: Sequence[str] | None = None, *, progress: Progress, device: str | None = None,
             include_source: bool = False, root: Path | None = None) -> list[results.Record]:  # fmt: skip
    """Score the run's newest checkpoint and write a record per domain into the run's folder.

    Args:
        run: a run folder; its recipe gives protocol, sizes and default targets.
        targets: domain names; None takes the recipe's.
        include_source: score the source's validation split too, first.

    Raises: DataError, CheckpointError, BackendError for what a user can mend. Domains scored before an error keep their records.
    """
    recipe = load_recipe(str(run / "recipe.yaml"))
    names = list(targets) if targets is not None else list(recipe.data.targets)
    domains = [lookup(name, root).name for name in names]  # every name is checked before any time is spent
    if include_source and "val" in lookup(recipe.data.source).splits:
        domains = [recipe.data.source, *(d for d in domains if d != recipe.data.source)]
    if not domains:
        raise DataError("no target domain to score", "name some: --targets streets-city streets-world")
    rules = protocol.lookup(recipe.eval.protocol)
    datasets = [
        SegDataset(
            d,
            "val",
            root=root,
            size=recipe.data.size,
            limit=recipe.data.val_images,
            label_map=protocol.label_map(rules, lookup(d, root)),
        )
        for d in domains
    ]
    folder = checkpoints.folder_of(run)
    on = pick_device(device)
    model = checkpoints.load_for(recipe, folder).to(on)
    model.check_backends()
    sha = checkpoints.sha256(folder)
    return [_score(recipe, rules, model, dataset, run, sha, on, progress) for dataset in datasets]


def _score(recipe: Recipe, rules: protocol.Protocol, model: Segmentor, dataset: SegDataset, run: Path, sha: str,
           device: torch.device, progress: Progress) -> results.Record:  # fmt: skip
    dataset.prepare(progress)
    started, ran = time.perf_counter(), ops.tally()
    seconds = {"data": 0.0, "model": 0.0, "metric": 0.0}
    matrices: list[NDArray[np.int64]] = []
    progress.start(f"scoring {dataset.domain.name} {dataset.split}", len(dataset), "images")
    try:
        for batch, waited in _batches(dataset, rules, recipe):
            seconds["data"] += waited
            before = time.perf_counter()
            prediction = _predict(model, batch, rules, recipe.data.crop, device)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds["model"] += time.perf_counter() - before
            before = time.perf_counter()
            for pred, item in zip(prediction, batch, strict=True):
                matrices.append(metrics.confusion(pred, item.label.to(device), len(labels.CLASSES)))
            seconds["metric"] += time.perf_counter() - before
            progress.advance(len(batch))
    finally:
        progress.stop()
    counts = np.stack(matrices)
    iou = metrics.iou(counts.sum(0))
    commit, dirty = results.commit()
    row = protocol.domain_row(dataset.domain, dataset.split, dataset.policy, dataset.size, dataset.revision)
    record = results.Record(
        id=results.new_id(), kind="eval", created=results.now_iso(), method=model.method,
        variant=recipe.method.variant, recipe=recipe.name, recipe_hash=recipe_hash(recipe), source=recipe.data.source,
        target=dataset.domain.name, split=dataset.split, protocol=rules.name,
        protocol_hash=protocol.protocol_hash(rules, row), miou=metrics.miou(counts.sum(0)),
        iou=tuple(None if np.isnan(v) else float(v) for v in iou), interval=metrics.bootstrap(counts),
        n_images=len(dataset), n_available=dataset.available,
        seconds={**seconds, "total": time.perf_counter() - started}, seed=recipe.train.seed,
        steps=recipe.train.steps, checkpoint=sha, backends=ops.ran_since(ran),
        environment=results.environment(device_name(device), torch.get_num_threads()), commit=commit, dirty=dirty,
    )  # fmt: skip
    return results.write(record, run, counts)


def _batches(dataset: SegDataset, rules: protocol.Protocol, recipe: Recipe) -> Iterator[tuple[list[_Item], float]]:
    """Lists of items of one size, and the seconds spent waiting for them."""
    workers = min(recipe.train.workers, usable_cores())
    loader = DataLoader(_TestView(dataset, rules), batch_size=recipe.eval.batch_size, num_workers=workers, collate_fn=list)
    before = time.perf_counter()
    for items in loader:
        waited = time.perf_counter() - before
        by_size: dict[Any, list[_Item]] = {}
        for item in items:
            by_size.setdefault(item.image.shape, []).append(item)
        for same in by_size.values():
            yield same, waited
            waited = 0.0
        before = time.perf_counter()


@torch.inference_mode()
def _predict(model: Segmentor, batch: list[_Item], rules: protocol.Protocol, crop: tuple[int, int],
             device: torch.device) -> list[Tensor]:  # fmt: skip
    """Train ids per image, each (H, W) on its own label grid."""
    images = torch.stack([item.image for item in batch]).to(device, non_blocking=True).float() / 255
    scores = mfuser.slide(model, images, crop=crop, stride=rules.stride_of(crop))
    predictions = []
    for score, item in zip(scores, batch, strict=True):
        if score.shape[1:] != item.label.shape:
            score = F.interpolate(score[None], tuple(item.label.shape), mode="bilinear", align_corners=False)[0]
        predictions.append(score.argmax(0))
    return predictions
