"""Which device to run on, what it is called, and how much memory was used there."""

from __future__ import annotations

import resource
import sys

import torch

from dgbench.errors import DgbenchError


def pick_device(name: str | None) -> torch.device:
    """The named device, or the GPU when there is one and the CPU otherwise. A named device is used or refused.

    Raises: DgbenchError for an unknown name or a device that this machine lacks.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DgbenchError(f"unknown device `{name}`", "use `cpu`, `cuda` or `cuda:1`") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DgbenchError("no CUDA device is usable here", "`dgbench doctor` says why; or use --device cpu")
    if device.type not in ("cpu", "cuda"):
        raise DgbenchError(f"device `{name}` is not supported", "use `cpu` or `cuda`")
    return device


def device_name(device: torch.device) -> str:
    """The GPU's name, or `cpu`: what a record says it ran on."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_gib(device: torch.device) -> float:
    """GiB that this process held at most: of the GPU's memory as torch allocated it, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Linux counts KiB, macOS bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
