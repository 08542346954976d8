"""Train a recipe's model on its source domain.

One function, no Trainer. Everything random at step s comes from (seed, s): the batch, its augmentation, and the generators that
dropout and point sampling draw from. A run that is killed and resumed therefore repeats the uninterrupted one exactly; on a CPU
with the same number of threads, bit for bit. A run that a signal ends finishes its current step. Each of several processes has a
part of what one would have: of the batch, of the draws and of the losses (`engine/parallel.py`).
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate.utils import set_seed

import mfuser
from dgbench import results, temporaries
from dgbench.data.dataset import SegDataset
from dgbench.data.extra import Stream, digest_of, files_of, streams
from dgbench.data.sampling import sampler_of
from dgbench.data.union import Union, sources
from dgbench.engine import batches, checkpoint_writer, checkpoints, step, tracking
from dgbench.engine.checkpoints import Made
from dgbench.engine.device import accelerator_on, device_name, memory_refused, pick_device
from dgbench.engine.log import Log
from dgbench.engine.logged import Logged
from dgbench.engine.optim import Rate, optimizer_of
from dgbench.engine.pace import Pace
from dgbench.engine.parallel import Loss, prepared, with_norms
from dgbench.engine.stops import Stops
from dgbench.engine.team import PeerLost, Team, join
from dgbench.engine.tracking import Trackers
from dgbench.engine.trained import record_of
from dgbench.engine.watch import Watch
from dgbench.environment import code_commit, describe_environment
from dgbench.errors import CheckpointError, DataError, RecipeError
from dgbench.launch import launched
from dgbench.progress import Progress, Silent
from dgbench.recipe import Recipe, dump, recipe_hash
from mfuser import ops
from mfuser.segmentor import Segmentor

if TYPE_CHECKING:
    from accelerate import Accelerator

_logger = logging.getLogger(__name__)


def train(
    recipe: Recipe,
    run: Path,
    *,
    progress: Progress,
    resume: bool = False,
    device: str | None = None,
    root: Path | None = None,
    trackers: Trackers | None = None,
    team: Team | None = None,
    local_norms: bool = False,
) -> results.Record:
    """Train `recipe` in the folder `run`, which then holds its last checkpoint, and return the record of the training.

    Args:
        trackers: are told loss, learning rate and speed where `log.jsonl` is; whoever made them finishes them.
        team: the processes that train together, all of which call this; default: those that a launcher started.
        local_norms: BatchNorm may take the statistics of each process's part of a batch, or of each of `train.accumulate`.

    SIGINT, SIGTERM and SIGHUP write a checkpoint of the last finished step before they are raised; a second one waits for
    none but one that is being written. On a GPU that is done in the background (`engine/checkpoint_writer.py`).

    Raises: RecipeError, DataError, CheckpointError, BackendError for what a user can fix; KeyboardInterrupt, Terminated; PeerLost
        if another process has ended.
    """
    begun = time.perf_counter()
    spec = recipe.train
    trackers = trackers or Trackers()
    on = pick_device(device)
    team = team or join(launched(), on)
    accelerator = accelerator_on(on, spec.precision, trackers.names, run / tracking.FOLDER, team)
    main = team.main
    found = checkpoints.newest(run) if resume else None
    if spec.init is not None and not found:
        checkpoints.init_folder(Path(spec.init))  # before any time is spent
    dataset = _source(recipe, root)
    _check_resumable(recipe, run, root) if resume else None
    seen = _seen(dataset, run, found[0] if found else None)
    before = checkpoints.made_how(found[0]) if found else None
    model, init = _model(recipe, found[0] if found else None, before)
    model.check_backends()
    if spec.batch_size < model.min_batch:
        raise RecipeError(
            f"train.batch_size is {spec.batch_size}, but `{model.method}` needs at least {model.min_batch} images a step",
            f"--set train.batch_size={model.min_batch}",
        )
    extra, digests = _extras(recipe, model, root)
    _check_streams(run, digests, before, [stream.name for stream in extra])
    model, norms = with_norms(model.train(), team, accelerator.device, local=local_norms)
    speed = step.prepare(model, spec, team, accelerator.device, local_norms=local_norms)
    optimizer, rates = optimizer_of(model, recipe.optim)
    ran = ops.tally()

    commit, dirty = code_commit()
    environment = describe_environment(device_name(accelerator.device), torch.get_num_threads())
    about: dict[str, Any] = {"environment": environment, "commit": commit, "dirty": dirty, "init": init, "streams": digests}
    start = found[1] if found else 0
    if len(set(begins := team.each(start))) > 1:
        raise CheckpointError(
            f"{run}: processes found checkpoints of steps {', '.join(map(str, begins))}",
            "keep runs where all machines see the same files",
        )
    if team.world > 1:
        environment["processes"] = str(team.world)
    if speed.said:
        environment["training"] = speed.said
    log = None
    if main:
        trackers.begin(accelerator, recipe, start)
        run.mkdir(parents=True, exist_ok=True)
        dump(recipe, run / "recipe.yaml")  # written first: with it, a folder is a run that can be resumed
        log = Log(run / "log.jsonl", start, before)
        checkpoints.clean(run)
        temporaries.clear(run, shared=True)
        _warn_of_changes(before, environment, accelerator)
        dataset.prepare(progress)
        for stream in extra:
            stream.prepare(progress)
        sampler_of(recipe.data, dataset, spec.seed, progress)  # counts classes once; the other processes find them
    team.meet()
    if not main and team.local_rank == 0:  # of another machine, which may have another cache
        dataset.prepare(Silent())
        for stream in extra:
            stream.prepare(Silent())
    team.meet()

    place = batches.Place(team.rank, team.world, accelerator.device)
    loader = batches.of_steps(recipe, dataset, extra, start, place, progress)
    data = batches.Images(recipe, dataset, extra, place)
    if team.world > 1 and main:
        progress.note(f"{team}, {spec.batch_size // team.world} images of a batch each")
        progress.note(norms) if norms else None
    # faster convolutions: a step takes a tenth less on a CPU; checkpoints are still written in the usual order
    model.to(memory_format=torch.channels_last)
    loss_of, optimizer = prepared(accelerator, Loss(model), optimizer, averaged=speed.graphs is not None)
    if found:
        # after prepare(): the moments must land on the parameters' device
        checkpoints.load_optimizer(optimizer, found[0])
        if main:
            checkpoints.prune(run)  # older ones of a killed process, now that this one is known to be complete

    model.train()
    since = time.perf_counter()
    made = None

    def keep(done: int) -> Made:
        assert log is not None
        size, digest = log.sealed()
        told = Made(
            step=done,
            began=start,
            seconds=time.perf_counter() - since,
            loss=log.loss,
            peak_gib=speed.peak_gib(accelerator.device),
            backends=ops.ran_since(ran),
            processes=team.world,
            log_bytes=size,
            log_sha256=digest,
            **about,
        )
        writer.wait()  # so that two are never held
        with speed.whole():
            bare = getattr(optimizer, "optimizer", optimizer)
            own = checkpoint_writer.snapshot(model, bare, copy=writer.background)
        writer.put(partial(checkpoints.write, own, run, done, seen=seen, made=told))
        return told

    if main:
        progress.start(f"training {recipe.name} on {recipe.data.source}", spec.steps - start, "steps")
    finished = saved = start
    agreed = False  # all processes stop behind the same step
    pace = Pace(run, team, partial(speed.peak_gib, accelerator.device), accelerator.device)
    lines = Logged(team, accelerator.device, pace, log, trackers, progress)
    first = step.FirstStep(speed, progress.note if main else lambda _: None)
    writer = checkpoint_writer.Writer(background=accelerator.device.type in checkpoint_writer.BACKGROUND)
    with Stops() as stops, Watch(team, str(run)) as watch:
        # one of several processes stops where all do, not while it waits for its batch
        stops.busy = team.world > 1
        try:
            pace.mark()
            watch.at(start, "loading its batch")
            for batch in batches.on_device(loader, accelerator.device, start, spec.steps):
                stops.busy = True
                pace.waited(loading=True)
                at = batch.step
                first.begins()
                watch.at(at, "computing")
                # one seed per step and process, so that no generator's state has to be saved to resume exactly
                set_seed(_mix(spec.seed, at))
                model.before_step(at, spec.steps, data)
                if not model.training:
                    model.train()
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate.at(at, spec.steps, recipe.optim)
                    group["weight_decay"] = rate.decay_at(at, spec.steps, recipe.optim)
                seed = _mix(spec.seed, at, 0)
                loss, terms = step.gradients(accelerator, loss_of, model, batch, spec=spec, team=team, seed=seed)
                if spec.clip_norm is not None:
                    accelerator.clip_grad_norm_(model.parameters(), spec.clip_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                done = at + 1
                if spec.ema is not None:
                    model.update_average(done)
                first.ends()

                watch.at(at, "waiting for the others")
                lines.write()  # of the step before: the GPU has work for a step meanwhile
                pace.step(len(batch.images) * team.world)
                checkpoint_due = done % spec.checkpoint_every == 0 or done == spec.steps
                if done % spec.log_every == 0 or checkpoint_due:
                    lr = Rate(recipe.optim.lr, recipe.optim.min_lr).at(at, spec.steps, recipe.optim)
                    lines.take(done, loss, terms, lr, now=checkpoint_due)
                if main:
                    progress.advance(1)
                    writer.check()
                if main and checkpoint_due:
                    watch.at(at, "writing")
                    made = keep(done)
                    saved = done
                finished = done
                pace.mark()
                stops.busy = team.world > 1
                if asked := team.most(stops.asked or 0):
                    stops.busy = True  # a loss that is not finite counts more than the signal
                    lines.write()
                    stops.asked, agreed = stops.asked or asked, True
                    stops.check()
                pace.waited(loading=False)
                pace.mark()
                watch.at(done, "loading its batch")
            if main:
                watch.at(finished, "writing")
                writer.wait()
        except BaseException as error:
            if not agreed and not stops.hurried:
                lines.rescue()
            if team.world > 1 and not agreed:
                # where the others are in their step is not known: the last checkpoint counts
                if stops.asked is not None and (stops.hurried or team.lost(error) or isinstance(error, PeerLost)):
                    raise stops.error() from None
                if lost := team.lost(error):
                    raise lost from error
            if not agreed and (stops.asked is None or (stops.busy and not stops.hurried)):
                if refused := memory_refused(error):
                    raise RecipeError(f"step {finished + 1}: {refused}", "set train.batch_size or data.crop lower") from None
                raise
            # any exception: the same signal may have ended a worker, for which the loader raises
            if main and not stops.hurried:
                stops.busy = True
                if finished > saved:
                    keep(finished)
                writer.wait()
            if agreed:
                with suppress(PeerLost):  # the first process may be gone by then: its checkpoint is written
                    team.meet()
            raise stops.error() from None
        finally:
            writer.close()
            if main:
                progress.stop()
    speed.release()
    team.meet()
    total = time.perf_counter() - begun
    told = made or before
    if told is None:  # from an older version, whose checkpoints do not state it
        told = Made(
            step=spec.steps,
            began=0,
            seconds=None,
            loss=log.loss if log else None,
            peak_gib=None,
            backends={},
            processes=1,
            log_bytes=None,
            log_sha256=None,
            **about,
        )
    return record_of(recipe, run, dataset, seen, told, total if made else None, write=main)


def _warn_of_changes(before: Made | None, is_now: dict[str, str], accelerator: Accelerator) -> None:
    """Warn about differences that change the result of a resumed training."""
    if before is None:
        return
    names = ("threads", "torch") if accelerator.device.type == "cpu" else ("torch",)
    then, now = ({name: about.get(name) for name in names} for about in (before.environment, is_now))
    then["processes"], now["processes"] = str(before.processes), is_now.get("processes", "1")
    changed = [f"{name} {then[name]}, now {now[name]}" for name in now if then[name] != now[name]]
    if changed:
        _logger.warning(
            "started with %s: the training continues, but not bit for bit as it would have%s",
            ", ".join(changed),
            f"; OMP_NUM_THREADS={then['threads']} sets threads" if changed[0].startswith("threads") else "",
        )


def _source(recipe: Recipe, root: Path | None) -> SegDataset | Union:
    try:
        return sources(recipe.data, root)
    except DataError as missing:
        try:
            _model(recipe, None, None)
        except mfuser.WeightsNotFound as weights:
            # names everything that has to be downloaded
            hints = "\n".join(filter(None, (weights.hint, missing.hint)))
            raise DataError(f"{weights.message}\nand {missing.message}", hints) from None
        raise


def _seen(dataset: SegDataset | Union, run: Path, checkpoint: Path | None) -> checkpoints.Seen | None:
    """Return the source of the training; None when resuming a training that did not record it.

    Raises: CheckpointError if the training began with other images.
    """
    # a rendered source has as many images as are requested
    each = {
        part.domain.name: (len(part), len(part) if part.found is None else part.available, part.exported)
        for part in dataset.parts
    }
    images, available, rendered = zip(*each.values(), strict=True)
    now = checkpoints.Seen(sum(images), sum(available), any(rendered), each if len(each) > 1 else None)
    if checkpoint is None:
        return now
    before = checkpoints.seen_by(checkpoint)
    if before not in (None, now):
        was, is_now = (checkpoints.told(s, dataset.parts[0].domain.name) for s in (before, now) if s is not None)
        raise CheckpointError(
            f"{run} was started on {was}, now there are {is_now}", "restore the files it was started with, or start a new run"
        )
    return before


def _model(recipe: Recipe, checkpoint: Path | None, before: Made | None) -> tuple[Segmentor, str | None]:
    """Return the model at the start of the training (or of its rest), and the SHA-256 of `train.init`'s weights."""
    seed, init = recipe.train.seed, before.init if before else None
    set_seed(seed)
    if checkpoint is not None:
        model = checkpoints.load_for(recipe, checkpoint)
    else:
        weights: Literal["published", "random"] = "published" if recipe.train.init is None else "random"
        try:
            model = mfuser.build(recipe.method.name, **recipe.method.options, image_size=recipe.data.crop, weights=weights)
        except mfuser.WeightsNotFound:
            raise
        except ValueError as error:  # towers that do not fit each other, or the crop
            raise RecipeError(f"`{recipe.method.name}` cannot be built: {error}", "change `method` or `data.crop`") from error
        if recipe.train.init is not None:
            init = checkpoints.begin_with(model, Path(recipe.train.init))
            model.random_towers = False  # they are the other model's
    set_seed(seed)
    model.enter_training()
    if recipe.train.ema is not None:
        _in_32_bits(model)
        try:
            model.keep_average(0, 1 - recipe.train.ema)
        except ValueError as error:
            raise RecipeError(f"train.ema: {error}", "--set train.ema=null, or change the method's option") from None
    for name, path in files_of(model.files, recipe.data.extra, model.method).items():
        try:
            model.take_file(name, path)
        except ValueError as error:
            raise DataError(f"data.extra.{name} of `{model.method}`: {error}", f"set data.extra.{name} to another file") from None
    if checkpoint is not None:
        checkpoints.load_training(model, checkpoint)
    _in_32_bits(model)
    return model, init


def _in_32_bits(model: Segmentor) -> None:
    for parameter in model.parameters():
        # optimizer steps are too small for 16 bits; frozen parameters stay as they are
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


def _extras(recipe: Recipe, model: Segmentor, root: Path | None) -> tuple[list[Stream], dict[str, str]]:
    """Return the further images that a model is trained with, and the digests of these and of its files."""
    data, files = recipe.data, files_of(model.files, recipe.data.extra, model.method)
    extra = streams(model.extras, data.extra, model.method, data.crop, data.targets, root, data.domains, model.files)
    return extra, {stream.name: stream.digest() for stream in extra} | {name: digest_of(path) for name, path in files.items()}


def _check_streams(run: Path, now: dict[str, str], before: Made | None, streams: list[str]) -> None:
    """Raise a CheckpointError if a training was started with other images in its streams, or with other files."""
    for name, digest in (before.streams if before else {}).items():
        if now.get(name) != digest:
            raise CheckpointError(
                f"{run} was started with {'other images in' if name in streams else 'another file as'} data.extra.{name}",
                "restore the files it was started with, or start a new run",
            )


def _check_resumable(recipe: Recipe, run: Path, root: Path | None) -> None:
    from dgbench.recipe import load_recipe

    path = run / "recipe.yaml"
    if not path.is_file():
        raise CheckpointError(f"{run} is not a run: it has no recipe.yaml", "see `ls runs`, or start a new run")
    if recipe_hash(load_recipe(str(path), root=root)) != recipe_hash(recipe):
        raise CheckpointError(
            f"the recipe differs from the one {run} was started with", "resume without --set, or start a new run"
        )


def _mix(*numbers: int) -> int:
    """Return one 31-bit seed from several numbers."""
    import numpy as np

    return int(np.random.SeedSequence(numbers).generate_state(1)[0]) >> 1
