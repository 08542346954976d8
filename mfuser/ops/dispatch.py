"""Which implementation of an operator runs: one row per backend, tried in order, or the one that was named.

A named backend is a promise: it runs or raises. "auto" takes the first row that accepts the tensors; the environment
variable MFUSER_BACKEND names one for every "auto".
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from torch import Tensor


class BackendError(ValueError):
    """No backend can run, or the named one cannot; the message lists the reasons."""


@dataclass(frozen=True)
class Backend:
    """One implementation: a module with the op's `forward` and `backward`, imported on first use."""

    name: str
    module: str
    # why it cannot take the op's tensors (None: absent), else None; by default the module's own `refuse`, if it has one
    refuse: Callable[..., str | None] | None = None
    auto: bool = True  # False: runs only when named
    gpu: bool = False  # "auto" leaves tensors on a CPU to others, also where the kernels are interpreted or emulated

    def load(self) -> ModuleType:
        return import_module(self.module)


_SCAN, _DEFORM = "mfuser.ops.selective_scan", "mfuser.ops.ms_deform_attn"
TABLE: dict[str, tuple[Backend, ...]] = {
    "selective_scan": (
        Backend("triton", f"{_SCAN}.triton_backend", gpu=True),
        Backend("mamba_ssm", f"{_SCAN}.mamba_backend", gpu=True),
        Backend("torch", f"{_SCAN}.torch_backend"),
        Backend("reference", f"{_SCAN}.reference", auto=False),
    ),
    "ms_deform_attn": (
        Backend("torch", f"{_DEFORM}.torch_backend"),
        Backend("reference", f"{_DEFORM}.reference", auto=False),
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
    try:
        module = backend.load()
    except ImportError as error:
        return str(error)
    refuse = backend.refuse or getattr(module, "refuse", None)
    return refuse(*tensors) if refuse else None


def resolve(op: str, requested: str, *tensors: Tensor | None) -> Backend:
    """Return the backend that runs `op` on `tensors`.

    Args:
        requested: "auto" or a backend's name.

    Raises: BackendError with the reason of every backend that was tried.
    """
    if requested == "auto":
        requested = os.environ.get("MFUSER_BACKEND") or "auto"
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


def explain(op: str, *tensors: Tensor | None) -> dict[str, str | None]:
    """Return every backend of `op` with the reason why it cannot run here, or None when it can."""
    return {backend.name: unusable(backend, *tensors) for backend in rows(op)}


def available(op: str, *tensors: Tensor | None) -> list[str]:
    """Return the names of the backends of `op` that run here."""
    return [name for name, reason in explain(op, *tensors).items() if reason is None]
