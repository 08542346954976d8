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
from dgbench.data.corruptions import Corrupted
from dgbench.data.dataset import SegDataset
from dgbench.data.domain import Domain
from dgbench.data.resizing import as_tested
from dgbench.data.workers import worker_init
from dgbench.engine import checkpoints, modes, partial
from dgbench.engine.device import device_name, memory_refused, pick_device
from dgbench.engine.scoring import predicted
from dgbench.engine.targets import Target, chosen_targets, size_of, stored_records
from dgbench.engine.team import Team, join
from dgbench.engine.together import Together
from dgbench.engine.watch import Watch
from dgbench.environment import code_commit, describe_environment
from dgbench.errors import CheckpointError, DataError, DgbenchError
from dgbench.launch import launched
from dgbench.progress import Progress
from dgbench.recipe import Recipe, load_recipe, recipe_hash
from dgbench.resources import usable_cores
from mfuser import fast, ops

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Item:
    index: int  # in the dataset
    views: tuple[Tensor, ...]  # (h, w, 3) uint8 at each of the protocol's scales
    label: Tensor  # (H, W) uint8 on the label grid

    def pin_memory(self) -> _Item:
        """Return it in memory that a GPU copies from beside its work; the loader asks for it."""
        return _Item(self.index, tuple(view.pin_memory() for view in self.views), self.label.pin_memory())


@dataclass(frozen=True, slots=True)
class _Loading:
    """How images are read: by so many processes at least, into pinned memory or not. No score depends on it."""

    workers: int
    pinned: bool

    @staticmethod
    def of(how: modes.Mode, device: torch.device) -> _Loading:
        gpu = device.type == "cuda"
        # a fast model waits for a single process that decodes, resizes and looks after it
        return _Loading(min(8, usable_cores() - 1) if gpu and how.name == modes.FAST else 0, gpu)


class _TestView(Dataset[_Item]):
    """Images at the protocol's test size, labels on its label grid. What is corrupted is so at the size of its file."""

    def __init__(self, target: Target, rules: protocol.Protocol, size: protocol.Size | None) -> None:
        self.dataset, self.corruption, self.size = target.dataset, target.corruption, size
        dataset = target.dataset
        halved_before = dataset.found is not None and dataset.found.layout.halved
        self.rules = replace(rules, halved=()) if halved_before else rules

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> _Item:
        sample = self.dataset[index]
        image = sample.image if self.corruption is None else self.corruption.of(sample.image, sample.name)
        views, label = as_tested(image, sample.label, self.rules, self.dataset.domain.base, self.size)
        # copies: an image read from a file may be read-only
        return _Item(index, tuple(torch.from_numpy(view.copy()) for view in views), torch.from_numpy(label.copy()))


def evaluate(
    run: Path,
    targets: Sequence[str | Domain | Corrupted] | None = None,
    *,
    progress: Progress,
    device: str | None = None,
    include_source: bool = False,
    root: Path | None = None,
    protocol_name: str | None = None,
    limit: int | None = None,
    reuse: bool = False,
    mode: str | None = None,
    compiles: bool | None = None,
    team: Team | None = None,
) -> list[results.Record]:
    """Score the run's newest checkpoint and write a record per domain into the run's folder.

    Args:
        run: a run folder; its recipe gives protocol, sizes and default targets.
        targets: domains, or their names; None takes the recipe's. Scores of corrupted ones are records of another kind.
        include_source: score the validation split of each source that has one, too, first.
        protocol_name: score under this protocol instead of the recipe's.
        limit: score the first so many images of each domain only. Where the recipe has more, that is another kind, too.
        reuse: take a record that the run has already of the same checkpoint, images and protocol, instead of scoring again.
        mode: `exact` or `fast` instead of the recipe's.    compiles: whether `fast` does; by default it does.
        team: the processes that score together, all of which call this; the first writes. Default: those a launcher started.

    Raises: DataError, RecipeError, CheckpointError, BackendError, DgbenchError for what a user can fix; PeerLost if another
        process has ended. Domains scored before an error keep their records. After any interruption, the same call continues
        with the remaining images.
    """
    on = pick_device(device)  # refused before any time is spent
    team = team or join(launched(), on)
    recipe = load_recipe(str(run / "recipe.yaml"), root=root)
    # every name is checked before any time is spent
    given = targets if targets is not None else recipe.data.targets
    domains = list(recipe.data.rows([one.domain if isinstance(one, Corrupted) else one for one in given], root))
    wanted = [(row, one.corruption if isinstance(one, Corrupted) else None) for row, one in zip(domains, given, strict=True)]
    if include_source:
        own = [row for row in recipe.data.rows(recipe.data.sources, root) if "val" in row.splits]
        wanted = [*((row, None) for row in own), *((row, how) for row, how in wanted if row not in own)]
    if not wanted:
        raise DataError("no target domain to score", "name some: --targets streets-city streets-world")
    rules = protocol.lookup(protocol_name or recipe.eval.protocol)
    how = modes.mode(mode or recipe.eval.mode, compiles=compiles)
    chosen = chosen_targets(recipe, rules, wanted, root, limit)
    kept = stored_records(recipe, rules, chosen, run, how) if reuse else {}
    if len(kept) == len(chosen):
        begun = [target.about(kept[target.name].checkpoint, rules) for target in chosen]
        partial.tidy(run, lambda about: dict(about) in begun)  # by an evaluation that was ended before it could
        return [kept[target.name] for target in chosen]
    found, compiling = _checkpoint(recipe, run, on, how, progress), modes.Compiling(how)
    if len(set(team.each(int(found.sha[:15], 16)))) > 1:
        raise CheckpointError(f"{run}: processes found different checkpoints", "keep runs where all machines see the same files")
    if kept:
        progress.note(f"{len(kept)} of {len(chosen)} scores are in the run's records already")
    kept = {name: record for name, record in kept.items() if record.checkpoint == found.sha}
    if team.main:
        partial.tidy(run, lambda about: about.get("checkpoint") != found.sha)
    with ExitStack() as stack, Watch(team, str(run)) as watch:
        together = Together(team, watch)
        parts: list[partial.Partial] = []
        records = [
            kept.get(target.name) or _score(recipe, rules, found, target, run, on, progress, stack, parts, together)
            for target in chosen
        ]
        compiling.tell(progress)
        # all or none: an evaluation that is interrupted is gone on with, and leaves one record of each domain
        for part in parts:
            part.remove()
    if not team.main:
        return records
    scored = [dict(part.about) for part in parts] + [target.about(found.sha, rules) for target in chosen if target.name in kept]
    partial.tidy(run, lambda about: dict(about) in scored)  # begun with other code, or on another device
    return records


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    model: modes.Ready
    how: modes.Mode
    sha: str
    seen: checkpoints.Seen | None
    rounded: str | None = None  # type that the weights were rounded to when they were exported


def _checkpoint(recipe: Recipe, run: Path, device: torch.device, how: modes.Mode, progress: Progress) -> _Checkpoint:
    """Return the newest checkpoint; if a training replaces it meanwhile, the next one.

    Raises: CheckpointError; DgbenchError as `modes.ready`.
    """
    for _ in range(_TRIES):
        folder = checkpoints.folder_of(run)
        before = _state(folder)
        try:
            model = checkpoints.load_for(recipe, folder)
            sha, seen = checkpoints.sha256(folder), checkpoints.seen_by(folder)
        except (CheckpointError, OSError):
            if before is not None and _state(folder) == before:
                raise
            continue
        if before is not None and _state(folder) == before:
            rounded = checkpoints.in_fp32(model)
            model.to(device).check_backends()
            return _Checkpoint(modes.ready(model, how, progress), how, sha, seen, rounded)
    raise CheckpointError(
        f"{run}: its newest checkpoint was replaced {_TRIES} times while it was read",
        "wait until the training ends, or train with a larger train.checkpoint_every",
    )


_TRIES = 20


def _state(folder: Path) -> list[tuple[str, int, int, int]] | None:
    """Return what distinguishes the files of a folder from others of the same names; None if it is gone."""
    try:
        states = [(path.name, path.stat()) for path in sorted(folder.iterdir())]
    except OSError:
        return None
    return [(name, state.st_ino, state.st_size, state.st_mtime_ns) for name, state in states]


def _score(
    recipe: Recipe,
    rules: protocol.Protocol,
    found: _Checkpoint,
    target: Target,
    run: Path,
    device: torch.device,
    progress: Progress,
    stack: ExitStack,
    parts: list[partial.Partial],
    together: Together,
) -> results.Record:
    dataset, team = target.dataset, together.team
    together.prepare(lambda: dataset.prepare(progress))
    size = size_of(recipe, dataset)
    hashed = target.protocol_hash(rules, size)
    environment = describe_environment(device_name(device), torch.get_num_threads()) | found.how.described
    about = target.about(found.sha, rules)
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
    part = stack.enter_context(partial.opened(run, key, about, ids, len(labels.CLASSES), stored=team.main))
    parts.append(part)
    together.name(part)
    before = part.record() if team.main else None
    if team.most(int(before is not None)):
        progress.note(f"{target.name} was scored before the interruption")
        return before or results.read(part.recorded())
    together.share(part)
    _fill(part, recipe, rules, found, target, size, device, progress, together)
    counts = part.counts
    total, absent, classes = counts.sum(0), rules.absent_classes, protocol.CLASS_SETS[rules.classes]
    labelled = bool(total.any())
    iou = metrics.iou(total, absent=absent)
    if not labelled:
        _log.warning(f"{target.name} {dataset.split}: mIoU is undefined: no labelled pixel in {len(ids)} images")
    elif not target.repeats and (few := metrics.rare(counts, classes=classes, absent=absent)):
        _log.warning(rarely_seen(target.name, dataset.split, few))
    commit, dirty = code_commit()
    if team.world > 1:
        environment["processes"] = str(team.world)
    record = results.Record(
        id=part.id,
        kind=target.kind,
        created=results.now_iso(),
        method=found.model.method,
        variant=", ".join(filter(None, [recipe.variant, found.rounded and f"{found.rounded} weights", found.how.label])),
        recipe=recipe.name,
        recipe_hash=recipe_hash(recipe),
        source=recipe.data.source,
        target=target.name,
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
        extra=extra_scores(recipe.data.source, total, rules) | ({"weights_dtype": found.rounded} if found.rounded else {}),
    )
    part.save()  # with the record's id, so that an interruption from here on does not lead to a second record
    return results.write(record, run, counts, ids) if team.main else record


def _fill(
    part: partial.Partial,
    recipe: Recipe,
    rules: protocol.Protocol,
    found: _Checkpoint,
    target: Target,
    size: protocol.Size | None,
    device: torch.device,
    progress: Progress,
    together: Together,
) -> None:
    """Score the remaining images in the same batches as without an interruption, which may affect the last bit.

    Of several processes each scores whole batches, and all have the matrices behind every round of one batch each.
    """
    started, ran, spent, earlier = time.perf_counter(), ops.tally(), part.seconds["total"], dict(part.backends)
    n, by = len(target.dataset), recipe.eval.batch_size
    whole = [list(range(i, min(i + by, n))) for i in range(0, n, by)]
    batches = [batch for batch in whole if not part.done[batch].all()]
    if done := n - sum(map(len, batches)):
        progress.note(f"{target.name}: {done} of {n} images were scored before the interruption")
    progress.start(f"scoring {target.name} {target.dataset.split}", n, "images")
    progress.advance(done)

    def take_stock() -> None:
        part.seconds["total"] = spent + time.perf_counter() - started
        part.backends = {**earlier, **ops.ran_since(ran)}

    try:
        own = batches[together.team.rank :: together.team.world]
        loaded = _batches(_TestView(target, rules, size), recipe, own, _Loading.of(found.how, device))
        for round_ in together.rounds(batches):
            together.forget(part, round_)
            groups, waited = next(loaded, ([], 0.0))
            part.seconds["data"] += waited
            for batch in groups:
                before, compiled = time.perf_counter(), fast.seconds()
                prediction = _predict(found.model, batch, rules, device)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if compiled := fast.seconds() - compiled:
                    part.seconds[partial.COMPILE] = part.seconds.get(partial.COMPILE, 0.0) + compiled
                part.seconds["model"] += max(0.0, time.perf_counter() - before - compiled)
                before = time.perf_counter()
                for pred, item in zip(prediction, batch, strict=True):
                    part.counts[item.index] = _confusion(pred, item.label.to(device))
                part.seconds["metric"] += time.perf_counter() - before
            part.counts[round_] = together.team.total(part.counts[round_])
            part.done[round_] = True
            take_stock()
            part.save_in_time()
            progress.advance(len(round_))
    except Exception as error:  # OpenCV raises one of its own kind
        if lost := together.team.lost(error):
            raise lost from error
        if memory_refused(error) is None:
            raise
        less = "; a run trained with --set eval.batch_size=1 needs less" if by > 1 else ""
        raise DgbenchError(
            f"not enough memory to score `{target.name}`, {by} images at once",
            f"close other programs, or use a machine with more{less}",
        ) from error
    finally:
        progress.stop()
        take_stock()
        if not part.done.all():  # whatever stopped it
            with suppress(OSError):
                part.save()
    mixed = ops.ran_since(ran)
    if together.team.most(int(any(earlier.get(op, name) != name for op, name in mixed.items()))):
        # a different backend than before the interruption would round differently
        part.restart()
        _fill(part, recipe, rules, found, target, size, device, progress, together)


def _files(dataset: SegDataset) -> list[tuple[str, int, int]]:
    """Return names, sizes and times of the images' files; for rows of a Hub, the labels' fingerprint includes them."""
    if dataset.found is None:
        return []
    paths = [dataset.found.folder / image for image, _ in dataset.found.pairs[: len(dataset)]]
    return [(str(path), (state := path.stat()).st_size, state.st_mtime_ns) for path in paths]


def rarely_seen(domain: str, split: str, few: dict[int, int]) -> str:
    """Return a warning that names the classes which occur in few images, with their number of images."""
    first = sorted(few, key=lambda k: (few[k], k))[:6]
    named = ", ".join(f"{labels.CLASSES[k].name} ({few[k]})" for k in first)
    if len(few) > len(first):
        named += f" and {len(few) - len(first)} more"
    return (
        f"{domain} {split}: in fewer than {metrics.FEW_IMAGES} of the scored images: {named}; their IoU says little, and the "
        "interval of the mean may be too short: score more images"
    )


def extra_scores(source: str, total: NDArray[np.int64], rules: protocol.Protocol) -> dict[str, float | str | None]:
    """Return the means over fewer classes that a source's papers report: SYNTHIA lacks 3 of the 19."""
    subsets = (16, 13) if source == "synthia" else ()
    return {f"miou{n}": metrics.miou(total, classes=protocol.CLASS_SETS[n], absent=rules.absent_classes) for n in subsets}


def _batches(
    view: _TestView, recipe: Recipe, batches: list[list[int]], loading: _Loading
) -> Iterator[tuple[list[list[_Item]], float]]:
    """Yield each batch as lists of items of one size, and the seconds spent waiting for it."""
    workers = min(max(recipe.train.workers, loading.workers), usable_cores())
    loader = DataLoader(
        view,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=worker_init,
        pin_memory=loading.pinned,
    )
    before = time.perf_counter()
    for items in loader:
        waited = time.perf_counter() - before
        by_size: dict[Any, list[_Item]] = {}
        for item in items:
            by_size.setdefault((item.views[0].shape, item.label.shape), []).append(item)
        yield list(by_size.values()), waited
        before = time.perf_counter()


@torch.inference_mode()
def _predict(model: modes.Ready, batch: list[_Item], rules: protocol.Protocol, device: torch.device) -> Tensor:
    """Train ids (B, H, W) on the label grid."""
    # of one image the pinned memory itself, of several a copy
    views = [torch.stack(same) if len(same) > 1 else same[0][None] for same in zip(*(item.views for item in batch), strict=True)]
    height, width = batch[0].label.shape
    return predicted(model, views, (height, width), rules, device)


def _confusion(prediction: Tensor, label: Tensor) -> NDArray[np.int64]:
    """Compute `metrics.confusion` in parts: it takes many times the memory of a label, and some have 100 million pixels."""
    rows = max(1, (1 << 24) // label.shape[1])
    parts = zip(prediction.split(rows), label.split(rows), strict=True)
    total = np.zeros((len(labels.CLASSES),) * 2, np.int64)
    for predicted_part, label_part in parts:
        total += metrics.confusion(predicted_part, label_part, len(labels.CLASSES))
    return total
