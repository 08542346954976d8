"""Where the time of a call goes: by a model's parts as they enter and leave, and by the kernels that it runs."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from dgbench.cost.timing import Call

# ---- by parts


class Stages:
    """A stopwatch that parts of a model switch: each moment counts for the innermost part that is running.

    What runs outside of all parts counts for the label that was given last, by `begin` or by a part that `then` names.

    On a GPU, moments are those at which the GPU arrives there (CUDA events), so that waiting for launches counts for the part
    that was to be launched. Parts inside of a compiled or captured graph do not switch.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._base, self._inside = "", list[str]()
        self._marks: list[tuple[Any, str]] = []  # a moment, and what runs from then on

    def begin(self, label: str) -> None:
        """Count from here on for `label`, outside of all parts."""
        self._base = label
        self._mark()

    @contextmanager
    def watching(
        self, parts: Mapping[str, Iterable[nn.Module]], then: Mapping[str, str] | None = None, *, backward: bool = False
    ) -> Iterator[None]:
        """Watch modules, by the label of what they are part of.

        Args:
            then: label -> what runs outside of all parts once such a part is left.
            backward: watch the backward pass, too: from where it reaches a part's outputs until it reaches another's.
        """
        handles, compiled = [], list[tuple[Any, Any]]()
        for label, modules in parts.items():
            after, turned = (then or {}).get(label), f"backward of {label}" if backward else None

            def enter(*_: object, label: str = label) -> None:
                self._enter(label)

            def leave(_: object, given: object, out: object, after: str | None = after, turned: str | None = turned) -> None:
                self._leave(after)
                for each in tree_leaves(out) if turned is not None else ():
                    if isinstance(each, Tensor) and each.requires_grad:
                        each.register_hook(lambda _, turned=turned: self.begin(turned))

            for module in modules:
                if module._compiled_call_impl is None:
                    handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
                else:  # whose hooks would be compiled with it, and run once
                    compiled.append((module, module._compiled_call_impl))
                    module._compiled_call_impl = _between(module._compiled_call_impl, enter, leave)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for each, call in compiled:
                each._compiled_call_impl = call

    def times(self, call: Call, *, first: str, repeats: int = 10) -> dict[str, float]:
        """Return the median milliseconds of each label over some calls, in the order in which they first run.

        Args:
            first: what runs before any part does.
        """
        found: dict[str, list[float]] = {}
        for repeat in range(repeats + 1):
            self._marks, self._inside = [], []
            self.begin(first)
            call()
            self._mark()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            if repeat:  # the first one makes the events
                for label, ms in self._sums().items():
                    found.setdefault(label, []).append(ms)
        return {label: statistics.median(values) for label, values in found.items()}

    def _sums(self) -> dict[str, float]:
        sums: dict[str, float] = {}
        for (here, label), (there, _) in zip(self._marks, self._marks[1:], strict=False):
            ms = here.elapsed_time(there) if self.device.type == "cuda" else 1e3 * (there - here)
            sums[label] = sums.get(label, 0.0) + ms
        return sums

    def _mark(self) -> None:
        moment: Any
        if self.device.type == "cuda":
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self._marks.append((moment, self._inside[-1] if self._inside else self._base))

    def _enter(self, label: str) -> None:
        self._inside.append(label)
        self._mark()

    def _leave(self, after: str | None) -> None:
        if self._inside:
            self._inside.pop()
        self._base = after or self._base
        self._mark()


def _between(call: Callable[..., Any], enter: Callable[..., None], leave: Callable[..., None]) -> Callable[..., Any]:
    def watched(*given: Any, **named: Any) -> Any:
        enter()
        out = None
        try:
            out = call(*given, **named)
        finally:
            leave(None, None, out)
        return out

    return watched


# ---- by kernels

# the first that fits; names of torch's and of the compiler's kernels, and on a CPU of ATen's operators
_KINDS: Sequence[tuple[str, str]] = (
    ("attention", r"flash|fmha|attention|sdpa|mem_eff"),
    (
        "MVFuser and scans",
        r"mvfuser|scanparams|scan_(forward|backward|summary|finish)|selective_scan|_forward_ends|_backward_ends",
    ),
    ("deformable attention", r"deform|\(.*params.*maps|, maps\)"),
    ("optimizer", r"adam|sgd|multi_tensor|foreach"),
    ("convolutions", r"conv|winograd|dgrad|wgrad|fprop|im2col|col2im|cudnn_(?!.*norm)|nchwtonhwc|nhwctonchw"),
    ("products", r"gemm|gemv|cutlass|nvjet|xmma|splitk|cublas|ampere_|sm\d\d_|addmm|aten::b?mm|matmul|aten::linear"),
    ("norms", r"norm"),
    ("softmax", r"softmax"),
    ("compiled and fused", r"^triton_"),
    (
        "sampling and indexing",
        r"grid_sampl|topk|sort|gather|scatter|index|upsample|interpolat|nonzero|reduce_by|radix",
    ),
    ("copies and casts", r"copy|memcpy|memset|cast|aten::to\b|catarray|aten::cat|fill"),
    ("element by element", r"elementwise|vectorized|reduce_kernel|aten::"),
)
OTHER = "other"


def kind_of(kernel: str) -> str:
    """Return what a kernel of this name is counted as."""
    return next((kind for kind, pattern in _KINDS if re.search(pattern, kernel, re.IGNORECASE)), OTHER)


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel's milliseconds in one call, all its launches together, and their number."""

    name: str
    ms: float
    launches: float
    kind: str


@dataclass(frozen=True, slots=True)
class Trace:
    """What one call runs: kernels, most expensive first, its wall time, and the time in which none ran."""

    wall_ms: float
    kernels: tuple[Kernel, ...] = field(repr=False)

    @property
    def busy_ms(self) -> float:
        """Sum over the kernels; of several streams at once it can exceed the wall time."""
        return sum(kernel.ms for kernel in self.kernels)

    def by_kind(self) -> dict[str, float]:
        """Return milliseconds by kind, most first."""
        sums: dict[str, float] = {}
        for kernel in self.kernels:
            sums[kernel.kind] = sums.get(kernel.kind, 0.0) + kernel.ms
        return dict(sorted(sums.items(), key=lambda item: -item[1]))


def traced(call: Call, device: torch.device, *, calls: int = 3) -> Trace:
    """Run a call under torch.profiler; on a CPU, operators stand for kernels."""
    gpu = device.type == "cuda"

    def together() -> float:
        begun = time.perf_counter()
        for _ in range(calls):
            call()
        if gpu:
            torch.cuda.synchronize(device)
        return 1e3 * (time.perf_counter() - begun) / calls

    together()
    wall = together()  # without the profiler, which slows launches down
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as seen:
        together()
    found = []
    for event in seen.key_averages():
        spent = (event.self_device_time_total if gpu else event.self_cpu_time_total) / 1e3 / calls
        if spent > 0:
            found.append(Kernel(event.key, spent, event.count / calls, kind_of(event.key)))
    return Trace(wall, tuple(sorted(found, key=lambda kernel: -kernel.ms)))
