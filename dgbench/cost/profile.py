"""What models cost: parameters and operations, counted without weights, and on a device times, memory and energy.

Counts are of one image in evaluation mode and do not depend on the machine (`count`); those known already are looked up
(`counted`). Times are of random weights (`model_times`), which cost what trained ones do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

import mfuser
from dgbench import results
from dgbench.cost.conventions import CONVENTIONS, Convention, Cost
from dgbench.cost.counted import ITSELF, Subject, Tally, keep, known, made_now
from dgbench.cost.model_times import MODEL, STEP, STEP_BATCH, Taken, Timing, visit
from dgbench.cost.timing import Hardware, hardware
from dgbench.engine.device import pick_device
from dgbench.engine.modes import EXACT, FAST, Compiling
from dgbench.engine.modes import mode as settled_mode
from dgbench.environment import code_commit, describe_environment
from dgbench.errors import DgbenchError, RecipeError, spelled, unknown, unknown_recipe
from dgbench.progress import Progress, Silent
from dgbench.protocol import lookup as protocol
from dgbench.recipe import MethodSpec, load_method, load_recipe, recipe_names
from mfuser.inference import windows
from mfuser.towers.table import TOWERS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZE = (512, 512)  # (H, W) of the papers' crops


@dataclass(frozen=True, slots=True)
class Component:
    """A part of a model by its attribute's name; `(itself)` is what the model does and holds outside of its parts."""

    name: str
    parameters: int
    trainable: int
    cost: Cost
    total: float  # as the profile's convention has it, in units of 1e9


@dataclass(frozen=True, slots=True)
class Row:
    """One model."""

    method: str
    variant: str
    recipe: str
    size: tuple[int, int]
    windows: int  # forward passes an image takes
    parameters: int
    trainable: int
    cost: Cost  # of an image
    total: float  # the cost as the profile's convention has it, in units of 1e9
    gflop: float  # the scan included
    components: tuple[Component, ...]
    by_operator: dict[str, Cost]
    by_module: dict[str, Cost] = field(repr=False)
    timings: tuple[Timing, ...] = ()
    best: Timing | None = None  # at the batch that most images a second pass at
    step: Timing | None = None  # of training: forward, losses, backward, optimizer
    backends: dict[str, str] = field(default_factory=dict)
    problem: str = ""  # why times are missing


@dataclass(frozen=True, slots=True)
class Profile:
    """What `dgbench profile` shows."""

    rows: tuple[Row, ...]
    by_module: bool  # whether each model's parts are shown, too
    convention: str
    unit: str
    dtype: str
    compiled: bool
    mode: str  # `exact` or `fast`
    slide: tuple[int, int] | None  # (H, W) of whole images, scored by a sliding window
    hardware: Hardware | None
    unmeasured: str  # why nothing was timed
    created: str
    environment: dict[str, str]
    commit: str | None
    dirty: bool | None
    counted_with: str = ""  # the packages that counts were made with where other ones are here


def subjects(
    names: Sequence[str] = (),
    *,
    vlm: str | None = None,
    vfm: str | None = None,
    backbone: str | None = None,
    settings: Sequence[str] = (),
    size: tuple[int, int] | None = None,
) -> list[Subject]:
    """Return the models that names and flags mean.

    Args:
        names: methods, which stand for all of their backbones, or recipes; by default all methods that have such towers.
        vlm, vfm, backbone, settings: as those of `dgbench train`.    size: (H, W); by default the recipe's crop, else 512 x 512.

    Raises: RecipeError for what is unknown.
    """
    found: list[Subject] = []
    names = [spelled(name, mfuser.method_names()) or name for name in names]
    asked = {"vlm": vlm, "vfm": vfm, "backbone": backbone}
    towers = {key: spelled(name, TOWERS) or name for key, name in asked.items() if name}
    for name in names or _with_towers(towers):
        if name in mfuser.method_names():
            own = dict(towers)
            if names and "backbone" in own:
                own["backbone"] = mfuser.methods.of_kind(name, own["backbone"])
            found += [Subject(method, size or SIZE) for method in _backbones(name, own, settings)]
            continue
        if "/" not in name and not name.endswith((".yaml", ".yml")):
            raise RecipeError(*unknown_recipe(name, mfuser.method_names(), recipe_names()))
        recipe = load_recipe(name, settings, flags=[f"method.{key}={value}" for key, value in towers.items()])
        found.append(Subject(recipe.method, size or recipe.data.crop, recipe.name))
    return found


def _with_towers(towers: Mapping[str, str]) -> list[str]:
    """Return the methods that take these towers; those with such options where none does, to say why."""

    def takes(name: str) -> bool:
        try:
            return bool(_backbones(name, towers, ()))
        except RecipeError:
            return False

    known = [
        name for name in mfuser.method_names() if {f.name for f in dataclasses.fields(mfuser.options(name))}.issuperset(towers)
    ]
    return [name for name in known if takes(name)] or known


def _backbones(name: str, towers: Mapping[str, str], settings: Sequence[str]) -> list[MethodSpec]:
    rows = mfuser.methods.module(name).BACKBONES
    for key in ("vlm", "backbone"):
        if key in towers:
            rows = [row for row in rows if row.get(key) == towers[key]] or [{key: towers[key]}]
    vfm = towers.get("vfm")
    if vfm is not None:
        # in place of the usual one: small towers are made for each other
        usual = rows[0].get("vfm")
        rows = [row for row in rows if row.get("vfm") == vfm] or [{**row, "vfm": vfm} for row in rows if row.get("vfm") == usual]
    found: list[MethodSpec] = []
    for row in rows:
        method = load_method(name, row, settings)
        if method not in found:  # settings may name the towers, too
            found.append(method)
    return found


def profile(
    chosen: Sequence[Subject],
    progress: Progress,
    *,
    convention: str = "mac",
    batches: Sequence[int] = (),
    dtype: str | None = None,
    compiled: bool = False,
    mode: str = EXACT,
    compiles: bool | None = None,
    device: str | None = None,
    slide: tuple[int, int] | None = None,
    timed: bool = True,
    by_module: bool = False,
    passes: int = 3,
) -> Profile:
    """Count and time models.

    Args:
        convention: one of CONVENTIONS.
        batches: images at a time; by default 1 and the number at which most pass a second.
        dtype: one of DTYPES; by default bf16 on a GPU, fp32 on a CPU. Weights are fp32 under autocast.
        compiled: through torch.compile, as a whole.
        mode: `fast` times what `mfuser.fast` prepares, at batches 1 and 8 unless `batches` says others, and no training step.
        compiles: whether `fast` does; by default it does.
        device: to time on; by default a GPU, and nowhere without one.
        slide: (H, W) of whole images to be scored by a window of the models' size.    timed: False only counts.
        by_module: show the parts of each model.
        passes: how often each model is built and measured, one after the other, on a GPU; a CPU does it once.

    Raises: DgbenchError for unknown names, and for what does not go together; CountError for a model that cannot be counted.
    """
    how = settled_mode(mode, compiles=compiles)
    if how.name == FAST and (compiled or dtype not in (None, "bf16")):
        raise DgbenchError("mode `fast` has its own types and compiles layer by layer", "give it without --compile and --dtype")
    on, precision, unmeasured = settled(convention, "bf16" if how.name == FAST else dtype, device, timed=timed)
    compiling = Compiling(how)
    progress.start("counting", len(chosen), "models")
    rows, elsewhere = [], ""
    try:
        for subject in chosen:
            row, made_with = _counted(subject, convention, slide, progress)
            rows.append(row)
            elsewhere = elsewhere or made_with
            progress.advance()
        gpu = hardware(on) if on is not None else None
        if on is not None and gpu is not None:
            passes = passes if on.type == "cuda" else 1
            progress.start(f"timing on {gpu.name}", passes * len(chosen), "visits")
            taken = [Taken() for _ in chosen]
            for _ in range(passes):
                for subject, found in zip(chosen, taken, strict=True):
                    visit(found, subject, on, DTYPES[precision], batches, slide, compiled=compiled, how=how)
                    compiling.tell(progress)
                    progress.advance()
            rows = [_with_times(row, found, batches) for row, found in zip(rows, taken, strict=True)]
    finally:
        progress.stop()
    commit, dirty = code_commit()
    return Profile(
        tuple(rows),
        by_module,
        convention,
        CONVENTIONS[convention].unit,
        precision,
        compiled or (how.name == FAST and how.compiles),
        how.name,
        slide,
        gpu,
        unmeasured,
        results.now_iso(),
        describe_environment(gpu.name if gpu else "none", torch.get_num_threads()),
        commit,
        dirty,
        elsewhere,
    )


def settled(convention: str, dtype: str | None, device: str | None, *, timed: bool) -> tuple[torch.device | None, str, str]:
    """Return the device to time on, the dtype's name, and without a device why nothing is timed.

    Raises: DgbenchError for a name that is unknown, or a device that this machine lacks.
    """
    if convention not in CONVENTIONS:
        raise DgbenchError(*unknown("convention", convention, CONVENTIONS))
    if dtype is not None and dtype not in DTYPES:
        raise DgbenchError(*unknown("dtype", dtype, DTYPES))
    if not timed:
        return None, dtype or "fp32", "only counts were asked for"
    if device is None and not torch.cuda.is_available():
        reason = "torch finds no usable CUDA GPU; --device cpu times on this machine's processor"
        return None, dtype or "fp32", reason
    on = pick_device(device)
    return on, dtype or ("bf16" if on.type == "cuda" else "fp32"), ""


# ---- counts


def counted_total(subject: Subject, convention: str) -> float:
    """Return the cost of one crop as the convention has it, in units of 1e9."""
    return _counted(subject, convention, None, Silent())[0].total


def _counted(subject: Subject, convention: str, slide: tuple[int, int] | None, progress: Progress) -> tuple[Row, str]:
    """Return the row, and the packages that its count was made with where they are other ones than those here."""
    tally, rule, passes = known(subject), CONVENTIONS[convention], 1
    fresh = tally is None
    if tally is None:
        tally = keep(subject, made_now(subject))
    if slide is not None:
        rows, columns = windows(slide, subject.size, protocol("unified").stride_of(subject.size))
        passes = len(rows) * len(columns)
    parts, counted = _components(tally, passes, rule), tally.counted
    cost = counted.total * passes
    row = Row(
        method=subject.method.name,
        variant=subject.method.variant,
        recipe=subject.recipe,
        size=subject.size,
        windows=passes,
        parameters=sum(part.parameters for part in parts),
        trainable=sum(part.trainable for part in parts),
        cost=cost,
        total=rule.total(cost) / 1e9,
        gflop=CONVENTIONS["flop"].total(cost) / 1e9,
        components=parts,
        by_operator={name: own * passes for name, own in counted.by_operator.items()},
        by_module={name: own * passes for name, own in counted.by_module.items()},
    )
    if fresh:
        # what takes seconds is told as it comes, before the table
        size = f"{subject.size[0]}x{subject.size[1]}"
        progress.note(
            f"counted {row.recipe or row.method} ({row.variant}) at {size}: {row.parameters / 1e6:,.2f} M parameters, "
            f"{row.total:,.2f} {rule.unit}"
        )
    return row, tally.elsewhere


def _components(tally: Tally, passes: int, rule: Convention) -> tuple[Component, ...]:
    """Return the model's direct parts that hold or cost anything, in their order."""
    parts, rest = [], tally.counted.total
    for part in tally.held:
        if part.name == ITSELF:
            cost = rest
        else:
            cost = tally.counted.by_module.get(part.name, Cost())
            rest = Cost(*(a - b for a, b in zip(rest.parts, cost.parts, strict=True)))
        if part.parameters or any(cost.parts) or part.name == ITSELF:
            own = cost * passes
            parts.append(Component(part.name, part.parameters, part.trainable, own, rule.total(own) / 1e9))
    return tuple(parts)


# ---- times


def _with_times(row: Row, taken: Taken, batches: Sequence[int]) -> Row:
    timings = tuple(timing for size in batches or (1,) if (timing := taken.timing((MODEL, size))))
    best = taken.timing((MODEL, taken.best)) if taken.best else None
    step = taken.timing((STEP, STEP_BATCH))
    return dataclasses.replace(row, timings=timings, best=best, step=step, backends=taken.backends, problem=taken.problem)
