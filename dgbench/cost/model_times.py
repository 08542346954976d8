"""Times, memory and energy of a model's forward pass and of its training step on a device.

Weights are random, which cost what trained ones do.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

import mfuser
from dgbench.cost.counted import Subject, built
from dgbench.cost.timing import Call, Times, joules, samples, times
from dgbench.engine.device import peak_gib
from dgbench.engine.modes import FAST, Mode, ready, without_tf32
from dgbench.protocol import lookup as protocol
from mfuser import ops
from mfuser.fast import Prepared
from mfuser.segmentor import Batch, Segmentor

EXACTLY = Mode()
STEP_BATCH = 2  # images a GPU trains on at a time in the papers' recipes
_MOST = 64  # images at a time that the search for the best batch tries
FAST_BATCH = 8  # of mode `fast`, where every batch that a search tries would be compiled
_GAIN = 1.02  # by which twice as many images at a time must be faster to be worth it

MODEL, STEP = "model", "step"  # the calls that are timed
What = tuple[str, int]  # the forward pass or a training step, and the images at a time


@dataclass(frozen=True, slots=True)
class Timing:
    """`batch` images at a time: milliseconds of a call, peak GiB of a GPU's memory, joules an image."""

    batch: int
    ms: Times
    gib: float | None
    joules: float | None = None

    @property
    def images_per_second(self) -> float:
        """By the median."""
        return 1e3 * self.batch / self.ms.median


@dataclass
class Taken:
    """All that is measured of a model, over several passes: a process is fast or slow for seconds on end."""

    ms: dict[What, list[float]] = field(default_factory=dict)
    gib: dict[What, float] = field(default_factory=dict)
    joules: dict[What, float] = field(default_factory=dict)  # an image
    best: int | None = None  # the batch that most images a second pass at
    backends: dict[str, str] = field(default_factory=dict)
    problem: str = ""

    def timing(self, what: What) -> Timing | None:
        """Sum up one thing's passes."""
        ms = self.ms.get(what)
        return Timing(what[1], Times.of(ms), self.gib.get(what), self.joules.get(what)) if ms else None

    def measure(self, what: What, call: Call, device: torch.device, *, energy: bool = False) -> None:
        """Time a call once more."""
        gpu = device.type == "cuda"
        if gpu:
            torch.cuda.reset_peak_memory_stats(device)
        self.ms[what] = self.ms.get(what, []) + samples({"": call}, device, at_most=0.25, flush=False)[""]
        if gpu:
            self.gib[what] = peak_gib(device)
        if energy and what not in self.joules and (used := joules(call, device)) is not None:
            self.joules[what] = used / what[1]


def visit(
    taken: Taken,
    subject: Subject,
    device: torch.device,
    dtype: torch.dtype,
    batches: Sequence[int],
    slide: tuple[int, int] | None,
    *,
    compiled: bool,
    how: Mode = EXACTLY,
) -> None:
    """Build a model, and measure it once; in mode `fast` at few batches, each of which is compiled, and without a step."""
    gpu = device.type == "cuda"
    ran = ops.tally()
    try:
        model = _on(subject, device)
        model.check_backends()
        merged = model.merge()
        fast = how.name == FAST
        forward: Callable[[Tensor], Tensor] = torch.compile(model) if compiled else ready(model, how) if fast else model
        if fast:
            model = None  # type: ignore[assignment]  # the copy is what is measured
        # a size is compiled in its first call and captured in its second, which are no samples
        ask = _Asked(forward, subject.size, slide, device, dtype, before=2 if fast else 0)
        for size in batches or (1,):
            taken.measure((MODEL, size), ask.batch(size), device, energy=bool(batches))
        if gpu and not batches:
            taken.best = taken.best or (FAST_BATCH if fast else _best_batch(ask, device))
            taken.measure((MODEL, taken.best), ask.batch(taken.best), device, energy=True)
        if isinstance(forward, Prepared) and forward.uncaptured:
            taken.problem = "without a CUDA graph: " + "; ".join(f"{what}: {why}" for what, why in forward.uncaptured.items())
        if gpu and slide is None and not fast:
            if merged:  # a step trains what is apart
                forward = ask = None  # type: ignore[assignment]
                model = _on(subject, device)
            taken.measure((STEP, STEP_BATCH), training_step(model, subject.size, device, dtype), device)
    except torch.OutOfMemoryError as error:
        taken.problem = str(error).splitlines()[0]  # what was measured before stays
    finally:
        model = forward = ask = None  # type: ignore[assignment]
        if gpu:
            gc.collect()  # a prepared copy hangs in cycles, and would count as the next model's memory
            torch.cuda.empty_cache()
    taken.backends |= ops.ran_since(ran)


def _on(subject: Subject, device: torch.device) -> Segmentor:
    with torch.device(device):
        return built(subject).to(device).eval()


class _Asked:
    """A model's forward pass over images of one size, at any batch."""

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        crop: tuple[int, int],
        slide: tuple[int, int] | None,
        device: torch.device,
        dtype: torch.dtype,
        *,
        before: int = 0,
    ) -> None:
        self.before = before
        self.model, self.crop, self.slide, self.device, self.dtype = model, crop, slide, device, dtype
        self.stride = protocol("unified").stride_of(crop)

    def batch(self, size: int) -> Call:
        """Return a call with that many images, which was called `before` times."""
        images = torch.rand(size, 3, *(self.slide or self.crop), device=self.device)

        def call() -> Tensor:
            # not inference_mode: nn.MultiheadAttention's products under autocast are batched there, and far slower
            # as a score of exact mode, without TF32
            exact = without_tf32(self.model) if self.dtype == torch.float32 else nullcontext()
            with exact, torch.no_grad(), torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                if self.slide is None:
                    return self.model(images)
                return mfuser.slide(self.model, images, crop=self.crop, stride=self.stride)

        for _ in range(self.before):
            call()
        return call


def _best_batch(ask: _Asked, device: torch.device) -> int:
    """Return the number of images at a time, a power of two, beyond which no more pass a second, or fit."""
    best, rate, worse, size = 1, 0.0, 0, 1
    while size <= _MOST and worse < 2:
        try:
            tried = size / times(ask.batch(size), device, at_most=0.1, least=5, flush=False).median
        except RuntimeError as error:  # out of memory is one, too
            if not isinstance(error, torch.OutOfMemoryError) and "INT_MAX" not in str(error):
                raise
            torch.cuda.empty_cache()
            break
        worse = 0 if tried > _GAIN * rate else worse + 1
        best, rate = (size, tried) if tried > _GAIN * rate else (best, rate)
        size *= 2
    return best


def training_step(model: Segmentor, size: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Call:
    """Return a training step of `STEP_BATCH` images; see `training_steps`."""
    return training_steps(model, size, device, dtype)(STEP_BATCH)


def training_steps(
    model: Segmentor,
    size: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    begins: Callable[[str], object] = lambda part: None,
    loaded: Callable[[Batch], Batch] = lambda batch: batch,
) -> Callable[[int], Call]:
    """Return what makes training steps of any number of images, as `dgbench train` takes them, with one optimizer for all.

    They are on noise: labels are of all classes, in blocks of 32 pixels.

    Args:
        begins: is told as "forward", "backward" and "optimizer" begin.
        loaded: adds to a batch what a loader knows of it.
    """
    model.enter_training()
    model.to(device)
    # what a method mines once
    model.before_step(0, 1, _Noise(loaded(_batch(model, STEP_BATCH, size, device))))
    model.train()
    optimizer = torch.optim.AdamW(model.groups(1e-6, 0.0), fused=True)

    def of(images: int) -> Call:
        batch = loaded(_batch(model, images, size, device))

        def call() -> None:
            begins("forward")
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = torch.stack(list(model.loss(batch).values())).sum()
            begins("backward")
            loss.backward()
            begins("optimizer")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return call

    return of


def _batch(model: Segmentor, images: int, size: tuple[int, int], device: torch.device) -> Batch:
    extra: dict[str, Tensor] = {}
    for stream in model.extras:
        pictures, labels = _noise(model, images, size if stream.size == "crop" else stream.size, device)
        extra |= {stream.name: pictures} | ({f"{stream.name}_{stream.beside}": labels} if stream.beside else {})
    return Batch(*_noise(model, images, size, device), extra)


@dataclass(frozen=True, slots=True)
class _Noise:
    """Training data of one batch: `mfuser.segmentor.TrainingData`."""

    batch: Batch

    def batches(self, seed: int, *, augmented: bool = False) -> Iterator[Batch]:
        """Yield it."""
        yield self.batch


def _noise(model: Segmentor, images: int, size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    coarse = torch.randint(0, len(model.classes), (images, -(-size[0] // 32), -(-size[1] // 32)), device=device)
    labels = coarse.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, : size[0], : size[1]]
    return torch.rand(images, 3, *size, device=device), labels
