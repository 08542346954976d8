"""Selection of an operator's backend: one row per backend, tried in order, or the one that was named.

A named backend runs or raises an error. "auto" takes the first row that accepts the tensors; the environment
variable MFUSER_BACKEND names one for every "auto". A name applies to all operators; `op=name,op=name` names one for each.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor


class BackendError(ValueError):
    """No backend can run, or the named one cannot; the message lists the reasons."""

    hint = "`dgbench kernels list` says what runs on this machine"

    @property
    def message(self) -> str:
        """The text without the hint."""
        return str(self)


@dataclass(frozen=True)
class Backend:
    """One implementation: a module with the op's `forward` and `backward`, imported on first use."""

    name: str
    module: str
    # why it cannot take the op's tensors (None: absent), else None; by default the module's own `refuse`, if it has one
    refuse: Callable[..., str | None] | None = None
    auto: bool = True  # False: runs only when named
    # as `refuse`, but called before the module is imported, as far as possible without its compiler
    early: Callable[..., str | None] | None = None
    gpu: bool = False  # "auto" leaves tensors on a CPU to others, also where the kernels are interpreted or emulated

    def load(self) -> ModuleType:
        # the same as `import_module` returns, but faster, for calls of operators
        module = sys.modules.get(self.module)
        if module is None or getattr(module.__spec__, "_initializing", False):  # another thread may be importing it
            return import_module(self.module)
        return module


def _not_for_triton(*tensors: Tensor | None) -> str | None:
    # interpreted, its kernels run on a CPU; if Triton is missing, the import reports it
    problem = None if os.environ.get("TRITON_INTERPRET") else mismatch(tensors, "cuda")
    return problem if problem and _there("triton") else None


@cache
def _there(package: str) -> bool:
    return find_spec(package) is not None


_KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_SCAN, _DEFORM, _FUSER = "mfuser.ops.selective_scan", "mfuser.ops.ms_deform_attn", "mfuser.ops.mvfuser"
TABLE: dict[str, tuple[Backend, ...]] = {
    "selective_scan": (
        Backend("cuda", f"{_SCAN}.cuda_backend", gpu=True),
        Backend("triton", f"{_SCAN}.triton_backend", gpu=True, early=_not_for_triton),
        # its gradient of A is rounding noise for states that decay fast (mamba_backend.py): only used when named
        Backend("mamba_ssm", f"{_SCAN}.mamba_backend", auto=False, gpu=True),
        Backend("torch", f"{_SCAN}.torch_backend"),
        Backend("reference", f"{_SCAN}.reference", auto=False),
    ),
    "ms_deform_attn": (
        Backend("cuda", f"{_DEFORM}.cuda_backend", gpu=True),
        Backend("triton", f"{_DEFORM}.triton_backend", gpu=True, early=_not_for_triton),
        Backend("torch", f"{_DEFORM}.torch_backend"),
        Backend("reference", f"{_DEFORM}.reference", auto=False),
    ),
    "mvfuser": (
        Backend("cuda", f"{_FUSER}.cuda_backend", gpu=True),
        Backend("triton", f"{_FUSER}.triton_backend", gpu=True, early=_not_for_triton),
        # MVFuser's modules one by one, around the scan of that name
        Backend("torch", f"{_SCAN}.torch_backend"),
        Backend("reference", f"{_SCAN}.reference", auto=False),
    ),
}


def rows(op: str) -> tuple[Backend, ...]:
    """Return the backends of `op` in the order in which "auto" tries them.

    Raises: BackendError for an op that does not exist.
    """
    if op not in TABLE:
        raise BackendError(f"unknown op `{op}`; there are: {', '.join(TABLE)}")
    return TABLE[op]


def lookup(op: str, name: str) -> Backend:
    """Return the backend called `name`.

    Raises: BackendError for a name that `op` does not have.
    """
    for backend in rows(op):
        if backend.name == name:
            return backend
    raise BackendError(f"{op} has no backend `{name}`; there are: {', '.join(b.name for b in rows(op))}")


def unusable(backend: Backend, *tensors: Tensor | None) -> str | None:
    """Say why `backend` cannot take `tensors`; None when it can."""
    if backend.early and backend.module not in sys.modules and (reason := backend.early(*tensors)):
        return reason
    try:
        module = backend.load()
    except ImportError as error:
        return str(error)
    refuse = backend.refuse or getattr(module, "refuse", None)
    return refuse(*tensors) if refuse else None


def mismatch(tensors: Sequence[Tensor | None], *devices: str) -> str | None:
    """Say why kernels for these types of device, in fp32, bf16 and fp16, cannot take `tensors`; None when they can.

    Without tensors: why they cannot run at all.
    """
    if not tensors and devices == ("cuda",) and not torch.cuda.is_available():
        return "torch finds no usable CUDA GPU"
    for tensor in tensors:
        if tensor is None:
            continue
        if (kind := tensor.device.type) not in devices:
            return f"takes {' and '.join(devices)} tensors, not {kind}"
        if tensor.dtype not in _KERNEL_TYPES:
            return f"takes fp32, bf16 and fp16, not {tensor.dtype}"
    return None


def resolve(op: str, requested: str, *tensors: Tensor | None) -> Backend:
    """Return the backend that runs `op` on `tensors`.

    Args:
        requested: "auto", a backend's name, or `op=name,op=name`, which is "auto" for the operators it leaves out.

    Raises: BackendError with the reason of every backend that was tried.
    """
    requested = named(op, requested)
    if requested == "auto":
        on_cpu = any(tensor is not None and tensor.device.type == "cpu" for tensor in tensors)
        tried = [b for b in rows(op) if b.auto and not (b.gpu and on_cpu)]
    else:
        tried = [lookup(op, requested)]
    reasons = []
    for backend in tried:
        reason = unusable(backend, *tensors)
        if reason is None:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise BackendError(f"no backend for {op}: " + "; ".join(reasons))


# a compiler treats the result as a constant and does not trace the function: the mark that torch.compiler.assume_constant_result
# sets, which is not called because it imports the whole compiler, taking as long as torch's import
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def named(op: str, requested: str) -> str:
    """Return the name that `requested`, or else MFUSER_BACKEND, has for `op`: a backend's or "auto".

    Raises: BackendError for a malformed value.
    """
    requested = _wanted(op, requested)
    return requested if requested != "auto" else _wanted(op, os.environ.get("MFUSER_BACKEND") or "auto")


def _wanted(op: str, requested: str) -> str:
    """Return the one name that `requested` has for `op`."""
    if "=" not in requested:
        return requested
    names = {}
    for pair in requested.split(","):
        own, equals, name = pair.strip().partition("=")
        if not equals:
            raise BackendError(f"backend `{requested}`: `{own}` has no operator, write op=name,op=name")
        rows(own)
        names[own] = name
    return names.get(op, "auto")


def watched() -> bool:
    """Return whether operators are traced: by a compiler, `torch.jit`, or a mode that counts or fakes them.

    Otherwise an operator's own autograd.Function runs: the dispatcher takes longer than a small batch's launches.
    """
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or torch._C._is_tracing()


def running(op: str, name: str) -> ModuleType:
    """Return the backend's module for an operator's implementation, and count its run for `tally`."""
    module = lookup(op, name).load()
    _ran[op, name] += 1
    return module


_ran: Counter[tuple[str, str]] = Counter()


def tally() -> Counter[tuple[str, str]]:
    """Return how often each (op, backend) has run in this process, forward and backward."""
    return _ran.copy()


def count(runs: Counter[tuple[str, str]]) -> None:
    """Count runs that `running` did not see: those of a CUDA graph, whose kernels are launched without Python."""
    _ran.update(runs)


def ran_since(before: Counter[tuple[str, str]]) -> dict[str, str]:
    """Return which backend ran each operator since `tally` returned `before`; several are joined by `+`."""
    names: dict[str, list[str]] = {}
    for op, name in sorted(_ran - before):
        names.setdefault(op, []).append(name)
    return {op: "+".join(each) for op, each in names.items()}


def explain(op: str, *tensors: Tensor | None) -> dict[str, str | None]:
    """Return every backend of `op` with the reason why it cannot run here, or None when it can."""
    return {backend.name: unusable(backend, *tensors) for backend in rows(op)}


def available(op: str, *tensors: Tensor | None) -> list[str]:
    """Return the names of the backends of `op` that run here."""
    return [name for name, reason in explain(op, *tensors).items() if reason is None]
