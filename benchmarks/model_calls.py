"""What `benchmarks/model.py` calls and times: MFuser and its training steps in every mode, its parts, its towers' products."""

from __future__ import annotations

import copy
import dataclasses
import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from model_table import EAGER, FAST, SLIDE, STEP, Measured, Row
from torch import Tensor

import mfuser
from dgbench.cost import products
from dgbench.cost.counted import Subject, built
from dgbench.cost.model_times import training_steps
from dgbench.cost.stages import Stages
from dgbench.cost.timing import Call, graphed
from dgbench.engine import step
from dgbench.engine.device import peak_gib
from dgbench.engine.modes import without_tf32
from dgbench.engine.team import join
from dgbench.launch import launched
from dgbench.protocol import lookup as protocol
from dgbench.recipe import TrainSpec
from mfuser import fast as fast_mode
from mfuser.inference import windows
from mfuser.segmentor import Batch, Segmentor

Peak = Callable[[torch.device], float]
TOGETHER = ("towers", "fusers")  # which are compiled as one


@dataclass
class Bench:
    """A pair of towers on a device, and what its calls need."""

    subject: Subject
    device: torch.device
    dtype: torch.dtype
    seconds: float  # for each call of a row
    rounds: int  # at least so many, within four times the seconds
    compiled: bool
    measured: dict[str, Measured] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failed: bool = False
    keep: Callable[[], None] = lambda: None  # writes what has been found so far
    last: float = field(default_factory=time.perf_counter)

    @property
    def whole(self) -> tuple[int, int]:
        """(H, W) of the image under the sliding window: 1024x2048 for crops of 512."""
        return 2 * self.subject.size[0], 4 * self.subject.size[1]

    @property
    def windows(self) -> int:
        """How many of them it takes."""
        rows, columns = windows(self.whole, self.subject.size, protocol("unified").stride_of(self.subject.size))
        return len(rows) * len(columns)

    def crops(self, row: Row) -> int:
        """Return the crops that go through the towers in a call of a row."""
        return self.windows if row.kind == SLIDE else row.images

    def model(self) -> Segmentor:
        """Build it on the device."""
        with torch.device(self.device):
            return built(self.subject).to(self.device).eval()

    def asked(self, row: Row, model: Callable[[Tensor], Tensor], dtype: torch.dtype | None) -> Call:
        """Return an inference call of a row; without a dtype there is no autocast."""
        height, width = self.whole if row.kind == SLIDE else self.subject.size
        images = torch.rand(row.images, 3, height, width, device=self.device)
        stride = protocol("unified").stride_of(self.subject.size)

        def call() -> None:
            exact = without_tf32(model) if dtype is None else nullcontext()
            with exact, torch.no_grad(), torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
                if row.kind == SLIDE:
                    mfuser.slide(model, images, crop=self.subject.size, stride=stride)
                else:
                    model(images)

        return call

    def peak(self, call: Call, before: float, of: Peak = peak_gib) -> float:
        """Run a call twice, and return the peak GiB of the second above what was there before its model was.

        Graphs of a training count the peak until they were captured, which is in the first call.
        """
        for _ in range(2):
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
                torch.cuda.reset_peak_memory_stats(self.device)
            call()
        return of(self.device) - before

    def tell(self, what: str) -> None:
        """Say how long something took, and keep what has been found."""
        now = time.perf_counter()
        print(f"{what}: {now - self.last:.1f} s", file=sys.stderr, flush=True)
        self.last = now
        self.keep()

    @contextmanager
    def going_on(self, what: str, row: Row | None = None, column: str = "") -> Iterator[None]:
        """Note an error of what is measured in the block, of a row's column, and go on: the rest of a run is worth having."""
        try:
            yield
        except Exception as error:
            text = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            self.notes.append(f"{', '.join(filter(None, [row.name if row else '', what]))}: {text}")
            self.failed = True
            if row is not None:
                self.measured[row.name].errors[column] = text
            traceback.print_exc()
        else:
            return
        self.released()  # behind the error, which holds what was computed

    def held(self) -> float:
        """Return the GiB that are allocated now; 0 on a CPU, where the peak is the process's."""
        return torch.cuda.memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else 0.0

    def released(self) -> None:
        """Give memory back behind a model that went."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def towers(self, row: Row) -> list[products.Step]:
        """Return the steps of both image towers in a row."""
        model: Any = built(self.subject, weights="meta", backend="torch").to("meta")
        return products.of_towers([model.vfm, model.vlm], self.crops(row), self.subject.size)

    def bare(self, steps: Sequence[products.Step], row: Row) -> Call:
        """Return the products of a row as one call: on a GPU as one graph, so that launches cost nothing."""
        call = products.bare(steps, self.device, self.dtype, training=row.kind == STEP)
        if self.device.type != "cuda":
            return call
        try:
            return graphed(call, before=3)
        except RuntimeError as error:
            self.notes.append(f"{row.name}: products were launched one by one, and wait for that; no CUDA graph of them: {error}")
            return call


# ---- the fast path, if there is one


def fast_inference(bench: Bench, model: Segmentor, **chosen: Any) -> Any:
    """Prepare a model as `dgbench eval --mode fast` does."""
    return fast_mode.prepare(model, dtype=bench.dtype, compile=bench.compiled, **chosen)


def fast_stages(bench: Bench, model: Segmentor, rows: Sequence[Row]) -> None:
    """Time fast inference part by part, without CUDA graphs, inside of which nothing can be told apart.

    Parts are those that are not compiled as a whole; what is compiled between them counts as one.
    """
    ready = fast_inference(bench, model, graphs=False)
    inner: Any = ready._model  # its parts are where the model's are
    parts = outside(inner, (*TOGETHER, "neck", "texts"))
    stages = Stages(bench.device)
    with stages.watching(parts, then={"mask decoder": "upsampling"}):
        for row in rows:
            with bench.going_on("stages of the fast model", row, f"stages, {FAST}"):
                call = bench.asked(row, ready, None)
                call()  # compiles
                found = stages.times(call, first=" + ".join((*TOGETHER, "neck")), repeats=bench.rounds)
                bench.measured[row.name].stages[f"{FAST}, no graph"] = found


def training(
    bench: Bench, model: Segmentor, stages: Stages, *, fast: bool, graphs: bool = True
) -> tuple[Callable[[int], Call], Peak]:
    """Return the training steps of a recipe under autocast, with all options for speed or with none, and what their peak is."""
    peak: Peak = peak_gib
    if fast:
        model.enter_training()
        spec = TrainSpec(steps=1, batch_size=2, precision="bf16", **options(bench, model, graphs))
        ready = step.prepare(model.train(), spec, join(launched(), bench.device), bench.device)
        said = ready.said or "nothing of these towers is frozen, and nothing is compiled"
        bench.notes.append(f"fast training{'' if graphs else ', stages'}: {said}")
        peak = ready.peak_gib
    return training_steps(model, bench.subject.size, bench.device, bench.dtype, begins=stages.begin, loaded=as_loaded), peak


def options(bench: Bench, model: Any, graphs: bool) -> dict[str, Any]:
    """Return the options for speed that a model and a device take."""
    frozen = not any(parameter.requires_grad for tower in (model.vfm, model.vlm) for parameter in tower.parameters())
    on = {"graphs": True} if graphs and bench.device.type == "cuda" else {}
    return {"frozen": "bf16" if frozen else None, "compile": "blocks" if bench.compiled else None, **on}


def training_stages(bench: Bench, rows: Sequence[Row], *, fast: bool) -> None:
    """Time training steps part by part, without CUDA graphs."""
    torch.compiler.reset()  # another model's graphs count for torch's limit of one code's
    stages, model = Stages(bench.device), bench.model()
    steps, _ = training(bench, model, stages, fast=fast, graphs=False)
    calls = {row.name: steps(row.images) for row in rows}
    for call in calls.values():
        call()  # compiles
    parts = outside(model, TOGETHER) if fast else parts_of(model)
    with stages.watching(parts, then={"mask decoder": "score map"}, backward=True):
        for row in rows:
            column = f"{FAST}, no graph" if fast else EAGER
            with bench.going_on("stages", row, f"stages, {column}"):
                found = stages.times(calls[row.name], first="forward", repeats=bench.rounds)
                bench.measured[row.name].stages[column] = renamed(found) if fast else found


def as_scored(model: Segmentor) -> Segmentor:
    """Return what `dgbench eval` scores with in exact mode: class texts are computed once."""
    held = copy.deepcopy(model)
    fast_mode.hold_texts(held)
    return held


def renamed(stages: Mapping[str, float]) -> dict[str, float]:
    """Return the stages of a fast training step by what they hold: towers and fusers are compiled as one, and begin nothing."""
    whole = " + ".join(TOGETHER)
    names = {"forward": whole, "backward of neck": f"backward of neck + {whole}"}
    return {names.get(label, label): ms for label, ms in stages.items()}


def as_loaded(batch: Batch) -> Batch:
    """Add the classes that a batch shows, which a loader finds on the CPU, so that a GPU need not be asked."""
    if "present" not in (known.name for known in dataclasses.fields(Batch)):
        return batch
    from mfuser.decoder.matching import present_classes

    return dataclasses.replace(batch, present=present_classes(batch.labels.cpu(), len(Segmentor.classes)))


# ---- parts


def parts_of(model: Any) -> dict[str, list[torch.nn.Module]]:
    """Return MFuser's parts by the name of their stage; a prepared copy has one layer for the texts that have seen the image."""
    seen = [model.embedding, *([model.context_decoder] if model.context_decoder else [])]
    towers = [tower for tower in (model.vfm, model.vlm) if tower is not None]
    inner = [part for tower in towers for part in (tower.trunk.patch_embed.proj, *tower.trunk.blocks)]
    return {
        "towers": inner,
        "fusers": [*model.adapters, *model.adapter_proj1, *model.adapter_proj2],
        "neck": [model.fpn1, model.fpn2],
        "texts": [model.text],
        "embeddings and MTEnhancer": [model.describe] if hasattr(model, "describe") else seen,
        "pixel decoder": [model.pixel_decoder],
        "mask decoder": [model.mask_decoder],
        "loss": [model.criterion],
    }


def outside(model: Any, compiled: Sequence[str]) -> dict[str, list[torch.nn.Module]]:
    """Return the parts that are not compiled, or replaced, as a whole: in the others nothing can be told apart."""
    return {label: modules for label, modules in parts_of(model).items() if label not in compiled}
